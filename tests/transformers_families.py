"""The state space models of transformers, tiny and random, with ``dualform.compat`` and without: are they the same?

    pip install transformers
    python tests/transformers_families.py               # every family
    python tests/transformers_families.py bamba jamba

Without it transformers takes its slow path, in plain PyTorch. Compared are the loss, logits, all gradients, evaluation
with a padded row, and greedily generated tokens, in float32 on a CPU, and the seconds of a training step. Bamba also
runs packed with ``seq_idx``, against its sequences alone. falcon_mamba differs in training, in mamba-ssm as well: the
fused layer does not normalise dt, B and C, as its slow path does. So do mamba2, bamba and granitemoehybrid of
transformers before 5.23 with several groups: their slow path takes the gated norm over all groups at once.
"""

import argparse
import subprocess
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

COMMON = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
HEADS = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_chunk_size": 4,
}  # fmt: skip
TIMED = (2, 128)  # tokens of the training steps that are timed, of which the least counts
FAMILIES: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 8, "time_step_rank": 4},
    "falcon_mamba": {"state_size": 8, "time_step_rank": 4},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4, "expand": 2},
    "jamba": {
        **ATTENTION, "num_experts": 2, "num_experts_per_tok": 1, "mamba_d_state": 8, "mamba_dt_rank": 4,
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "bamba": {**ATTENTION, **HEADS, "attn_layer_indices": [1]},
    "zamba": {
        **ATTENTION, "attention_hidden_size": 64, "attention_head_dim": 16, "mamba_d_state": 8, "mamba_dt_rank": 4,
        "n_mamba_heads": 2, "num_hidden_layers": 5, "hybrid_layer_ids": [2], "attn_layer_period": 3,
        "attn_layer_offset": 2, "use_mamba_kernels": False,
    },
    "zamba2": {
        **ATTENTION, "num_key_value_heads": 4, "mamba_d_state": 8, "mamba_headdim": 8, "n_mamba_heads": 8,
        "mamba_ngroups": 2, "chunk_size": 4, "num_mem_blocks": 1, "num_hidden_layers": 4, "hybrid_layer_ids": [2],
        "layers_block_type": ["mamba", "mamba", "hybrid", "mamba"],
    },
    "falcon_h1": {**ATTENTION, **HEADS, "mamba_d_ssm": 48, "mamba_n_heads": 6},
    "granitemoehybrid": {
        **ATTENTION, **HEADS, "layer_types": ["mamba", "attention"], "num_local_experts": 2, "num_experts_per_tok": 1,
        "shared_intermediate_size": 16,
    },
    "nemotron_h": {
        **ATTENTION, "hybrid_override_pattern": "M*", "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2,
        "ssm_state_size": 8, "chunk_size": 4, "head_dim": 8,
    },
    "lfm2": {
        **ATTENTION, "layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "block_multiple_of": 8,
    },
    "qwen3_next": {
        **ATTENTION, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 2,
        "num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "head_dim": 8,
        "decoder_sparse_step": 1,
    },
}  # fmt: skip


def tiny(family: str) -> Any:
    """A random model, the same one every time."""
    import transformers

    transformers.logging.set_verbosity_error()
    config = transformers.AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family]})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2:
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def step(model: Any, ids: Tensor) -> tuple[Any, float]:
    """What a training step gives, and its seconds."""
    model.zero_grad()
    start = time.perf_counter()
    out = model(ids, labels=ids, use_cache=False)
    out.loss.backward()
    return out, time.perf_counter() - start


def results(family: str) -> dict[str, Any]:
    """Everything that is compared, and the seconds of a training step."""
    model = tiny(family)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 97, (2, 13), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    model.train()
    seconds = min(step(model, torch.randint(3, 97, TIMED, generator=generator))[1] for _ in range(8))
    out = step(model, ids)[0]
    found = {
        "seconds": seconds,
        "loss": out.loss.detach()[None],
        "logits": out.logits.detach(),
        **{f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None},
    }
    model.eval()
    with torch.no_grad():
        found["evaluation"] = model(ids, use_cache=False).logits
        found["masked"] = model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        options = {"do_sample": False, "pad_token_id": 0}
        found["generated"] = [
            model.generate(ids, max_new_tokens=8, **options),
            model.generate(ids, attention_mask=mask, max_new_tokens=6, **options),
        ]
    return found


