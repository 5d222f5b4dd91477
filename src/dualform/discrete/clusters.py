"""k-means, to begin a fit with."""

import torch
from torch import Tensor

_SWEEPS = 25
_MOST = 20_000  # rows that centres are found from


@torch.no_grad()
def clusters(x: Tensor, count: int, generator: torch.Generator, refine: bool = True) -> Tensor:
    """Cluster ``x`` ``(N, M)`` and give each row its cluster as a weight of 1 among ``(N, count)``.

    Components are divided by their deviations; a missing one is taken as the mean of its column. The first centres are
    drawn far from each other, and then moved to the means of what is closest to them, if ``refine``.

    References:
        Lloyd (1982), "Least squares quantization in PCM"; Arthur and Vassilvitskii (2007), "k-means++: the advantages
        of careful seeding".
    """
    mean = x.nanmean(0).nan_to_num(0)  # of a column that is missing everywhere
    x = torch.where(x.isnan(), mean, x) - mean
    deviation = x.square().mean(0).sqrt()
    x = x / torch.where(deviation > 0, deviation, 1)
    some = x if len(x) <= _MOST else x[torch.randperm(len(x), generator=generator)[:_MOST].to(x.device)]
    centres = _seeds(some, count, generator)
    for _ in range(_SWEEPS if refine else 0):
        near = _nearest(some, centres)
        chosen = torch.nn.functional.one_hot(near, count).to(x.dtype)
        total = chosen.sum(0)[:, None]
        moved = torch.where(total > 0, chosen.mT @ some / total.clamp_min(1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return torch.nn.functional.one_hot(_nearest(x, centres), count).to(x.dtype)


def moving_mean(x: Tensor, window: int) -> Tensor:
    """The mean of each row of ``(N, M)`` and those around it, as many as an odd window has, of what is not NaN."""
    if window == 1:
        return x
    seen = ~x.isnan()
    both = torch.cat([torch.where(seen, x, 0), seen.to(x.dtype)], 1).mT[:, None]
    total, count = torch.nn.functional.avg_pool1d(both, window, 1, window // 2)[:, 0].mT.chunk(2, 1)
    return total / count  # 0 / 0, NaN, where all are


def _nearest(x: Tensor, centres: Tensor) -> Tensor:
    return (centres.square().sum(-1) - 2 * x @ centres.mT).argmin(-1)


def _seeds(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Centres among the rows of x, each drawn with a probability in proportion to its squared distance from others."""
    new = x[torch.randint(len(x), (1,), generator=generator).to(x.device)]
    centres, distance = new, (x - new).square().sum(-1)
    while len(centres) < count:
        chance = distance if distance.sum() > 0 else torch.ones_like(distance)
        until = (chance.cumsum(0) / chance.sum()).cpu()
        pick = torch.searchsorted(until, torch.rand(1, generator=generator, dtype=until.dtype)).clamp(max=len(x) - 1)
        new = x[pick.to(x.device)]
        centres, distance = torch.cat([centres, new]), torch.minimum(distance, (x - new).square().sum(-1))
    return centres
