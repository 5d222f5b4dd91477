"""llama.cpp beside ours: a model is written to a file of GGUF, and one row is decoded in a process of its own.

It is asked of xllamacpp, which brings llama.cpp compiled (``pip install xllamacpp``); without it there is no peer.
"""

import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from dualform.layers.quantized import quantized_within
from dualform.models.gguf.write import write_gguf
from dualform.models.lm import LanguageModel
from dualform.models.presets import preset
from dualform.models.quantized import INT8, quantize

GROUP = 32  # neighbours in a row that share a scale, of 16 bits, in blocks of type Q8_0
CHILD = """
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
print(json.dumps(found), flush=True)
os._exit(0)
"""


def vocabulary(size: int) -> str:
    """A ``tokenizer.json`` of the bytes and of words that no text has."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]
    vocab = {word: i for i, word in enumerate((*letters, *(f"word{i}" for i in range(256, size))))}
    whole = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": False}
    parts = {"normalizer": None, "pre_tokenizer": whole, "post_processor": None, "decoder": whole}
    return json.dumps({"version": "1.0", "added_tokens": [], **parts, "model": model})


def written(name: str, dtype: str, path: Path) -> None:
    """The preset with random weights, in blocks of 8 bits for ``int8``."""
    model = LanguageModel(preset(name)).eval()
    if dtype == INT8:
        model = quantize(model, group=GROUP)
        for part in quantized_within(model).values():
            part.scales.copy_(part.scales.half())
    else:
        model = model.to(getattr(torch, dtype))
    write_gguf(model, path, vocabulary(model.config.vocab_size), [], name)


def tokens_per_second(name: str, dtype: str, threads: int, tokens: int = 32, repeats: int = 3) -> list[float]:
    """Of one row; empty without xllamacpp, and for a model that llama.cpp does not have."""
    if find_spec("xllamacpp") is None or dtype not in ("float32", "bfloat16", "float16", INT8):
        return []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.gguf"
        written(name, dtype, path)
        asked: list[Any] = [sys.executable, "-c", CHILD, path, threads, tokens, repeats]
        done = subprocess.run(list(map(str, asked)), capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])
