"""Memory of a long prompt: a state space model reads 200,000 bytes in the memory that 100 bytes take.

    python benchmarks/memory.py [preset ...]

Each prompt runs in a process of its own; peak is its greatest resident memory, with Python, torch and the weights.
byte-hybrid has attention with a window, and is constant, too; attention without one would grow.
"""

import platform
import subprocess
import sys

PRESETS = ("byte-mamba2", "byte-mamba", "byte-s4d", "byte-lstm", "byte-hybrid")
LENGTHS = (100, 200_000)

WORKER = """
import resource, sys, time
import torch, dualform
from dualform.core.tree import leaves
name, length = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
model = dualform.LanguageModel(dualform.preset(name))
start = time.perf_counter()
generation = dualform.generate(model, bytes(i * 7919 % 251 for i in range(length)), 1)
list(generation)
seconds = time.perf_counter() - start
state = sum(leaf.numel() * leaf.element_size() for leaf in leaves(generation.state))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, state, seconds)
"""


def measure(name: str, length: int) -> tuple[int, int, float]:
    """Peak resident memory (KiB on Linux, bytes on macOS), bytes of the state, seconds."""
    out = subprocess.run([sys.executable, "-c", WORKER, name, str(length)], capture_output=True, text=True, check=True)
    peak, state, seconds = out.stdout.split()
    return int(peak), int(state), float(seconds)


def main() -> None:
    """Print one line per preset."""
    kib = 1024 if sys.platform == "darwin" else 1
    print(f"{platform.processor() or platform.machine()}, {platform.system()}, prompts of {LENGTHS} bytes")
    print(f"{'preset':18} {'state bytes':>24} {'peak MiB':>16} {'growth':>8} {'bytes/s':>9}")
    for name in sys.argv[1:] or PRESETS:
        (peak, state, _), (long_peak, long_state, seconds) = (measure(name, length) for length in LENGTHS)
        states, peaks = f"{state:,} {long_state:,}", f"{peak / kib / 1024:.0f} {long_peak / kib / 1024:.0f}"
        rate = LENGTHS[1] / seconds
        print(f"{name:18} {states:>24} {peaks:>16} {long_peak / peak - 1:8.1%} {rate:9,.0f}", flush=True)


if __name__ == "__main__":
    main()
