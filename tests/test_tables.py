"""Models of other libraries in this one: recorded logits, random models of transformers, and the way back."""

import contextlib
import copy
import dataclasses
import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import dualform as df
from dualform.compat.mixer_seq import MambaLMHeadModel
from dualform.compat.model_config import MambaConfig as UpstreamConfig
from dualform.core.errors import ArgumentError, ConfigError
from dualform.core.laws import LAWS, Trial
from dualform.layers.attention import AttentionConfig
from dualform.layers.lstm import LSTMConfig
from dualform.layers.mamba import MambaConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.layers.mlp import MLPConfig
from dualform.layers.rotary import RotaryConfig
from dualform.models.saving.weights import INDEX_FILE
from dualform.models.tables.registry import HF

GOLDEN = Path(__file__).parent / "golden"
RECORDED = {  # how near the logits must be in float32 and in float64
    "lm_mamba": (1e-5, 1e-6),
    "lm_mamba2": (1e-5, 1e-6),
    "lm_falcon_mamba": (1e-5, 2e-6),
    "lm_bamba": (1e-5, 1e-6),
    "lm_jamba": (1e-5, 2e-6),
    "lm_zamba": (2e-5, 4e-6),
    "lm_zamba2": (9e-5, 2e-5),
    "lm_falcon_h1": (1e-5, 1e-6),
    "lm_granitemoehybrid": (1e-5, 1e-6),
    "lm_nemotron_h": (1e-5, 1e-6),
    "lm_lfm2": (1e-5, 1e-6),
    "lm_minimax": (1e-5, 1e-6),
    "lm_recurrent_gemma": (1e-5, 1e-6),
    "lm_xlstm": (1e-5, 1e-6),
    "lm_lfm2_moe": (1e-5, 1e-6),
    "lm_rwkv": (1e-5, 1e-6),
    "lm_qwen3_next": (1e-5, 3e-6),
    "lm_qwen3_5_text": (2e-5, 4e-6),
    "lm_olmo_hybrid": (3e-5, 6e-6),
    "lm_kimi_linear": (1e-5, 4e-6),
}
COMPUTED = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")  # from the config, whenever one loads MiniMax
recorded = pytest.mark.parametrize("name", RECORDED)


