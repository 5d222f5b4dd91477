"""Files of GGUF as llama.cpp's own converter writes them: names by the package gguf, and what its notes say of shapes.

A folder of transformers goes in, so nothing here knows the names of this library.
"""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

ARCHITECTURES = {
    "mamba": gguf.MODEL_ARCH.MAMBA,
    "falcon_mamba": gguf.MODEL_ARCH.MAMBA,
    "mamba2": gguf.MODEL_ARCH.MAMBA2,
    "jamba": gguf.MODEL_ARCH.JAMBA,
    "falcon_h1": gguf.MODEL_ARCH.FALCON_H1,
    "granitemoehybrid": gguf.MODEL_ARCH.GRANITE_HYBRID,
    "lfm2": gguf.MODEL_ARCH.LFM2,
    "rwkv7": gguf.MODEL_ARCH.RWKV7,
}
Q8_0 = gguf.GGMLQuantizationType.Q8_0


def convert(folder: Path, path: Path, kind: Any = None, dtype: torch.dtype = torch.float32) -> None:
    """Write the model of a folder as a file, its matrices of one kind of blocks where their rows fit, or of a dtype."""
    c = json.loads((folder / "config.json").read_text())
    architecture = ARCHITECTURES[c["model_type"]]
    out = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    _keys(out, c)
    names = gguf.get_tensor_name_map(architecture, c["num_hidden_layers"])
    for name, tensor in _changed(c, load_file(folder / "model.safetensors")).items():
        there = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert there is not None, name
        write_tensor(out, there, tensor, kind, dtype)
    finish(out)


