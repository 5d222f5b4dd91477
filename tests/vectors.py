"""Golden vectors from the original implementations, and how close a result must be to them."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"


def load(name: str) -> dict[str, Tensor]:
    """The tensors of one case."""
    return load_file(FOLDER / f"{name}.safetensors")


def names(prefix: str) -> list[str]:
    """The cases whose name starts with ``prefix``."""
    found = sorted(p.stem for p in FOLDER.glob(f"{prefix}*.safetensors"))
    assert found, f"no golden case {prefix}*"
    return found


def close(got: Tensor, want: Tensor, tolerance: float, what: str = "") -> None:
    """Assert ``max |got - want| <= tolerance * max |want|``; NaN never passes."""
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    wide = torch.promote_types(torch.promote_types(got.dtype, want.dtype), torch.float64)
    got, want = got.detach().to(wide), want.detach().to(wide)
    error, scale = (got - want).abs().max().item(), want.abs().max().item()
    assert error <= tolerance * scale, f"{what}: error {error:.3g} against {scale:.3g}, allowed {tolerance:g} of it"