def apart(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@recorded
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_recorded_logits(name, dtype):
    model, want = df.load(GOLDEN / name, dtype=dtype), load_file(GOLDEN / f"{name}.safetensors")
    with torch.no_grad():
        logits = model(want["input_ids"])[0]
    assert logits.dtype == getattr(torch, dtype)
    assert apart(logits, want["logits" if dtype == "float32" else "logits_f64"]) <= RECORDED[name][dtype == "float64"]


@recorded
def test_the_recorded_continuation(name):
    model, want = df.load(GOLDEN / name), load_file(GOLDEN / f"{name}.safetensors")
    greedy = df.Sampling(temperature=0)
    stepped = [list(df.generate(model, row, 16, sampling=greedy)) for row in want["input_ids"]]
    assert stepped == want["continuation"].tolist()
    x = want["input_ids"]
    with torch.no_grad():
        for _ in range(16):
            x = torch.cat([x, model(x)[0][:, -1:].argmax(-1)], 1)
    assert x[:, 13:].tolist() == stepped


@recorded
@pytest.mark.parametrize("law", ["split", "step", "packed", "padded left", "padded right", "padded between", "rows"])
def test_every_form_is_the_same_function(name, law):
    model = df.load(GOLDEN / name, dtype="float64")
    x = torch.randint(97, (4, 12), generator=torch.Generator().manual_seed(1))
    error = LAWS[law](Trial(model, x, warmup=3))
    assert error is not None and error.error < 1e-10


@recorded
def test_there_and_back(name, tmp_path):
    model = df.load(GOLDEN / name)
    df.save(model, tmp_path / "own")
    df.save(df.load(tmp_path / "own"), tmp_path / "hf", layout="hf")
    stored, want = load_file(tmp_path / "hf" / "model.safetensors"), load_file(GOLDEN / name / "model.safetensors")
    want = {key: tensor for key, tensor in want.items() if not key.endswith(COMPUTED)}
    assert stored.keys() == want.keys() and all(torch.equal(stored[key], want[key]) for key in want)
    about = json.loads((tmp_path / "hf" / "config.json").read_text())
    first = json.loads((GOLDEN / name / "config.json").read_text())
    tokens = {"bos_token_id", "eos_token_id", "pad_token_id"}  # which are the tokenizer's here
    assert {key: about[key] for key in about.keys() & first.keys() - tokens} == {
        key: first[key] for key in about.keys() & first.keys() - tokens
    }
    again = df.load(tmp_path / "hf")
    assert again.config == model.config and same(again, model)


def same(a: Any, b: Any) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


# --- fresh models of transformers, at odd sizes ---

FAMILIES: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 3, "conv_kernel": 3, "time_step_rank": 5, "use_bias": True, "tie_word_embeddings": False},
    "mamba, a width of its own": {"state_size": 5, "intermediate_size": 13, "use_conv_bias": False},
    "falcon_mamba": {"state_size": 3, "time_step_rank": 2, "intermediate_size": 13, "mixer_rms_eps": 0.25},
    "mamba2": {"num_heads": 6, "head_dim": 4, "n_groups": 3, "state_size": 5, "layer_norm_epsilon": 0.5},
    "bamba": {
        "num_hidden_layers": 3,
        "attn_layer_indices": [0, 2],
        "mamba_n_heads": 6,
        "mamba_d_head": 4,
        "mamba_n_groups": 3,
        "mamba_d_state": 5,
        "intermediate_size": 7,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "mamba_proj_bias": True,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.7},
    },
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 3,
        "attn_layer_offset": 0,
        "expert_layer_period": 3,
        "expert_layer_offset": 2,
        "num_experts": 3,
        "num_experts_per_tok": 1,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "mamba_d_state": 3,
        "mamba_dt_rank": 2,
        "mamba_d_conv": 3,
        "mamba_proj_bias": True,
        "mamba_expand": 1,
        "rms_norm_eps": 0.05,
    },
    "jamba, dense": {
        "num_experts": 1,
        "attn_layer_period": 9,
        "attn_layer_offset": 8,
        "intermediate_size": 7,
        "mamba_d_state": 2,
        "tie_word_embeddings": True,
        "mamba_conv_bias": False,
    },
    "falcon_h1": {
        "mamba_d_ssm": 10,
        "mamba_n_heads": 5,
        "mamba_n_groups": 5,
        "mamba_d_state": 3,
        "intermediate_size": 7,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "key_multiplier": 0.3,
        "ssm_in_multiplier": 0.7,
        "mamba_rms_norm": True,
        "mamba_norm_before_gate": True,
        "lm_head_multiplier": 0.3,
        "attention_bias": True,
    },
    "falcon_h1, no norm": {
        "mamba_d_ssm": 12,
        "mamba_n_heads": 2,
        "mamba_d_state": 3,
        "intermediate_size": 7,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "ssm_multipliers": [0.5, 1.5, 0.25, 2.0, 0.75],
        "tie_word_embeddings": True,
        "mamba_proj_bias": True,
        "projectors_bias": True,
        "mlp_bias": True,
        "mlp_multipliers": [0.3, 1.4],
    },
    "granitemoehybrid": {
        "layer_types": ["full_attention", "linear_attention"],
        "mamba_n_heads": 4,
        "mamba_d_state": 3,
        "mamba_n_groups": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "position_embedding_type": "rope",
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "intermediate_size": 8,
        "shared_intermediate_size": 5,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.3,
        "logits_scaling": 7.0,
        "embedding_multiplier": 12,
        "rms_norm_eps": 0.01,
        "tie_word_embeddings": True,
    },
    "granitemoehybrid, dense attention": {
        "layer_types": ["full_attention"] * 2,
        "num_attention_heads": 4,
        "num_local_experts": 0,
        "mamba_n_heads": 2,
        "shared_intermediate_size": 7,
        "attention_bias": True,
    },
    "nemotron_h": {
        "layers_block_type": ["moe", "linear_attention", "mlp", "full_attention"],
        "mamba_num_heads": 3,
        "mamba_head_dim": 5,
        "n_groups": 3,
        "ssm_state_size": 2,
        "num_attention_heads": 2,
        "head_dim": 3,
        "num_key_value_heads": 2,
        "intermediate_size": 7,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "moe_shared_expert_intermediate_size": 5,
        "norm_topk_prob": False,
        "mlp_bias": False,
        "use_bias": True,
        "time_step_min": 0.5,
        "num_hidden_layers": 4,
    },
    "gpt_neox": {
        "num_attention_heads": 3,
        "intermediate_size": 7,
        "hidden_act": "gelu",
        "rotary_pct": 0.5,
        "rotary_emb_base": 77.0,
    },
    "gpt_neox, one after the other": {
        "num_attention_heads": 2,
        "intermediate_size": 5,
        "use_parallel_residual": False,
        "rotary_pct": 0.34,
        "attention_bias": False,
        "hidden_act": "relu",
        "layer_norm_eps": 0.1,
        "tie_word_embeddings": True,
    },
    "llama": {
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "intermediate_size": 7,
        "head_dim": 6,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_theta": 99.0,
    },
    "qwen3": {
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "intermediate_size": 7,
        "head_dim": 6,
        "attention_bias": True,
        "rms_norm_eps": 0.05,
        "rope_theta": 99.0,
    },
    "qwen3, a window": {
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "intermediate_size": 5,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "lfm2_moe": {
        "num_hidden_layers": 4,
        "layer_types": ["full_attention", "conv", "conv", "full_attention"],
        "num_dense_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 7,
        "moe_intermediate_size": 4,
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.7,
        "conv_bias": True,
        "conv_L_cache": 4,
        "norm_eps": 0.05,
        "tie_word_embeddings": False,
    },
    "lfm2_moe, no correction": {
        "num_hidden_layers": 2,
        "layer_types": ["conv", "full_attention"],
        "num_dense_layers": 0,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "moe_intermediate_size": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "use_expert_bias": False,
    },
    "kimi_linear": {
        "num_hidden_layers": 4,
        "layer_types": ["full_attention", "linear_attention", "full_attention", "linear_attention"],
        "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "qk_nope_head_dim": 3,
        "qk_rope_head_dim": 2,
        "v_head_dim": 5,
        "kv_lora_rank": 4,
        "q_lora_rank": 3,
        "attention_bias": True,
        "linear_num_heads": 3,
        "linear_head_dim": 4,
        "linear_conv_kernel_dim": 3,
        "intermediate_size": 7,
        "moe_intermediate_size": 4,
        "num_experts": 6,
        "num_experts_per_token": 2,
        "num_expert_group": 3,
        "topk_group": 2,
        "num_shared_experts": 2,
        "moe_renormalize": False,
        "pad_token_id": None,
        "rms_norm_eps": 0.05,
    },
    "rwkv": {
        "num_hidden_layers": 5,
        "attention_hidden_size": 10,
        "intermediate_size": 7,
        "rescale_every": 2,
    },
    "rwkv, never rescaled": {"rescale_every": 0, "tie_word_embeddings": True},
    "zamba2": {
        "num_hidden_layers": 6,
        "layers_block_type": ["hybrid", "mamba", "hybrid", "hybrid", "mamba", "hybrid"],
        "num_mem_blocks": 3,
        "mamba_d_state": 3,
        "n_mamba_heads": 6,
        "mamba_ngroups": 2,
        "num_attention_heads": 4,
        "adapter_rank": 2,
        "use_shared_attention_adapter": True,
        "add_bias_linear": True,
        "time_step_min": 0.3,
    },
    "zamba2, without adapters of attention": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "mamba_d_state": 3,
        "n_mamba_heads": 3,
        "num_attention_heads": 2,
        "adapter_rank": 3,
        "use_mem_rope": True,
        "hidden_act": "silu",
        "intermediate_size": 7,
    },
    "llama, scaled": {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 100.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 3.0,
            "original_max_position_embeddings": 16,
        },
    },
    "llama, yarn": {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 5,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 50.0,
            "factor": 3.0,
            "original_max_position_embeddings": 8,
        },
    },
    "qwen3_next": {
        "num_hidden_layers": 3,
        "layer_types": ["full_attention", "linear_attention", "linear_attention"],
        "linear_num_value_heads": 6,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 3,
        "linear_value_head_dim": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 5,
        "intermediate_size": 7,
        "mlp_only_layers": [1],
        "norm_topk_prob": False,
        "attention_bias": True,
    },
    "qwen3_5_text": {
        "num_hidden_layers": 4,
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 5,
        "linear_value_head_dim": 4,
        "linear_conv_kernel_dim": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "intermediate_size": 7,
        "tie_word_embeddings": True,
        "rms_norm_eps": 0.01,
    },
    "olmo_hybrid": {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 7,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 3,
        "linear_value_head_dim": 5,
        "linear_allow_neg_eigval": False,
        "pad_token_id": 0,
        "attention_bias": True,
    },
    "zamba": {
        "num_hidden_layers": 7,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "n_mamba_heads": 3,
        "mamba_d_state": 3,
        "intermediate_size": 7,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "mamba_dt_rank": 2,
        "hidden_act": "relu",
        "mamba_conv_bias": False,
    },
    "zamba, nothing shared": {
        "num_hidden_layers": 5,
        "layers_block_type": ["hybrid", "mamba", "hybrid", "mamba", "mamba"],
        "n_mamba_heads": 1,
        "mamba_d_state": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 5,
        "tie_word_embeddings": False,
    },
    "lfm2": {
        "num_hidden_layers": 3,
        "layer_types": ["full_attention", "conv", "conv"],
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 10,
        "block_multiple_of": 5,
        "block_ffn_dim_multiplier": 1.3,
        "conv_L_cache": 4,
        "conv_bias": True,
        "norm_eps": 0.05,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
    },
    "minimax": {
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"],
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "intermediate_size": 8,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "sliding_window": 4,
        "full_attn_alpha_factor": 0.7,
        "linear_attn_beta_factor": 1.5,
        "mlp_alpha_factor": 2.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
    },
    "recurrent_gemma": {
        "num_hidden_layers": 5,
        "block_types": ["attention", "recurrent"],
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "attention_window_size": 3,
        "attention_bias": True,
        "lru_width": 12,
        "intermediate_size": 14,
        "conv1d_width": 3,
        "logits_soft_cap": 2.0,
        "rms_norm_eps": 0.05,
    },
    "xlstm": {
        "num_heads": 3,
        "qk_dim_factor": 0.5,
        "v_dim_factor": 1.25,
        "ffn_proj_factor": 1.7,
        "ffn_round_up_to_multiple_of": 3,
        "gate_soft_cap": 2.0,
        "output_logit_soft_cap": 3.0,
        "norm_eps": 0.05,
        "eps": 0.01,
        "autocast_kernel_dtype": "float32",
    },
    "mamba2, bounded": {"num_heads": 3, "head_dim": 8, "n_groups": 1, "time_step_limit": (0.02, 0.3), "use_bias": True},
}


