"""What vision forks add to Mamba: further directions in which a layer reads its sequence, over ordinary passes.

"v1" scans from both ends with one convolution and one set of maps, and rates ``A_b_log`` for the way back. "v2" has a
convolution and maps of its own for the way back (suffix ``_b``). "v3" adds a third pass (suffix ``_s``) over the
sequence with its slices interleaved: first of each slice, second of each slice, and so on.

References:
    Zhu et al. (2024), arXiv:2401.09417 (Vision Mamba); Xing et al. (2024), arXiv:2401.13560 (SegMamba).
"""

from typing import Any

import torch
from torch import Tensor, nn

from dualform.compat.inner import bimamba_inner_fn, mamba_inner_fn_no_out_proj
from dualform.core.errors import ArgumentError
from dualform.core.shapes import wide

_DIRECTIONS = {"v1": (), "v2": ("_b",), "v3": ("_b", "_s")}


def kind(bimamba_type: str | None, bimamba: bool) -> str | None:
    """The version that two options ask for; None for a plain Mamba.

    Raises:
        ArgumentError: for an unknown one.
    """
    chosen = "v2" if bimamba and bimamba_type in (None, "none") else bimamba_type
    if chosen in (None, "none"):
        return None
    if chosen not in _DIRECTIONS:
        raise ArgumentError(f"Mamba: bimamba_type is {chosen!r}, expected 'none', {', '.join(map(repr, _DIRECTIONS))}")
    return chosen


def depthwise(
    channels: int, width: int, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Conv1d:
    """The convolution that holds the weight ``(D, 1, W)``; layers give its weight to their own operators."""
    return nn.Conv1d(
        channels, channels, width, groups=channels, padding=width - 1, bias=bias, device=device, dtype=dtype
    )


def rates(channels: int, states: int, device: torch.device | str | None) -> nn.Parameter:
    """``A_log`` with ``A = -1, ..., -N`` in every channel, in float32."""
    rows = torch.arange(1, states + 1, dtype=torch.float32, device=device).log().repeat(channels, 1)
    return undecayed(nn.Parameter(rows))


def skip(channels: int, device: torch.device | str | None) -> nn.Parameter:
    """D of ones, in float32."""
    return undecayed(nn.Parameter(torch.ones(channels, device=device)))


def undecayed(parameter: nn.Parameter) -> nn.Parameter:
    """Marked as upstream marks what weight decay shall leave alone."""
    parameter._no_weight_decay = True  # pyright: ignore[reportAttributeAccessIssue]
    return parameter


def add_directions(
    mixer: Any, version: str | None, conv_bias: bool, device: torch.device | str | None, dtype: torch.dtype | None
) -> None:
    """Give a Mamba the parameters of its further directions."""
    if version is None:
        return
    inner, states = mixer.d_inner, mixer.d_state
    mixer.A_b_log = rates(inner, states, device)
    for suffix in _DIRECTIONS[version]:
        parts: dict[str, nn.Module | nn.Parameter] = {
            "conv1d": depthwise(inner, mixer.d_conv, conv_bias, device, dtype),
            "x_proj": nn.Linear(inner, mixer.dt_rank + 2 * states, bias=False, device=device, dtype=dtype),
            "dt_proj": nn.Linear(mixer.dt_rank, inner, device=device, dtype=dtype),
            "D": skip(inner, device),
        }
        for name, part in parts.items():
            setattr(mixer, name + suffix, part)
        if suffix != "_b":
            setattr(mixer, f"A{suffix}_log", rates(inner, states, device))


def mix(mixer: Any, version: str, xz: Tensor) -> Tensor:
    """``(B, 2 D, T)``, x above z, through all directions and the last projection, ``(B, T, d_model)``.

    Raises:
        ArgumentError: for a length that "v3" cannot slice.
    """
    out = mixer.out_proj
    if version == "v1":
        return bimamba_inner_fn(
            xz,
            mixer.conv1d.weight,
            mixer.conv1d.bias,
            mixer.x_proj.weight,
            mixer.dt_proj.weight,
            out.weight,
            out.bias,
            _A(mixer.A_log),
            _A(mixer.A_b_log),
            D=mixer.D,
            delta_bias=mixer.dt_proj.bias,
        )
    y = _pass(mixer, "", xz) + _pass(mixer, "_b", xz.flip(-1)).flip(-1)
    if version == "v3":
        slices, length = mixer.nslices, xz.shape[-1]
        if slices < 1 or length % slices:
            raise ArgumentError(
                f"Mamba: nslices is {slices}, which does not divide the length {length}",
                hint="pad the sequence, or choose another nslices",
            )
        woven = xz.unflatten(-1, (slices, -1)).transpose(-1, -2).flatten(-2)
        y = y + _pass(mixer, "_s", woven).unflatten(-1, (-1, slices)).transpose(-1, -2).flatten(-2)
    elif mixer.if_divide_out:
        y = y / 2
    return out(y.transpose(1, 2))


def _pass(mixer: Any, suffix: str, xz: Tensor) -> Tensor:
    conv, step = getattr(mixer, f"conv1d{suffix}"), getattr(mixer, f"dt_proj{suffix}")
    return mamba_inner_fn_no_out_proj(
        xz,
        conv.weight,
        conv.bias,
        getattr(mixer, f"x_proj{suffix}").weight,
        step.weight,
        _A(getattr(mixer, f"A{suffix}_log")),
        D=getattr(mixer, f"D{suffix}"),
        delta_bias=step.bias,
    )


def _A(log: Tensor) -> Tensor:
    return -log.to(wide(log)).exp()
