"""A training step of a language model on a GPU, without its optimiser: forward and backward in bfloat16 autocast.

    python benchmarks/training_step.py [--preset mamba-130m] [--batch 8] [--length 2048] [--out results.json]

As the training loop runs it (blocks compiled, captured in CUDA graphs), and as written.
"""

import argparse
from pathlib import Path

import torch
from harness import report
from torch import Tensor
from triton.testing import do_bench

from dualform.models.lm import LanguageModel
from dualform.models.presets import preset
from dualform.train.capture import capture
from dualform.train.loop import Objective


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="mamba-130m")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    model = LanguageModel(preset(options.preset)).cuda()
    objective = Objective(model)
    windows = torch.randint(0, 256, (options.batch, options.length + 1), device="cuda")

    def step(run) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            loss = run(windows)
        loss.backward()
        return loss

    rows = []
    for name in ("as written", "captured"):
        run = objective
        torch.cuda.reset_peak_memory_stats()
        if name == "captured":
            run, captured = capture(objective, model, windows, True)
            name += "" if captured else ": failed"
        grads = list(model.parameters())
        milliseconds = do_bench(
            lambda run=run: step(run), warmup=300, rep=1500, grad_to_none=grads, return_mode="median"
        )
        tokens = options.batch * options.length / milliseconds
        peak = torch.cuda.max_memory_allocated() / 1e9
        rows.append({"case": name, "step ms": milliseconds, "thousand tokens/s": tokens, "peak GB": peak})
    report(f"{options.preset}, forward + backward of {options.batch} x {options.length} tokens", rows, options.out)


if __name__ == "__main__":
    main()