@pytest.mark.parametrize("case", FAMILIES)
def test_a_random_model_of_transformers(case, tmp_path):
    transformers = pytest.importorskip("transformers")
    family = case.split(",")[0]
    torch.manual_seed(0)
    options = {"vocab_size": 29, "hidden_size": 12, "num_hidden_layers": 2, "chunk_size": 4, **FAMILIES[case]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kernels that transformers does not find
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **options))
        with torch.no_grad():
            for p in theirs.parameters():
                p.add_(0.2 * torch.randn_like(p))
        theirs.eval().save_pretrained(tmp_path / "theirs", max_shard_size="8KB" if case == "mamba2" else "1GB")
        assert (tmp_path / "theirs" / INDEX_FILE).exists() == (case == "mamba2")
        x = torch.randint(29, (2, 9))
        ours, stored = df.load(tmp_path / "theirs"), copy.deepcopy(theirs)  # RWKV rescales its weights when it runs
        with torch.no_grad():
            assert apart(ours(x)[0], theirs(x, use_cache=False).logits) < 1e-5
        df.save(ours, tmp_path / "ours", layout="hf")
        back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert same(back, stored)
    assert df.load(tmp_path / "ours").config == ours.config


def test_kimi_linear_as_its_authors_wrote_it(tmp_path):
    """Feed-forwards of another name where there are no experts, layers numbered from 1 in a table of their own."""
    folder = GOLDEN / "lm_kimi_linear"
    about, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    linear = {"num_heads": about.pop("linear_num_heads"), "head_dim": about.pop("linear_head_dim")}
    linear |= {"short_conv_kernel_size": about.pop("linear_conv_kernel_dim"), "full_attn_layers": [4]}
    about |= {"linear_attn_config": {**linear, "kda_layers": [1, 2, 3]}, "first_k_dense_replace": 1}
    del about["layer_types"], about["mlp_layer_types"]
    (tmp_path / "config.json").write_text(json.dumps(about))
    renamed = {key.replace("0.block_sparse_moe.", "0.mlp."): tensor for key, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, tmp_path / "model.safetensors")
    ours, want = df.load(tmp_path), df.load(folder)
    assert ours.config == want.config and same(ours, want)


