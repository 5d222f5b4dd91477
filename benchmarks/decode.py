"""Tokens per second against the rows that are decoded together, beside what the memory allows, and the first token.

    python benchmarks/decode.py [mamba-130m mamba2-130m] [--dtypes float32 int8] [--rows 1 16] [--device cuda]

Weights are random, tokens are drawn greedily. With int8 the matrices have 8 bits, as of ``dualform.quantize``, and all
else is float32. The floor is bytes over bandwidth: a step reads the weights once, and
reads and writes the states of its rows. The bandwidth is that of the sum of half a gigabyte by all threads. Every
repetition times every case of a model once, the sum among them, so that other programs disturb all of them alike; where
they do, the best of each is nearer to the truth than the median. With ``--prompt`` the time to the first token after so
many is printed, too. ``--peers`` decodes the same by mamba-ssm, transformers and llama.cpp, where these are installed,
and ``--plot FILE`` draws tokens per second against the rows.
"""

import argparse
import statistics
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from decode_peers import peers
from harness import interleaved, report

from dualform.generation.decoder import Decoder
from dualform.generation.options import Sampling
from dualform.generation.session import WINDOW
from dualform.models.lm import LanguageModel
from dualform.models.presets import preset
from dualform.models.quantized import INT8, quantize

READ = 2**27  # numbers of the sum
MEMORY = "memory"


def reader(device: str) -> Callable[[], None]:
    """Reads memory once."""
    x = torch.ones(READ, device=device)

    def run() -> None:
        x.sum()
        waited(device)

    return run


def waited(device: str) -> None:
    """Return when the device has done its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def built(name: str, dtype: str, device: str) -> LanguageModel:
    """A model of random weights, with matrices of 8 bits for ``int8``."""
    model = LanguageModel(preset(name)).to(device).eval()
    return quantize(model) if dtype == INT8 else model.to(getattr(torch, dtype))


def decoding(
    model: LanguageModel, rows: int, tokens: int, device: str, state_dtype: torch.dtype | None = None
) -> tuple[Callable[[], None], int]:
    """A run of so many steps, and the bytes of a state."""
    decoder, greedy = Decoder(model, rows, state_dtype=state_dtype), Sampling(temperature=0.0)
    logits, history = torch.zeros(1, model.config.vocab_size, device=device), torch.full((1, WINDOW), -1)
    for row in range(rows):
        decoder.put(row, model.init_state(1), logits, history, greedy, 0, 0)
    bytes_of_state = decoder.nbytes

    def run() -> None:
        for _ in range(tokens):
            decoder.next()
        waited(device)

    return run, bytes_of_state


def reading(model: LanguageModel, prompt: int, device: str) -> Callable[[], None]:
    """From a prompt to the first token."""
    tokens = torch.randint(model.config.vocab_size, (1, prompt)).to(device)

    def run() -> None:
        h, _ = model.features(tokens)
        model.logits(h[:, -1]).argmax(-1)
        waited(device)

    return run


@torch.inference_mode()
def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["mamba-130m", "mamba2-130m"], help="presets")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16", "int8"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--state-dtype", nargs="+", default=["as it is"], help="such as bfloat16, of states of float32")
    parser.add_argument("--prompt", nargs="*", type=int, default=[], help="lengths")
    parser.add_argument("--tokens", type=int, default=10, help="in one timing")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--peers", nargs="*", metavar="NAME", help="other libraries; all that are installed by default")
    parser.add_argument("--plot", type=Path, help="a picture")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    lines, read, others = [], reader(options.device), peers(options.peers)
    for name in options.models:
        for dtype in options.dtypes:
            model = built(name, dtype, options.device)
            weights = sum(m.nbytes for m in (*model.parameters(), *model.buffers()))
            cases, moved = {MEMORY: read}, {}
            for rows, held in product(options.rows, options.state_dtype):
                title = titled(name, dtype, rows)
                title, kind = (f"{title}, states {held}", getattr(torch, held)) if "float" in held else (title, None)
                cases[title], state = decoding(model, rows, options.tokens, options.device, kind)
                moved[title] = rows, weights + 2 * state
            for prompt in options.prompt:
                cases[f"{name}, {dtype}, first token after {prompt}"] = reading(model, prompt, options.device)
            found = interleaved(cases, repeats=options.repeats)
            speed = 4 * READ / min(found.pop(MEMORY)) * 1e3
            for title, times in found.items():
                lines.append(line(title, times, options.tokens, speed, *moved.get(title, (1, 0))))
            for rows, (label, peer) in product(options.rows, others.items()):
                if times := peer(name, dtype, rows, options.device):
                    title = titled(name, dtype, rows)
                    size = moved.get(title, (rows, weights))  # of the states at hand, where they were run as they are
                    lines.append(line(f"{title}, {label}", times, 1, speed, *size))
    report("decoding, best of the repetitions", lines, options.out)
    if options.plot is not None:
        draw(lines, options.plot)


def titled(name: str, dtype: str, rows: int) -> str:
    """What the table calls a case."""
    return f"{name}, {dtype}, {rows} row" + "s" * (rows > 1)


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Tokens per second against the rows that are decoded together, and what memory allows, of every model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found: dict[str, list[tuple[int, float, float]]] = {}
    for one in lines:
        name, dtype, rows, *rest = one["case"].split(", ")
        if " row" in rows:
            kind = ", ".join((name, dtype, *rest))
            found.setdefault(kind, []).append((int(rows.split()[0]), one["tokens/s"], one["floor"]))
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    for kind, points in found.items():
        rows, speeds, floors = zip(*sorted(points), strict=True)
        (drawn,) = axes.loglog(rows, speeds, marker="o", label=kind)
        if len(kind.split(", ")) == 2:  # one of ours, as it is
            axes.loglog(rows, floors, color=drawn.get_color(), linestyle=":", marker="_")
    axes.set(xlabel="rows decoded together", ylabel="tokens per second, all rows", title="dotted: what memory allows")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def line(title: str, times: list[float], tokens: int, speed: float, rows: int, moved: int) -> dict[str, Any]:
    """A row of the table; milliseconds alone where nothing is decoded."""
    per = [t / (tokens if moved else 1) for t in times]
    nan = float("nan")
    best, median = (rows * 1e3 / t if moved else nan for t in (min(per), statistics.median(per)))
    floor = rows * speed / moved if moved else nan
    return {
        "case": title,
        "ms": min(per),
        "tokens/s": best,
        "median": median,
        "MB": moved / 1e6,
        "GB/s read": speed / 1e9,
        "floor": floor,
        "% of floor": 100 * best / floor,
    }


if __name__ == "__main__":
    main()
