"""The map of an S4D layer on a CPU in float32, beside its textbook form: a kernel from all exponentials, then an FFT.

    python benchmarks/structured.py [--repeats 5] [--threads 2] [--out results.json]

The map is the layer without its output map, ``2 Re(C h) + D u``; forward + backward gives the gradients of the input
and of all parameters. Memory is what the peak of a process of its own rises by, parameters and input not counted;
it is read from /proc, and left out where there is none. Factors compare the least times of this run.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from harness import interleaved, report, row
from torch import Tensor

from dualform.layers.s4d import S4D, S4DConfig

WIDTH, STATES, LENGTH, LONG = 256, 64, 16384, 131072


class Map(S4D):
    """An S4D without its output map."""

    def _out(self, s: Tensor, x: Tensor) -> Tensor:
        return s


def textbook(layer: Map, u: Tensor) -> Tensor:
    """``K_l = 2 Re sum_n C_n Bbar_n exp(l dt A_n)`` with all ``D N T`` exponentials, then a convolution by FFT."""
    length, A, C = u.shape[1], torch.complex(-layer.log_A_re.exp(), layer.A_im), torch.view_as_complex(layer.C)
    z = layer.log_dt.exp()[:, None] * A
    powers = torch.exp(z[..., None] * torch.arange(length))
    kernel = 2 * torch.einsum("dn,dnl->dl", C * (torch.exp(z) - 1) / A, powers).real
    spectrum = torch.fft.rfft(u, 2 * length, dim=1) * torch.fft.rfft(kernel, 2 * length).T
    return torch.fft.irfft(spectrum, 2 * length, dim=1)[:, :length] + layer.D * u


MAPS: dict[str, Callable[[Map, Tensor], Tensor]] = {"textbook": textbook, "dualform": lambda layer, u: layer(u)[0]}
PASSES = ("forward", "forward + backward")


def case(name: str, passes: str, length: int) -> Callable[[], None]:
    """One pass over a random sequence."""
    torch.manual_seed(0)
    layer, u = Map(S4DConfig(d_state=STATES), WIDTH), torch.randn(1, length, WIDTH)
    wanted = [u.requires_grad_(), *(p for name, p in layer.named_parameters() if not name.startswith("out_proj"))]
    weight, run = torch.randn(1, length, WIDTH), MAPS[name]

    def forward() -> None:
        with torch.no_grad():
            run(layer, u)

    def both() -> None:
        torch.autograd.grad(run(layer, u), wanted, weight)

    return forward if passes == "forward" else both


def resident(field: str) -> float:
    """A field of this process's status in MiB, such as its peak VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def worker(name: str, passes: str, length: int) -> None:
    """Print by how much the peak of this process rises."""
    case(name, passes, 64)()
    run = case(name, passes, length)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again, at what is resident now
    before = resident("VmRSS")
    run()
    print(resident("VmHWM") - before)


def peak(name: str, passes: str, length: int, threads: int) -> float:
    """MiB, from a process of its own; NaN where that cannot be measured."""
    if not Path("/proc/self/clear_refs").exists():
        return float("nan")
    command = [sys.executable, __file__, "--threads", str(threads), "--worker", name, passes, str(length)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Check that both are one function, run every case in turn, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.worker:
        name, passes, length = options.worker
        return worker(name, passes, int(length))
    layer, u = Map(S4DConfig(d_state=STATES), WIDTH), torch.randn(1, 1000, WIDTH)
    torch.testing.assert_close(layer(u)[0], textbook(layer, u), rtol=1e-3, atol=1e-3)

    sizes = {"textbook": (LENGTH,), "dualform": (LENGTH, LONG)}
    keys = [(name, passes, length) for passes in PASSES for name in MAPS for length in sizes[name]]
    names = {key: f"{key[0]}, T {key[2]}, {key[1]}" for key in keys}
    times = interleaved({names[key]: case(*key) for key in keys}, repeats=options.repeats)
    rows, peaks = [], {key: peak(*key, options.threads) for key in keys}
    for key in keys:
        name, passes, length = key
        least, base, short = (min(times[names[k]]) for k in (key, ("textbook", passes, LENGTH), (name, passes, LENGTH)))
        memory, alike = peaks[("textbook", passes, LENGTH)] / peaks[key], 1.0 if length == LENGTH else float("nan")
        more = {"peak MiB": peaks[key], "times faster": alike * base / least, "times less memory": alike * memory}
        rows.append(row(names[key], times[names[key]], **more, **{f"times T {LENGTH}": least / short}))
    report(f"the map of S4D, (1, T, {WIDTH}), N {STATES}, CPU, float32", rows, options.out)
    return None


if __name__ == "__main__":
    main()