def test_a_file_of_two_dtypes(tmp_path):
    """Decays and skips are often kept in float32 beside weights in bfloat16."""
    tensors = load_file(GOLDEN / "lm_mamba2" / "model.safetensors")
    kept = ("A_log", "D", "dt_bias")
    shutil.copy(GOLDEN / "lm_mamba2" / "config.json", tmp_path)
    save_file({k: t if k.endswith(kept) else t.bfloat16() for k, t in tensors.items()}, tmp_path / "model.safetensors")
    model, x = df.load(tmp_path), torch.randint(97, (2, 9))
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}
    with torch.no_grad():
        assert apart(model(x)[0], df.load(tmp_path, dtype="float32")(x)[0]) < 0.03


@recorded
def test_an_impossible_config_is_refused(name):
    """Every key with values that it cannot have: a config is read, or its error is a sentence."""
    about = json.loads((GOLDEN / name / "config.json").read_text())
    family = HF[about["model_type"]]
    for key in about.keys() - {"model_type", "architectures", "transformers_version"}:
        for value in (0, -1, None, "a", [1, "b"], {}, 10**6, math.nan, {"rope_type": "x"}):
            with contextlib.suppress(ConfigError):
                family.read({**about, key: value}, "")
    for wrong in ({"hidden_size": 0}, {"num_hidden_layers": "two"}, {"quantization_config": {"bits": 4}}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))} is"):
            family.read({**about, **wrong}, "")