def packed() -> float:
    """How far packed training of Bamba with ``seq_idx`` is from its sequences alone."""
    model = tiny("bamba").train()
    lengths, generator = (5, 1, 7), torch.Generator().manual_seed(2)
    ids = torch.randint(3, 97, (1, sum(lengths)), generator=generator)
    seq_idx = torch.cat([torch.full((n,), i, dtype=torch.int32) for i, n in enumerate(lengths)])[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    borders = torch.tensor([0, *lengths]).cumsum(0).int()
    options = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": 7, "max_length_k": 7}
    same = seq_idx[0, :, None] == seq_idx[0, None, :]
    causal = same & torch.ones(13, 13, dtype=torch.bool).tril()
    mask = torch.zeros(1, 1, 13, 13).masked_fill(~causal, torch.finfo(torch.float32).min)
    got = model(ids, attention_mask=mask, seq_idx=seq_idx, position_ids=positions, use_cache=False, **options).logits
    want = torch.cat([model(part, use_cache=False).logits for part in ids.split(lengths, 1)], 1)
    return apart(got, want)


def apart(got: Tensor, want: Tensor) -> float:
    """The greatest difference, of the greatest value."""
    return float((got - want).detach().abs().max() / want.detach().abs().max().clamp(min=1e-30))


def compared(family: str, got: dict[str, Any], want: dict[str, Any]) -> str:
    """A line of the table."""
    names = [name for name in want if name.startswith("gradient of ")]
    alone = got.pop("packed", None)
    missing = set(got) ^ set(want)
    steep = [name for name in names if float(want[name].abs().max()) > 1e-9]
    worst = max(steep, key=lambda name: apart(got[name], want[name]))
    figures = [apart(got[name], want[name]) for name in ("loss", "logits", "evaluation", "masked", worst)]
    same = all(torch.equal(a, b) for a, b in zip(got["generated"], want["generated"], strict=True))
    line = f"{family:17}" + "".join(f"{x:10.1e}" for x in figures) + f"{'same' if same else 'DIFFER':>10}"
    line += f"{want['seconds']:9.3f}{got['seconds']:8.3f}  {worst.removeprefix('gradient of ')}"
    line += "" if alone is None else f"; packed with seq_idx {alone:.1e}"
    return line + (f"  only on one path: {', '.join(sorted(missing))}" if missing else "")


def main() -> int:
    """Run what was asked for, each family in processes of its own, and print a table."""
    parser = argparse.ArgumentParser(description="The state space models of transformers on dualform.compat.")
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(FAMILIES)}; all by default")
    parser.add_argument("--inside", help=argparse.SUPPRESS)  # "slow" or "ours", and where results go
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.families) - set(FAMILIES):
        parser.error(f"no family {', '.join(sorted(unknown))}; there are {', '.join(FAMILIES)}")
    if options.inside:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        if options.inside == "ours":
            import dualform.compat

            dualform.compat.install(force=True)
        found = results(options.families[0])
        if options.inside == "ours" and options.families[0] == "bamba":
            found["packed"] = packed()
        torch.save(found, options.out)
        return 0
    print(f"transformers {version('transformers')}, torch {torch.__version__}; relative differences, seconds of a step")
    print(
        f"{'':17}{'loss':>10}{'logits':>10}{'eval':>10}{'masked':>10}{'gradient':>10}{'tokens':>10}"
        "     slow    ours  worst gradient"
    )
    failed = 0
    for family in options.families or FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            found = {}
            for how in ("slow", "ours"):
                out = Path(folder) / how
                command = [sys.executable, __file__, "--inside", how, "--out", str(out), family]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    failed += 1
                    print(f"{family:17} {how} failed: {done.stderr.strip().splitlines()[-1]}", flush=True)
                    break
                found[how] = torch.load(out)
            else:
                print(compared(family, found["ours"], found["slow"]), flush=True)
    return min(1, failed)


if __name__ == "__main__":
    sys.exit(main())
