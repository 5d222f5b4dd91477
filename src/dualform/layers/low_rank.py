"""A linear map that several uses share, with a low-rank addition of each use's own."""

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dualform.core.errors import ConfigError


class LowRank(nn.Module):
    """``y = W x + concat_i(B_i A_i x)``: the rows of W in pieces, each with a product of its own of rank r.

    B is 0 at the start, so that the uses are alike there.

    Args:
        base: the map W, which is shared.
        rank: r.
        rows: outputs of each piece; their sum is that of the base.

    References:
        Hu et al. (2021), arXiv:2106.09685, section 4.1; Glorioso et al. (2024), arXiv:2411.15242, section 2.
    """

    def __init__(self, base: nn.Linear, rank: int, rows: tuple[int, ...]):
        super().__init__()
        self.base, self.rank, self.rows = base, rank, rows
        like = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.down = nn.ModuleList(nn.Linear(base.in_features, rank, bias=False, **like) for _ in rows)
        self.up = nn.ModuleList(nn.Linear(rank, count, bias=False, **like) for count in rows)
        for weight in self.up.parameters():
            nn.init.zeros_(weight)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... E"]:
        """The sum of both maps."""
        added = [up(down(x)) for down, up in zip(self.down, self.up, strict=True)]
        return self.base(x) + torch.cat(added, -1)


def adapt(part: nn.Module, rank: int) -> None:
    """Give the first map of a part, which it names in ``adapted()``, low-rank matrices.

    Raises:
        ConfigError: for a part that names none, or that has parameters outside of its linear maps.
    """
    kind = type(part).__name__
    if not callable(getattr(part, "adapted", None)) or next(part.parameters(recurse=False), None) is not None:
        raise ConfigError(
            f"sublayer: low_rank is {rank} around {kind}, which cannot have it",
            hint="attention without a convolution and the MLP can",
        )
    name, rows = part.adapted()  # pyright: ignore[reportCallIssue]
    setattr(part, name, LowRank(getattr(part, name), rank, rows))


def another_use(module: nn.Module) -> nn.Module:
    """A module of the same submodules, except for low-rank matrices, which are its own; without any, itself."""
    if isinstance(module, LowRank):
        return LowRank(module.base, module.rank, module.rows)
    if not any(isinstance(inner, LowRank) for inner in module.modules()):
        return module
    new = copy.copy(module)
    new._modules = {name: None if m is None else another_use(m) for name, m in module._modules.items()}
    new._parameters, new._buffers = dict(module._parameters), dict(module._buffers)
    return new
