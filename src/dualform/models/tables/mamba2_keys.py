"""Mamba-2 by the keys of the hybrids of transformers, most of which begin with ``mamba_``."""

import math
from typing import Any

from dualform.core.errors import ConfigError
from dualform.core.options import brief
from dualform.layers.mamba2 import Mamba2Config
from dualform.models.tables.layout import Options, scan_width

MAMBA2 = Options(
    Mamba2Config,
    {
        "mamba_d_state": ("d_state", 256),
        "mamba_d_conv": ("d_conv", 4),
        "mamba_n_groups": ("groups", 1),
        "mamba_conv_bias": ("conv_bias", True),
        "mamba_proj_bias": ("bias", False),
        "time_step_limit": ("dt_limit", (0.0, math.inf)),
        "rms_norm_eps": ("norm_eps", 1e-5),
    },
)
SCAN: dict[str, tuple[str, Any]] = {
    "mamba_expand": ("expand", 2),
    "mamba_n_heads": ("heads", 128),
    "mamba_d_head": ("head", None),
}
"""Keys of sizes, which :func:`heads_of` reads."""


def heads_of(sizes: Any, width: int, where: str) -> dict[str, Any]:
    """The options that say how wide the scan and its heads are.

    Raises:
        ConfigError: where the widths of the heads do not make up that of the scan.
    """
    if not 1 <= sizes.expand * width < 2**63:
        raise ConfigError(f"{where}mamba_expand is {brief(sizes.expand)}, expected a positive number")
    channels = int(sizes.expand * width)
    head = sizes.head or channels // sizes.heads
    if head * sizes.heads != channels:
        came = f"mamba_n_heads * mamba_d_head is {sizes.heads} * {head}"
        raise ConfigError(f"{where}{came}, expected mamba_expand * hidden_size = {channels}")
    return {"d_head": head, **scan_width(channels, width)}


def written_heads(part: Mamba2Config, width: int) -> dict[str, Any]:
    """The inverse of :func:`heads_of`."""
    channels = part.expand * width if part.d_inner is None else part.d_inner
    expand = channels / width if channels % width else channels // width
    return {"mamba_expand": expand, "mamba_n_heads": channels // part.d_head, "mamba_d_head": part.d_head}
