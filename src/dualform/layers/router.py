"""The router of a mixture of experts: which of them each element of a sequence goes to, and how much each counts."""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dualform.core.errors import ConfigError
from dualform.core.options import options
from dualform.core.shapes import wide


@options
class RouterConfig:
    """The options of a :class:`Router`.

    Args:
        experts: E.
        top_k: K, how many of them an element goes to.
        scores: a ``softmax`` over all experts, or a ``sigmoid`` of each.
        normalise: whether the K weights are divided by their sum. With a softmax this is the same as one over the
            chosen experts alone.
        eps: added to that sum.
        scale: what the weights are multiplied by in the end.
        corrected: whether experts are chosen by scores to which a learned number per expert is added. It has no part
            in the weights.
        groups: of experts, all of one size. Experts are chosen from the best ``top_groups`` of them, where a group is
            as good as the sum of its two best scores.
        top_groups: see ``groups``.
    """

    experts: int = 8
    top_k: int = 2
    scores: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = True
    eps: float = 1e-20
    scale: float = 1.0
    corrected: bool = False
    groups: int = 1
    top_groups: int = 1


class Routing(NamedTuple):
    """Where N elements go."""

    weights: Tensor  # (N, K), float32 or wider
    experts: Tensor  # (N, K), int64
    scores: Tensor  # (N, E)
    logits: Tensor  # (N, E)


class Router(nn.Module):
    """Scores ``s = softmax(W x)`` or ``sigmoid(W x)``, the K experts where ``s + c`` is greatest, and their weights s.

    Computed in float32 or wider. c, the ``correction``, is 0 at the start, and always without ``corrected``.

    Args:
        config: the options.
        d_model: D.

    Raises:
        ConfigError: for numbers of experts or groups that do not fit together, or an option that is out of range.

    References:
        Shazeer et al. (2017), arXiv:1701.06538, section 2.1 (the greatest K); DeepSeek-AI (2024), arXiv:2412.19437,
        equations 12 to 16 (sigmoid, correction, scale) and section 2.1.2 (groups).
    """

    def __init__(self, config: RouterConfig, d_model: int):
        super().__init__()
        _check(config)
        self.config = config
        bound = 1 / math.sqrt(d_model)
        self.weight = nn.Parameter(torch.empty(config.experts, d_model).uniform_(-bound, bound))
        self.correction = nn.Parameter(torch.zeros(config.experts)) if config.corrected else None

    def forward(self, x: Float[Tensor, "N D"]) -> Routing:
        """Where each element goes."""
        c, dtype = self.config, wide(x, self.weight)
        logits = F.linear(x.to(dtype), self.weight.to(dtype))
        scores = logits.softmax(-1) if c.scores == "softmax" else logits.sigmoid()
        ranked = scores.detach()
        if self.correction is not None:
            ranked = ranked + self.correction.detach()
        if c.groups > 1:
            ranked = self._of_the_best_groups(ranked)
        experts = ranked.topk(c.top_k, -1).indices
        weights = scores.gather(-1, experts)
        if c.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + c.eps)
        return Routing(weights * c.scale, experts, scores, logits)

    def _of_the_best_groups(self, ranked: Float[Tensor, "N E"]) -> Float[Tensor, "N E"]:
        """The scores, minus infinity outside of the best groups."""
        inside = ranked.unflatten(-1, (self.config.groups, -1))
        worth = inside.topk(min(2, inside.shape[-1]), -1).values.sum(-1)
        best = worth.topk(self.config.top_groups, -1).indices
        kept = torch.zeros_like(worth, dtype=torch.bool).scatter(-1, best, True)
        return inside.masked_fill(~kept[..., None], -torch.inf).flatten(-2)

    def balance_loss(self, routing: Routing, counted: Bool[Tensor, " N"] | None = None) -> Float[Tensor, ""]:
        """``E sum_e f_e p_e``, 1 where all experts are used alike: f the share of choices, p the mean share of scores.

        Its gradient is that of p alone. Where the router is ``corrected`` the loss is 0, and its gradient that of
        ``sum_e (f_e - 1/E) c_e``: the correction of an expert that is chosen too often falls, and nothing else moves.

        Args:
            routing: of N elements.
            counted: those that are no padding; None is all.

        In transformers f is K times as large, and f and p are means over the layers, of which there is one loss.

        References:
            Fedus et al. (2021), arXiv:2101.03961, equations 4 to 6; Wang et al. (2024), arXiv:2408.15664, algorithm 1.
        """
        used = torch.zeros_like(routing.scores, requires_grad=False).scatter(-1, routing.experts, 1.0)
        used = _mean(used, counted) / self.config.top_k
        if self.correction is not None:
            correction = self.correction.to(used.dtype)
            return ((used - 1 / self.config.experts) * (correction - correction.detach())).sum()
        shares = routing.scores
        if self.config.scores == "sigmoid":
            shares = shares / (shares.sum(-1, keepdim=True) + self.config.eps)
        return self.config.experts * (used * _mean(shares, counted)).sum()

    def z_loss(self, routing: Routing, counted: Bool[Tensor, " N"] | None = None) -> Float[Tensor, ""]:
        """The mean of ``logsumexp(W x)^2``, which keeps the logits small.

        Args:
            routing: of N elements.
            counted: those that are no padding; None is all.

        References:
            Zoph et al. (2022), arXiv:2202.08906, equation 5.
        """
        return _mean(routing.logits.logsumexp(-1).square()[:, None], counted).sum()


def _mean(values: Float[Tensor, "N E"], counted: Tensor | None) -> Float[Tensor, " E"]:
    """The mean over the elements that count; 0 where none does."""
    if counted is None:
        return values.sum(0) / max(values.shape[0], 1)
    kept = torch.where(counted[:, None], values, 0)
    return kept.sum(0) / counted.sum().clamp(min=1)


def _check(c: RouterConfig) -> None:
    for name in ("experts", "top_k", "groups", "top_groups"):
        if getattr(c, name) < 1:
            raise ConfigError(f"moe: {name} is {getattr(c, name)}, expected at least 1")
    for name in ("eps", "scale"):
        if not 0 <= getattr(c, name) < math.inf:
            raise ConfigError(f"moe: {name} is {getattr(c, name)}, expected a number that is not negative")
    if c.experts % c.groups:
        raise ConfigError(
            f"moe: experts {c.experts} is not a multiple of groups {c.groups}",
            hint=f"set groups to a divisor of {c.experts}",
        )
    if c.top_groups > c.groups:
        raise ConfigError(f"moe: top_groups is {c.top_groups}, expected at most groups = {c.groups}")
    if c.top_k > (most := c.experts // c.groups * c.top_groups):
        raise ConfigError(
            f"moe: top_k is {c.top_k}, expected at most {most}, the experts that are chosen from",
            hint="lower top_k, or raise experts or top_groups",
        )