def test_the_pages_name_every_family():
    page = (GOLDEN.parent.parent / "docs" / "pretrained.md").read_text()
    assert [name for name in HF if f'"{name}"' not in page] == []


# --- mamba-ssm ---

SIZES = {"d_model": 8, "n_layer": 3, "vocab_size": 13, "residual_in_fp32": True}
UPSTREAM = {
    "mamba": UpstreamConfig(**SIZES, ssm_cfg={"d_state": 3, "dt_rank": 2}),
    "mamba2": UpstreamConfig(**SIZES, ssm_cfg={"layer": "Mamba2", "d_state": 3, "headdim": 4, "ngroups": 2}),
    "hybrid": UpstreamConfig(
        **SIZES,
        d_intermediate=100,
        ssm_cfg={"layer": "Mamba2", "d_state": 3, "headdim": 8, "dt_limit": [0.01, 0.1], "bias": True},
        attn_layer_idx=[1],
        attn_cfg={"num_heads": 2, "num_heads_kv": 1, "rotary_emb_dim": 4, "causal": True},
        tie_embeddings=False,
        pad_vocab_size_multiple=5,
    ),
    "mamba2attn": UpstreamConfig(
        **SIZES,
        ssm_cfg={"layer": "Mamba2", "d_state": 3, "headdim": 8},
        attn_layer_idx=[0, 2],
        attn_cfg={
            "causal": True,
            "d_conv": 4,
            "head_dim": 6,
            "num_heads": 3,
            "out_proj_bias": False,
            "qkv_proj_bias": False,
            "rotary_emb_dim": 2,
        },
    ),
}


