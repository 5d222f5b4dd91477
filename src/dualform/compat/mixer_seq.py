"""``MixerModel`` and ``MambaLMHeadModel`` of mamba-ssm, under their names."""

import math
import os
from collections import namedtuple
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dualform.compat.block import Block, add_norm
from dualform.compat.cache import InferenceParams
from dualform.compat.generation import GenerationMixin
from dualform.compat.hf import load_config_hf, load_state_dict_hf
from dualform.compat.mamba import Mamba
from dualform.compat.mamba2 import Mamba2
from dualform.compat.mha import MHA
from dualform.compat.mlp import GatedMLP
from dualform.compat.model_config import MambaConfig
from dualform.compat.norms import RMSNorm
from dualform.core.errors import ArgumentError, CheckpointError
from dualform.core.json_file import to_json
from dualform.core.options import suggestion
from dualform.models.saving.files import CONFIG_FILE, WEIGHTS_FILE, replacing
from dualform.ops.device import explains_device

_MIXERS = {"Mamba1": Mamba, "Mamba2": Mamba2}
CausalLMOutput = namedtuple("CausalLMOutput", ["logits"])


@explains_device
def create_block(
    d_model: int,
    d_intermediate: int = 0,
    ssm_cfg: dict[str, Any] | None = None,
    attn_layer_idx: list[int] | None = None,
    attn_cfg: dict[str, Any] | None = None,
    norm_epsilon: float = 1e-5,
    rms_norm: bool = False,
    residual_in_fp32: bool = False,
    fused_add_norm: bool = False,
    layer_idx: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Block:
    """A block: a Mamba, Mamba2 or attention, and a feed-forward where ``d_intermediate`` is above 0.

    The arguments are those of :class:`~dualform.compat.model_config.MambaConfig`.

    Raises:
        ArgumentError: for a "layer" in ``ssm_cfg`` that there is not.
    """
    like = {"device": device, "dtype": dtype}
    ssm = dict(ssm_cfg or {})
    name = ssm.pop("layer", "Mamba1")
    if name not in _MIXERS:
        raise ArgumentError(f"create_block: ssm_cfg has the layer {name!r}", hint=suggestion(str(name), list(_MIXERS)))
    mixer: Callable[[int], nn.Module]
    if layer_idx is not None and layer_idx in (attn_layer_idx or ()):
        mixer = partial(MHA, layer_idx=layer_idx, **(attn_cfg or {}), **like)
    else:
        mixer = partial(_MIXERS[name], layer_idx=layer_idx, **ssm, **like)
    norm = partial(RMSNorm if rms_norm else nn.LayerNorm, eps=norm_epsilon, **like)
    mlp: Callable[[int], nn.Module] = nn.Identity
    if d_intermediate:
        mlp = partial(GatedMLP, hidden_features=d_intermediate, out_features=d_model, **like)
    block = Block(d_model, mixer, mlp, norm, fused_add_norm, residual_in_fp32)
    block.layer_idx = layer_idx
    return block


@torch.no_grad()
def _init_weights(
    module: nn.Module,
    n_layer: int,
    initializer_range: float = 0.02,
    rescale_prenorm_residual: bool = True,
    n_residuals_per_layer: int = 1,
) -> None:
    """Start biases at zero and tables normal, and scale down what each layer adds to the stream."""
    if isinstance(module, nn.Linear):
        if module.bias is not None and not getattr(module.bias, "_no_reinit", False):
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    if rescale_prenorm_residual:
        for name, parameter in module.named_parameters():
            if name in ("out_proj.weight", "fc2.weight"):
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
                parameter /= math.sqrt(n_residuals_per_layer * n_layer)


@explains_device
class MixerModel(nn.Module):
    """An embedding, blocks and a last norm; arguments as :class:`~dualform.compat.model_config.MambaConfig`.

    ``initializer_cfg`` are keywords of ``_init_weights``; ``norm_epsilon`` is that of all norms.
    """

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        d_intermediate: int,
        vocab_size: int,
        ssm_cfg: dict[str, Any] | None = None,
        attn_layer_idx: list[int] | None = None,
        attn_cfg: dict[str, Any] | None = None,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = False,
        initializer_cfg: dict[str, Any] | None = None,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.embedding = nn.Embedding(vocab_size, d_model, device=device, dtype=dtype)
        self.layers = nn.ModuleList(
            create_block(
                d_model,
                d_intermediate,
                ssm_cfg,
                attn_layer_idx,
                attn_cfg,
                norm_epsilon,
                rms_norm,
                residual_in_fp32,
                fused_add_norm,
                i,
                device,
                dtype,
            )
            for i in range(n_layer)
        )
        norm: Any = RMSNorm if rms_norm else nn.LayerNorm
        self.norm_f = norm(d_model, eps=norm_epsilon, device=device, dtype=dtype)
        residuals = 2 if d_intermediate else 1
        self.apply(partial(_init_weights, n_layer=n_layer, n_residuals_per_layer=residuals, **(initializer_cfg or {})))

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> dict[int, Any]:
        """The states of all layers, by index."""
        blocks: Any = self.layers
        return {i: b.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype) for i, b in enumerate(blocks)}

    def forward(
        self,
        input_ids: Tensor,
        inference_params: InferenceParams | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Tokens ``(B, T)`` -> features ``(B, T, d_model)``; ``seq_idx`` and ``cu_seqlens`` are for Mamba2."""
        hidden_states, residual = self.embedding(input_ids), None
        for layer in self.layers:
            hidden_states, residual = layer(hidden_states, residual, inference_params, seq_idx, cu_seqlens)
        return add_norm(
            self.norm_f, hidden_states, residual, self.fused_add_norm, self.residual_in_fp32, prenorm=False
        )[0]


@explains_device
class MambaLMHeadModel(nn.Module, GenerationMixin):
    """A language model: ``backbone``, a :class:`MixerModel`, and ``lm_head``.

    Args:
        config: sizes.
        initializer_cfg: keywords of ``_init_weights``.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        config: MambaConfig,
        initializer_cfg: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        c, self.config = config, config
        vocab_size = -(-c.vocab_size // c.pad_vocab_size_multiple) * c.pad_vocab_size_multiple
        self.backbone = MixerModel(
            c.d_model,
            c.n_layer,
            c.d_intermediate,
            vocab_size,
            ssm_cfg=c.ssm_cfg,
            attn_layer_idx=c.attn_layer_idx,
            attn_cfg=c.attn_cfg,
            rms_norm=c.rms_norm,
            initializer_cfg=initializer_cfg,
            fused_add_norm=c.fused_add_norm,
            residual_in_fp32=c.residual_in_fp32,
            device=device,
            dtype=dtype,
        )
        self.lm_head = nn.Linear(c.d_model, vocab_size, bias=False, device=device, dtype=dtype)
        self.apply(partial(_init_weights, n_layer=c.n_layer, **(initializer_cfg or {})))
        self.tie_weights()

    def tie_weights(self) -> None:
        """The head is the table, where the config says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> dict[int, Any]:
        """The states of all layers, by index."""
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        inference_params: InferenceParams | None = None,
        num_last_tokens: int = 0,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> CausalLMOutput:
        """Tokens ``(B, T)`` -> ``logits`` ``(B, T, V)``.

        Args:
            input_ids: the tokens.
            position_ids: ignored; order is all that a recurrence needs.
            inference_params: what the layers keep between calls.
            num_last_tokens: above 0, the logits of only so many.
            seq_idx: for layers of Mamba2.
            cu_seqlens: likewise.
        """
        hidden_states = self.backbone(input_ids, inference_params, seq_idx, cu_seqlens)
        if num_last_tokens > 0:
            hidden_states = hidden_states[:, -num_last_tokens:]
        return CausalLMOutput(logits=self.lm_head(hidden_states))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name: str | os.PathLike[str],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        initializer_cfg: dict[str, Any] | None = None,
    ) -> "MambaLMHeadModel":
        """The model in a folder: ``config.json`` and ``model.safetensors``, under upstream's names.

        Raises:
            CheckpointError: for files that are missing, damaged, or do not fit together.
        """
        about = load_config_hf(pretrained_model_name)
        known = [f.name for f in fields(MambaConfig)]
        if unknown := [name for name in about if name not in known]:
            raise CheckpointError(
                f"{pretrained_model_name}: {CONFIG_FILE}: unknown key {unknown[0]!r}",
                hint=f"{suggestion(unknown[0], known)}; it is not a config of mamba-ssm",
            )
        tensors = load_state_dict_hf(pretrained_model_name, device=device, dtype=dtype)
        model = cls(MambaConfig(**about), initializer_cfg, device=device, dtype=dtype)
        if model.config.tie_embeddings:
            tensors.pop("lm_head.weight", None)  # the table, once more
        try:
            missing, extra = model.load_state_dict(tensors, strict=False)
        except RuntimeError as error:
            raise CheckpointError(f"{pretrained_model_name}: {error}", hint=f"see {CONFIG_FILE} beside it") from error
        missing = [name for name in missing if not (model.config.tie_embeddings and name == "lm_head.weight")]
        if missing or extra:
            raise CheckpointError(
                f"{pretrained_model_name}: {len(missing)} tensors missing and {len(extra)} too many, first "
                f"{[*missing, *extra][0]!r}",
                hint=f"{CONFIG_FILE} beside it describes another model",
            )
        return model

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write ``config.json`` and ``model.safetensors``, all at once.

        Raises:
            CheckpointError: when the disk refuses.
        """
        tensors = {name: m.detach().cpu().contiguous() for name, m in self.state_dict().items()}
        if self.config.tie_embeddings:
            del tensors["lm_head.weight"]
        with replacing(save_directory) as new:
            (new / CONFIG_FILE).write_text(to_json(asdict(self.config)), encoding="utf-8")
            save_file(tensors, new / WEIGHTS_FILE, metadata={"format": "pt"})
