"""Which names there are, where each is written, and what to use instead of those that are refused."""

from typing import NamedTuple


class Package(NamedTuple):
    """One distribution that is imitated."""

    distribution: str  # its name on PyPI
    version: str  # the upstream version whose names and behaviour these are
    modules: tuple[str, ...]  # the top-level modules that it installs

    @property
    def shown_version(self) -> str:
        """The version that is reported: a local version of the upstream one."""
        return f"{self.version}+dualform"


PACKAGES = (
    Package("mamba-ssm", "2.3.0", ("mamba_ssm", "selective_scan_cuda")),
    Package("causal-conv1d", "1.5.3", ("causal_conv1d", "causal_conv1d_cuda")),
)

_SCAN = {
    "selective_scan_fn": "scan",
    "selective_scan_ref": "scan",
    "mamba_inner_fn": "inner",
    "mamba_inner_ref": "inner",
    "mamba_inner_fn_no_out_proj": "inner",
    "bimamba_inner_fn": "inner",
}
_CONV = {
    "causal_conv1d_fn": "conv",
    "causal_conv1d_ref": "conv",
    "causal_conv1d_update": "conv_update",
    "causal_conv1d_update_ref": "conv_update",
}
_NORMS = {"RMSNorm": "norms", "layer_norm_fn": "norms", "rms_norm_fn": "norms"}
_VARLEN = {"causal_conv1d_varlen_states": "conv", "causal_conv1d_varlen_states_ref": "conv"}

MODULES: dict[str, dict[str, str]] = {
    "mamba_ssm": {
        "Mamba": "mamba",
        "Mamba2": "mamba2",
        "MambaLMHeadModel": "mixer_seq",
        "mamba_inner_fn": "inner",
        "selective_scan_fn": "scan",
    },
    "mamba_ssm.modules": {},
    "mamba_ssm.modules.block": {"Block": "block"},
    "mamba_ssm.modules.mamba_simple": {"Block": "simple_block", "Mamba": "mamba"},
    "mamba_ssm.modules.mamba2": {"Mamba2": "mamba2"},
    "mamba_ssm.modules.mamba2_simple": {"Mamba2Simple": "mamba2_simple"},
    "mamba_ssm.modules.mha": {"MHA": "mha"},
    "mamba_ssm.modules.mlp": {"GatedMLP": "mlp"},
    "mamba_ssm.modules.ssd_minimal": {"ssd_minimal_discrete": "ssd_minimal"},
    "mamba_ssm.models": {},
    "mamba_ssm.models.config_mamba": {"MambaConfig": "model_config"},
    "mamba_ssm.models.mixer_seq_simple": {
        "MambaConfig": "model_config",
        "MambaLMHeadModel": "mixer_seq",
        "MixerModel": "mixer_seq",
        "_init_weights": "mixer_seq",
        "create_block": "mixer_seq",
    },
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.selective_scan_interface": _SCAN,
    "mamba_ssm.ops.triton": {},
    "mamba_ssm.ops.triton.layer_norm": _NORMS,
    "mamba_ssm.ops.triton.layernorm": _NORMS,
    "mamba_ssm.ops.triton.layernorm_gated": {
        "LayerNorm": "gated_norms",
        "RMSNorm": "gated_norms",
        "layernorm_fn": "gated_norms",
        "rms_norm_ref": "references",
        "rmsnorm_fn": "gated_norms",
    },
    "mamba_ssm.ops.triton.selective_state_update": {
        "selective_state_update": "step",
        "selective_state_update_ref": "step",
    },
    "mamba_ssm.ops.triton.ssd_combined": {
        "mamba_chunk_scan": "references",
        "mamba_chunk_scan_combined": "ssd",
        "mamba_split_conv1d_scan_combined": "ssd",
        "mamba_split_conv1d_scan_ref": "references",
        "ssd_chunk_scan_combined_ref": "references",
    },
    "mamba_ssm.utils": {},
    "mamba_ssm.utils.generation": {
        "GenerationMixin": "generation",
        "InferenceParams": "cache",
        "decode": "generation",
        "modify_logit_for_repetition_penalty": "sampling",
        "modify_logits_for_min_p_filtering": "sampling",
        "modify_logits_for_top_k_filtering": "sampling",
        "modify_logits_for_top_p_filtering": "sampling",
        "sample": "sampling",
    },
    "mamba_ssm.utils.hf": {"load_config_hf": "hf", "load_state_dict_hf": "hf"},
    "selective_scan_cuda": {"fwd": "scan_kernel", "bwd": "scan_kernel"},
    "causal_conv1d": {"causal_conv1d_fn": "conv", "causal_conv1d_update": "conv_update", **_VARLEN},
    "causal_conv1d.causal_conv1d_interface": _CONV,
    "causal_conv1d.causal_conv1d_varlen": _VARLEN,
}
"""Module -> name -> the file of this folder that it comes from, imported when the name is first used."""

_PRIVATE = "it is a private kernel; the public functions of {} run dualform's"
_KERNELS = {
    "causal_conv1d_cuda": "use causal_conv1d.causal_conv1d_fn and causal_conv1d_update",
    "causal_conv1d.cpp_functions": "use causal_conv1d.causal_conv1d_fn and causal_conv1d_update",
    "mamba_ssm.distributed": "use PyTorch's FSDP or tensor parallelism (torch.distributed.tensor) around the modules",
    "mamba_ssm.modules.mamba3": "Mamba-3 is not here yet; use mamba_ssm.modules.mamba2",
    "mamba_ssm.ops.tilelang": "Mamba-3 is not here yet; use mamba_ssm.modules.mamba2",
    "mamba_ssm.ops.cute": "Mamba-3 is not here yet; use mamba_ssm.modules.mamba2",
}
_SSD = "mamba_ssm.ops.triton.ssd_combined"

REFUSED: dict[str, str] = {
    **_KERNELS,
    **{
        f"mamba_ssm.ops.triton.{name}": _PRIVATE.format(_SSD)
        for name in ("ssd_bmm", "ssd_chunk_scan", "ssd_chunk_state", "ssd_state_passing", "k_activations", "softplus")
    },
    "mamba_ssm.ops.triton.layer_norm.layer_norm_linear_fn": "use layer_norm_fn, then torch.nn.functional.linear",
    "mamba_ssm.ops.triton.layernorm.layer_norm_linear_fn": "use layer_norm_fn, then torch.nn.functional.linear",
    "mamba_ssm.Mamba3": "Mamba-3 is not here yet; use Mamba2",
}
"""Modules and names that are refused, and the way out."""


def remedy(name: str) -> str:
    """What to use instead of a module or name that there is not."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if known := REFUSED.get(".".join(parts[:length])):
            return known
    home = next((".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1) if ".".join(parts[:n]) in MODULES), "")
    if parts[-1].startswith("_") and home:
        return _PRIVATE.format(home)
    inner = sorted({m.removeprefix(f"{home}.").split(".")[0] for m in MODULES if m.startswith(f"{home}.")})
    there = sorted(MODULES.get(home, {})) + inner
    return f"{home} has {', '.join(there)}" if there else "docs/coming-from-mamba-ssm.md lists what there is"
