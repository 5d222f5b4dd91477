"""A training step of a language model without its optimiser: forward, loss and backward.

    python benchmarks/training_step.py [--preset mamba-130m] [--batch 8] [--length 2048] [--out results.json]

On a GPU in bfloat16 autocast: as the training loop runs it (blocks compiled, captured in CUDA graphs), and as written.
On a CPU in float32, 1 x 512, beside mambapy's layers of the same size where those are installed (20 s a step).
"""

import argparse
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import interleaved, report, row
from torch import Tensor, nn

from dualform.models.lm import LanguageModel
from dualform.models.presets import preset
from dualform.train.capture import capture
from dualform.train.objective import Objective


def on_gpu(objective: Objective, windows: Tensor) -> list[dict[str, Any]]:
    """Medians as written and captured, and the memory that both take."""
    from triton.testing import do_bench

    def step(run: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            loss = run(windows)
        loss.backward()
        return loss

    rows = []
    for name in ("as written", "captured"):
        run = objective
        torch.cuda.reset_peak_memory_stats()
        if name == "captured":
            run, captured = capture(objective, objective.model, windows, True)
            name += "" if captured else ": failed"
        grads = list(objective.parameters())
        milliseconds = do_bench(
            lambda run=run: step(run), warmup=300, rep=1500, grad_to_none=grads, return_mode="median"
        )
        peak = torch.cuda.max_memory_allocated() / 1e9
        tokens = windows[:, 1:].numel() / milliseconds
        rows.append({"case": name, "step ms": milliseconds, "thousand tokens/s": tokens, "peak GB": peak})
    return rows


def on_cpu(objective: Objective, windows: Tensor) -> list[dict[str, Any]]:
    """Medians of this library and of mambapy, a step of each in turn."""

    def step(run: nn.Module) -> None:
        run.zero_grad(set_to_none=True)
        run(windows).backward()

    models = {"dualform": objective, **mambapy(objective.model)}
    times = interleaved({name: lambda run=run: step(run) for name, run in models.items()}, repeats=3)
    return [row(name, found) for name, found in times.items()]


def mambapy(model: Any) -> dict[str, nn.Module]:
    """Its layers of the same size between an embedding and a tied head, where it is installed.

    Its own language model cannot be imported without mamba-ssm.
    """
    try:
        name = f"mambapy {version('mambapy')}"
    except PackageNotFoundError:
        return {}
    from mambapy.mamba import Mamba, MambaConfig

    class Loss(nn.Module):
        def __init__(self, vocab: int, width: int, layers: int):
            super().__init__()
            self.embedding = nn.Embedding(vocab, width)
            self.layers, self.norm = Mamba(MambaConfig(d_model=width, n_layers=layers)), nn.RMSNorm(width)

        def forward(self, windows: Tensor) -> Tensor:
            x = self.norm(self.layers(self.embedding(windows[:, :-1])))
            return F.cross_entropy(F.linear(x, self.embedding.weight).flatten(0, 1), windows[:, 1:].flatten())

    config = model.config
    return {name: Loss(config.vocab_size, config.d_model, len(config.pattern))}


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--preset", default="mamba-130m")
    parser.add_argument("--batch", type=int, help="8 on a GPU, 1 on a CPU")
    parser.add_argument("--length", type=int, help="2048 on a GPU, 512 on a CPU")
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args()
    gpu = options.device == "cuda"
    batch, length = options.batch or (8 if gpu else 1), options.length or (2048 if gpu else 512)
    if gpu:
        torch.set_float32_matmul_precision("high")
    objective = Objective(LanguageModel(preset(options.preset)).to(options.device))
    windows = torch.randint(0, 256, (batch, length + 1), device=options.device)
    rows = (on_gpu if gpu else on_cpu)(objective, windows)
    report(f"{options.preset}, forward + backward of {batch} x {length} tokens", rows, options.out)


if __name__ == "__main__":
    main()