def write_tensor(out: gguf.GGUFWriter, name: str, tensor: Tensor, kind: Any, dtype: torch.dtype) -> None:
    small = tensor.dim() < 2 or any(word in name for word in ("norm", "conv", "ssm_a", "ssm_d", "gate_inp", "lerp"))
    if small and not (name.endswith("ssm_dt.weight")):
        out.add_tensor(name, tensor.float().contiguous().numpy())
    elif kind is not None and tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0:
        out.add_tensor(name, gguf.quants.quantize(tensor.float().contiguous().numpy(), kind), raw_dtype=kind)
    elif dtype == torch.bfloat16:
        words = tensor.bfloat16().contiguous().view(torch.int16).numpy()
        out.add_tensor(name, words.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        out.add_tensor(name, tensor.to(dtype).contiguous().numpy())


def finish(out: gguf.GGUFWriter) -> None:
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def _keys(out: gguf.GGUFWriter, c: dict[str, Any]) -> None:
    kind, layers, width = c["model_type"], c["num_hidden_layers"], c["hidden_size"]
    out.add_block_count(layers)
    out.add_embedding_length(width)
    out.add_context_length(2**20)
    out.add_layer_norm_rms_eps(c.get("layer_norm_epsilon") or c.get("rms_norm_eps") or c.get("norm_eps"))
    if kind in ("mamba", "falcon_mamba", "mamba2"):
        out.add_feed_forward_length(0)
        out.add_head_count(0)
        out.add_ssm_conv_kernel(c["conv_kernel"])
        out.add_ssm_inner_size(c["expand"] * width)
        out.add_ssm_state_size(c["state_size"])
    if kind in ("mamba", "falcon_mamba"):
        out.add_ssm_time_step_rank(c["time_step_rank"])
        out.add_ssm_dt_b_c_rms(kind == "falcon_mamba")
    if kind == "mamba2":
        out.add_ssm_time_step_rank(c["num_heads"])
        out.add_ssm_group_count(c["n_groups"])
    if kind in ("jamba", "falcon_h1", "granitemoehybrid"):
        out.add_ssm_conv_kernel(c["mamba_d_conv"])
        out.add_ssm_state_size(c["mamba_d_state"])
        out.add_ssm_inner_size(c.get("mamba_d_ssm") or c["mamba_expand"] * width)
        out.add_ssm_time_step_rank(c["mamba_dt_rank"] if kind == "jamba" else c["mamba_n_heads"])
        out.add_head_count(c["num_attention_heads"])
        out.add_feed_forward_length(c["intermediate_size"])
    kv = c.get("num_key_value_heads")
    if kind == "jamba":
        period, offset = c["attn_layer_period"], c["attn_layer_offset"]
        out.add_head_count_kv([kv if i % period == offset else 0 for i in range(layers)])
        out.add_expert_count(c["num_experts"])
        out.add_expert_used_count(c["num_experts_per_tok"])
    if kind in ("falcon_h1", "granitemoehybrid"):
        out.add_ssm_group_count(c["mamba_n_groups"])
    if kind == "falcon_h1":
        out.add_head_count_kv(kv)
        out.add_rope_freq_base(c["rope_parameters"]["rope_theta"])
        out.add_key_length(width // c["num_attention_heads"])
    if kind == "granitemoehybrid":
        turns = c["position_embedding_type"] == "rope"
        out.add_head_count_kv([kv if "attention" in t and "linear" not in t else 0 for t in c["layer_types"]])
        out.add_expert_count(c["num_local_experts"])
        out.add_expert_used_count(c["num_experts_per_tok"])
        out.add_expert_shared_feed_forward_length(c["shared_intermediate_size"])
        out.add_attention_scale(c["attention_multiplier"])
        out.add_embedding_scale(c["embedding_multiplier"])
        out.add_residual_scale(c["residual_multiplier"])
        out.add_logit_scale(c["logits_scaling"])
        out.add_rope_scaling_finetuned(turns)
        out.add_rope_freq_base(c["rope_parameters"]["rope_theta"])
        out.add_rope_dimension_count(width // c["num_attention_heads"])
    if kind == "lfm2":
        out.add_head_count(c["num_attention_heads"])
        out.add_head_count_kv([kv if t != "conv" else 0 for t in c["layer_types"]])
        out.add_feed_forward_length(c["intermediate_size"])
        out.add_rope_freq_base(c["rope_parameters"]["rope_theta"])
        out.add_shortconv_l_cache(c["conv_L_cache"])
        out.add_vocab_size(c["vocab_size"])


def _changed(c: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as the converter stores them, under the names that it looks up."""
    kind, found = c["model_type"], dict[str, Tensor]()
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, t in tensors.items():
        if ".experts." in name:
            before, _, after = name.partition("feed_forward.experts.")
            expert, _, rest = after.partition(".")
            stacks.setdefault(f"{before}mlp.experts.{rest}", {})[int(expert)] = t
            continue
        if "conv1d.weight" in name or "conv.conv.weight" in name:
            t = t.squeeze(1)
        if name.endswith("A_log"):
            t = -torch.exp(t)
        if kind not in ("mamba", "falcon_mamba", "jamba") and name.endswith(("A_log", ".D")):
            t = t.reshape(-1, 1)
        if name.endswith("dt_bias"):
            name = name.replace("dt_bias", "dt_proj.bias")
        if name.endswith(("mixer.norm.weight", "mamba.norm.weight")):
            t = t.reshape(c.get("n_groups") or c["mamba_n_groups"], -1)
        if kind == "falcon_h1":
            t = _scaled(c, name, t)
        if kind == "granitemoehybrid":
            heads = {"q_proj": c["num_attention_heads"], "k_proj": c["num_key_value_heads"]}
            count = next((n for word, n in heads.items() if word in name), None)
            if count is not None:
                t = t.reshape(count, 2, -1, t.shape[-1]).swapaxes(1, 2).reshape(t.shape)
            if "input_linear" in name:
                moe = "sparse_moe" in name
                kinds = ("ffn_gate_exps", "ffn_up_exps") if moe else ("ffn_gate_shexp", "ffn_up_shexp")
                kinds = kinds if c["num_local_experts"] else ("ffn_gate", "ffn_up")
                for there, half in zip(kinds, t.chunk(2, -2), strict=True):
                    found[f"blk.{name.split('.')[2]}.{there}.weight"] = half
                continue
            if "shared_mlp.output_linear" in name and not c["num_local_experts"]:
                name = f"blk.{name.split('.')[2]}.ffn_down.weight"
        found[name] = t
    return found | {name: torch.stack([of[i] for i in range(len(of))]) for name, of in stacks.items()}


def _scaled(c: dict[str, Any], name: str, t: Tensor) -> Tensor:
    """The factors of Falcon-H1, which are multiplied into the weights."""
    factors = {
        "down_proj": c["mlp_multipliers"][1],
        "gate_proj": c["mlp_multipliers"][0],
        "k_proj": c["key_multiplier"] * c["attention_in_multiplier"],
        "q_proj": c["attention_in_multiplier"],
        "v_proj": c["attention_in_multiplier"],
        "o_proj": c["attention_out_multiplier"],
        "out_proj": c["ssm_out_multiplier"],
        "lm_head": c["lm_head_multiplier"],
        "embed_tokens": c["embedding_multiplier"],
    }
    if "in_proj" in name:
        inner, bc = c["mamba_d_ssm"], c["mamba_n_groups"] * c["mamba_d_state"]
        sizes = [inner, inner, bc, bc, c["mamba_n_heads"]]
        rows = [torch.full((n,), m) for n, m in zip(sizes, c["ssm_multipliers"], strict=True)]
        return t * c["ssm_in_multiplier"] * torch.cat(rows)[:, None]
    return t * next((factor for word, factor in factors.items() if word in name), 1.0)