@pytest.mark.parametrize("case", UPSTREAM)
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_of_mamba_ssm(case, file, tmp_path):
    torch.manual_seed(0)
    theirs, x = MambaLMHeadModel(UPSTREAM[case]), torch.randint(13, (2, 7))
    theirs.save_pretrained(tmp_path / "theirs")
    if file == "pytorch_model.bin":  # as that library writes it: with a tied head
        (tmp_path / "theirs" / "model.safetensors").unlink()
        (tmp_path / "theirs" / "manifest.json").unlink()
        torch.save(theirs.state_dict(), tmp_path / "theirs" / file)
    ours = df.load(tmp_path / "theirs")
    assert ours.config.vocab_size == (15 if case == "hybrid" else 16)
    with torch.no_grad():
        assert apart(ours(x)[0], theirs(x).logits) < 1e-5
    df.save(ours, tmp_path / "ours", layout="mamba_ssm")
    again = df.load(tmp_path / "ours")
    assert again.config == ours.config and same(again, ours)
    assert same(MambaLMHeadModel.from_pretrained(tmp_path / "ours"), theirs)


def test_the_same_model_in_two_libraries(tmp_path):
    model = df.load(GOLDEN / "lm_mamba2")
    df.save(model, tmp_path, layout="mamba_ssm")
    want = load_file(GOLDEN / "lm_mamba2.safetensors")
    with torch.no_grad():
        logits = MambaLMHeadModel.from_pretrained(tmp_path)(want["input_ids"]).logits
    assert apart(logits[..., :97], want["logits"]) < 1e-5


# --- what cannot be written ---


def lm(*parts: Any, **options: Any) -> df.LanguageModel:
    letters = dict(zip("ABC", ((part,) if not isinstance(part, tuple) else part for part in parts), strict=False))
    return df.LanguageModel(df.ModelConfig(**{"vocab_size": 7, "d_model": 8, "pattern": "".join(letters), **options},
                                           parts=letters))  # fmt: skip


MAMBA2 = Mamba2Config(d_state=3, d_head=4)


