"""What the benchmarks of recurrences on a GPU share: times of a call, and its errors against the float64 reference."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import on_gpu, report
from torch import Tensor

from dualform.ops import backend

Run = Callable[..., Tensor]


class Scan(NamedTuple):
    """A recurrence to be timed, in bfloat16.

    Attributes:
        title: of a table, in front of the shape.
        sizes: behind it, such as ``x 64, N 128``.
        inputs: batch, length and heads -> the tensors of a call, which require gradients.
        run: what a call computes by the backend at hand, y alone.
        like: the place of the input that y has the shape of.
        errors: gradients whose errors are shown, with the places of their inputs.
        short: batch, length and heads for the errors.
    """

    title: str
    sizes: str
    inputs: Callable[[int, int, int], list[Tensor]]
    run: Run
    like: int
    errors: Mapping[str, int]
    short: tuple[int, int, int] = (2, 1000, 4)

    def ours(self) -> dict[str, tuple[Run, bool]]:
        """The backends of this library, and whether a CUDA graph can hold a call."""

        def forced(name: str) -> Run:
            def run(*given: Tensor) -> Tensor:
                with backend(name):
                    return self.run(*given)

            return run

        return {"dualform triton": (forced("triton"), True), "dualform torch": (forced("torch"), False)}

    def results(self, run: Run, given: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
        """The outputs, and the gradients whose errors are shown."""
        leaves = [m.detach().to(dtype or m.dtype).requires_grad_() for m in given]
        y = run(*leaves)
        generator = torch.Generator("cuda").manual_seed(1)
        weights = torch.randn(y.shape, device="cuda", generator=generator).bfloat16().to(y.dtype)
        return [y.detach(), *torch.autograd.grad(y, [leaves[i] for i in self.errors.values()], weights)]

    def measure(self, name: str, run: Run, captured: bool, given: list[Tensor]) -> dict[str, Any]:
        """One row: times, and errors on a shorter sequence."""
        dy = torch.randn_like(given[self.like])

        def forward() -> Tensor:
            with torch.no_grad():
                return run(*given)

        both = on_gpu(lambda: torch.autograd.grad(run(*given), given, dy), captured=captured)
        row = {"case": name, "forward ms": on_gpu(forward, captured=captured), "forward + backward ms": both}
        torch.manual_seed(0)
        short = self.inputs(*self.short)
        with backend("reference"):
            exact = self.results(self.run, short, torch.float64)
        for what, got, want in zip(("y", *self.errors), self.results(run, short), exact, strict=True):
            row[f"error of {what}"] = f"{float((got.double() - want).norm() / want.norm()):.1e}"
        return row

    def main(self, about: str | None, peers: Mapping[str, tuple[Run, bool]], shapes: tuple[str, ...]) -> None:
        """Print one table per shape.

        Args:
            about: the text of ``--help``.
            peers: implementations of others by their names, and whether a CUDA graph can hold a call.
            shapes: ``B,T,H``, where none is given.
        """
        parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--shape", action="append", metavar="B,T,H", help="may be given again")
        parser.add_argument("--out", type=Path, help="a JSON file per shape, in this folder")
        options = parser.parse_args()
        for shape in options.shape or shapes:
            torch.manual_seed(0)
            given = self.inputs(*(int(size) for size in shape.split(",")))
            rows = [self.measure(name, *case, given) for name, case in {**self.ours(), **peers}.items()]
            title = f"{self.title} ({shape} {self.sizes}), bfloat16"
            report(title, rows, options.out and options.out / f"{shape}.json")
