"""Other libraries that decode a model of the same sizes, with random weights too, where they are installed.

mamba-ssm and transformers generate greedily; what a step takes is the difference of two runs, so that neither the
prompt nor a captured graph counts. llama.cpp is asked of xllamacpp, which brings it compiled, in a process of its own;
it is given our own weights in a file of GGUF, and decodes one row on a CPU.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dualform.core.errors import ConfigError
from dualform.layers.quantized import quantized_within
from dualform.models.gguf.write import write_gguf
from dualform.models.lm import LanguageModel
from dualform.models.presets import preset
from dualform.models.quantized import INT8, quantize

Times = list[float]
Peer = Callable[[str, str, int, str], Times]
"""Milliseconds of a step, of a preset, a dtype, so many rows and a device; none where it cannot run that."""

PROMPT, TOKENS, REPEATS = 3, 32, 3
GROUP = 32  # neighbours in a row that share a scale, of 16 bits, in blocks of type Q8_0
LLAMA = """
import json, os, sys
import xllamacpp

path, threads, tokens, repeats = sys.argv[1], *map(int, sys.argv[2:])
given = xllamacpp.CommonParams()
given.model.path, given.n_ctx, given.n_parallel, given.n_gpu_layers = path, 512, 1, 0
given.cpuparams.n_threads = given.cpuparams_batch.n_threads = threads
given.verbosity, given.fit_params = 0, False
server, found = xllamacpp.Server(given), []
for _ in range(repeats):
    asked = {"prompt": [1, 2, 3], "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    found.append(server.handle_completions(asked)["timings"]["predicted_per_second"])
print(json.dumps([1e3 / speed for speed in found]), flush=True)
os._exit(0)
"""


def peers(names: list[str] | None) -> dict[str, Peer]:
    """Those that are asked for, or all for an empty list, and installed, with their versions; None is none."""
    found = {}
    for name, peer in (("mamba-ssm", mamba_ssm), ("transformers", transformers), ("xllamacpp", llama_cpp)):
        try:
            if names is not None and (not names or name in names):
                found[f"{name} {version(name)}"] = peer
        except PackageNotFoundError:
            continue
    return found


def mamba_ssm(name: str, dtype: str, rows: int, device: str) -> Times:
    """By its ``generate``, with a CUDA graph."""
    if dtype == INT8 or device != "cuda":
        return []
    from mamba_ssm.models.config_mamba import MambaConfig  # pyright: ignore[reportMissingImports]
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel  # pyright: ignore[reportMissingImports]

    config = preset(name)
    sizes = {"d_model": config.d_model, "n_layer": len(config.pattern), "vocab_size": config.vocab_size}
    layer = {"layer": "Mamba2" if name.startswith("mamba2") else "Mamba1"}
    model = MambaLMHeadModel(MambaConfig(**sizes, ssm_cfg=layer), device=device, dtype=getattr(torch, dtype)).eval()
    ids = torch.ones(rows, PROMPT, dtype=torch.int64, device=device)
    return of_a_step(lambda count: model.generate(ids, max_length=PROMPT + count, top_k=1, cg=True), device)


def transformers(name: str, dtype: str, rows: int, device: str) -> Times:
    """By its ``generate``."""
    if dtype == INT8:
        return []
    from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

    config = preset(name)
    sizes: dict[str, Any] = {"hidden_size": config.d_model, "num_hidden_layers": len(config.pattern)}
    sizes |= {"vocab_size": config.vocab_size, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    if name.startswith("mamba2"):
        sizes |= {"num_heads": config.d_model // 32, "head_dim": 64, "state_size": 128, "n_groups": 1}
        model: Any = Mamba2ForCausalLM(Mamba2Config(**sizes))
    else:
        model = MambaForCausalLM(MambaConfig(**sizes))
    model = model.to(device, getattr(torch, dtype)).eval()
    ids = torch.ones(rows, PROMPT, dtype=torch.int64, device=device)

    def run(count: int) -> None:
        model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)

    return of_a_step(run, device)


def of_a_step(run: Callable[[int], Any], device: str) -> Times:
    """Milliseconds of one of so many steps."""

    def took(count: int) -> float:
        begin = time.perf_counter()
        run(count)
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) * 1e3

    took(2 + TOKENS)
    return [(took(2 + TOKENS) - took(2)) / TOKENS for _ in range(REPEATS)]


def llama_cpp(name: str, dtype: str, rows: int, device: str) -> Times:
    """One row by llama.cpp, on as many threads as PyTorch has."""
    if rows > 1 or device != "cpu":
        return []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.gguf"
        try:
            write(name, dtype, path)
        except ConfigError:  # a model that llama.cpp does not have
            return []
        asked: list[Any] = [sys.executable, "-c", LLAMA, path, torch.get_num_threads(), TOKENS, REPEATS]
        done = subprocess.run(list(map(str, asked)), capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def write(name: str, dtype: str, path: Path) -> None:
    """A preset with random weights as a file of GGUF, in blocks of 8 bits for ``int8``."""
    model = LanguageModel(preset(name)).eval()
    if dtype == INT8:
        model = quantize(model, group=GROUP)
        for part in quantized_within(model).values():
            part.scales.copy_(part.scales.half())
    else:
        model = model.to(getattr(torch, dtype))
    write_gguf(model, path, vocabulary(model.config.vocab_size), [], name)


def vocabulary(size: int) -> str:
    """A ``tokenizer.json`` of the bytes and of words that no text has."""
    from tokenizers.pre_tokenizers import ByteLevel

    words = *sorted(ByteLevel.alphabet()), *(f"word{i}" for i in range(256, size))
    vocab = {word: i for i, word in enumerate(words)}
    whole = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": False}
    parts = {"normalizer": None, "pre_tokenizer": whole, "post_processor": None, "decoder": whole}
    return json.dumps({"version": "1.0", "added_tokens": [], **parts, "model": model})