@pytest.mark.parametrize(
    ("model", "layout", "sentence"),
    [
        (lm(LSTMConfig(hidden=3)), "hf", "blocks of LSTM, which"),
        (lm(MambaConfig(), MAMBA2), "hf", "blocks of Mamba, Mamba2, which no family of transformers has"),
        (lm(MambaConfig(), pattern="AA", shared="A"), "hf", "'AA' with shared = 'A', which MambaForCausalLM"),
        (
            lm((MAMBA2, MLPConfig(), MLPConfig())),
            "hf",
            "block 0: Mamba2, MLP, MLP where it has Mamba2, MLP, which Bamba",
        ),
        (
            lm(dataclasses.replace(MAMBA2, norm_eps=0.1)),
            "hf",
            "block 0: Mamba2 with norm_eps = 0.1, which Mamba2",
        ),
        (
            lm(dataclasses.replace(MAMBA2, d_inner=12, dt_limit=(0.0, 5.0))),
            "hf",
            "d_inner = 12, no multiple of d_model = 8",
        ),
        (lm(MambaConfig(norm_maps=0.1)), "mamba_ssm", "a mixer with norm_maps = 0.1"),
        (lm(LSTMConfig(hidden=3)), "mamba_ssm", "neither one kind of Mamba nor attention"),
        (lm(MambaConfig(), norm_eps=1e-6), "mamba_ssm", "norm_eps of 1e-06, where its own is 1e-05"),
        (lm(MambaConfig(), embed_scale=2.0), "mamba_ssm", "embed_scale = 2.0"),
        (lm(MambaConfig(), logit_scale=0.5), "mamba_ssm", "logit_scale = 0.5"),
        (lm(MambaConfig(), logit_cap=5.0), "mamba_ssm", "logit_cap = 5.0"),
        (lm(MambaConfig(), norm="layer"), "mamba_ssm", "norm = 'layer'"),
        (lm(dataclasses.replace(MAMBA2, norm_eps=0.1)), "mamba_ssm", "a mixer with a norm_eps of 0.1"),
        (lm((MAMBA2, MLPConfig(d_hidden=13))), "mamba_ssm", "inner width 13, no multiple of 128"),
        (lm((MAMBA2, MLPConfig(d_hidden=128, activation="gelu"))), "mamba_ssm", "other than a mixer and a SwiGLU"),
        (lm(AttentionConfig(heads=2, gate=True)), "mamba_ssm", "attention with gate = True"),
        (lm(AttentionConfig(heads=2, rope=RotaryConfig())), "mamba_ssm", r"attention with rope = RotaryConfig\("),
        (lm(AttentionConfig(heads=2, window=3)), "mamba_ssm", "attention with a window of 3"),
    ],
)
def test_a_model_that_another_library_does_not_have(model, layout, sentence, tmp_path):
    with pytest.raises(ConfigError, match=sentence):
        df.save(model, tmp_path / "a", layout=layout)
    assert not (tmp_path / "a").exists()


WRITTEN_OUT = [  # options that say what would hold without them
    MambaConfig(d_state=2, dt_rank=1),
    MambaConfig(d_state=2, d_inner=16),
    MambaConfig(d_state=2, expand=3, d_inner=13),
    Mamba2Config(d_state=4, d_head=4, d_inner=16),
]


@pytest.mark.parametrize("layout", ["hf", "mamba_ssm"])
@pytest.mark.parametrize("part", WRITTEN_OUT, ids=str)
def test_an_option_may_say_what_holds_without_it(part, layout, tmp_path):
    model = df.LanguageModel(df.ModelConfig(16, 8, {"M": (part,)}, "MM"))
    df.save(model, tmp_path / "there", layout=layout)
    again = df.load(tmp_path / "there")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_layout_that_there_is_not(tmp_path):
    with pytest.raises(ArgumentError, match=r"layout is 'hff'\n.*did you mean 'hf'"):
        df.save(lm(MambaConfig()), tmp_path / "a", layout="hff")
    classifier = df.SequenceClassifier(lm(MambaConfig()).config, 2)
    with pytest.raises(ConfigError, match="SequenceClassifier as 'hf', which takes language models"):
        df.save(classifier, tmp_path / "a", layout="hf")
    assert not (tmp_path / "a").exists()


# --- options ---


def test_options_of_the_layers():
    assert lm(MambaConfig(d_inner=11)).blocks[0].parts[0].A().shape == (11, 16)
    two = lm(dataclasses.replace(MAMBA2, d_inner=12, norm_eps=0.25)).blocks[0].parts[0]
    assert (two.heads, two.norm.eps) == (3, 0.25)
    with pytest.raises(ConfigError, match="d_inner = 13 is not a multiple of d_head = 4"):
        lm(dataclasses.replace(MAMBA2, d_inner=13))
    bad = (MambaConfig(d_inner=0), MambaConfig(dt_rank=0), MambaConfig(norm_maps=0.0), MambaConfig(heads=3))
    for config in (*bad, dataclasses.replace(MAMBA2, norm_eps=math.inf)):
        with pytest.raises(
            ConfigError, match=r"(d_inner|dt_rank|norm_maps|norm_eps|heads) is (0|0.0|3|inf), expected a"
        ):
            lm(config)
