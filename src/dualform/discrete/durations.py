"""How long a state lasts: distributions of durations from 1 to a longest one."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from dualform.core.calls import explained
from dualform.core.errors import ArgumentError
from dualform.core.linalg import refuse
from dualform.core.shapes import check_tensors
from dualform.discrete.emission import check_distribution, given, widened
from dualform.discrete.passes import safe_log

_STEPS, _HALVINGS = 50, 12  # of Fisher's scoring, in one step of a fit
_RIDGE = 1e-12  # of the information, relative to its largest
_FAR = 11.5  # that a parameter goes from 0: rates and sizes stay within a factor of 1e5 of 1
_ENOUGH = 1e-13  # of the objective, for each duration: less is no gain


class Durations(nn.Module):
    """``p(d | z = k)`` for d from 1 to D: one distribution for each of K states.

    Args:
        states: K.
        longest: D.

    Raises:
        ArgumentError: for sizes that are no whole numbers from 1.
    """

    def __init__(self, states: int, longest: int):
        super().__init__()
        for name, value in (("states", states), ("longest", longest)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(f"{type(self).__name__}: {name} is {value!r}, expected a whole number from 1")
        self.states, self.longest = states, longest

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"states={self.states}, longest={self.longest}"

    def log_probs(self) -> Tensor:
        """``log p(d | z = k)`` ``(K, D)``, of d = 1 first."""
        raise NotImplementedError

    @property
    def probs(self) -> Tensor:
        """``(K, D)``, of d = 1 first."""
        return self.log_probs().exp()

    @property
    def means(self) -> Tensor:
        """The mean duration of each state ``(K,)``."""
        return self.probs @ self._durations()

    def scores(self) -> Tensor:
        """The derivatives of ``log p(d | z = k)`` by the parameters of a state, but for a constant ``(K, D, P)``."""
        raise NotImplementedError

    @torch.no_grad()
    def maximise(self, counts: Tensor) -> None:
        """Move the parameters to the maximum of ``sum_kd counts_kd log p(d | z = k)``, of counts ``(K, D)``.

        By Fisher's scoring, in steps that are shortened for each state until they gain. Rates and sizes stay between
        1e-5 and 1e5, beyond which nothing changes but rounding.
        """
        parameters, total = list(self.parameters()), counts.sum(-1)
        value = self._value(counts)
        for _ in range(_STEPS):
            p, s = self.probs, self.scores()
            s = s - torch.einsum("kd,kdp->kp", p, s)[:, None]
            gradient = torch.einsum("kd,kdp->kp", counts, s)
            information = torch.einsum("k,kd,kdp,kdq->kpq", total, p, s, s)
            ridge = _RIDGE * (1 + information.diagonal(dim1=-2, dim2=-1).amax(-1))
            information = information + torch.diag_embed(ridge[:, None].expand_as(gradient))
            step = torch.linalg.solve_ex(information, gradient).result
            step = (step / step.abs().amax(-1, keepdim=True).clamp_min(1)).nan_to_num(0)
            kept, now = [m.clone() for m in parameters], value
            for i in range(_HALVINGS):
                for m, old, by in zip(parameters, kept, step.unbind(-1), strict=True):
                    m.copy_((old + by).clamp(-_FAR, _FAR))
                now = self._value(counts)
                worse = ~(now >= value)
                if not worse.any():
                    break
                step = torch.where(worse[:, None], step / 4 if i < _HALVINGS - 2 else 0, step)
            gained, value = (now - value).max(), now
            if gained <= _ENOUGH * total.sum():
                return

    def free_parameters(self) -> int:
        """How many numbers describe it."""
        return sum(p.numel() for p in self.parameters())

    def _value(self, counts: Tensor) -> Tensor:
        """Of each state ``(K,)``."""
        return torch.where(counts > 0, counts * self.log_probs(), 0).sum(-1)

    def _durations(self) -> Tensor:
        like = next(self.parameters())
        return widened(torch.arange(1, self.longest + 1, device=like.device, dtype=like.dtype))


@explained
class FreeDurations(Durations):
    """Any distribution over 1 .. D, with a probability of its own for each duration.

    Args:
        states: K.
        longest: D.
        prior: durations added to each of the counts that a fit finds; above 0 it keeps every duration possible.

    Raises:
        ArgumentError: for numbers that make no sense.
    """

    def __init__(self, states: int, longest: int, *, prior: float = 0.0):
        super().__init__(states, longest)
        if not prior >= 0:
            raise ArgumentError(f"FreeDurations: prior is {prior}, expected a number from 0")
        self.prior = prior
        self.logits = nn.Parameter(torch.zeros(states, longest, dtype=torch.float64))

    @classmethod
    def of(cls, probs: Any) -> "FreeDurations":
        """Durations of given probabilities ``(K, D)``.

        Raises:
            ArgumentError: for rows that are no distribution.
        """
        value = given("FreeDurations.of", probs=probs)["probs"]
        check_tensors("FreeDurations.of", probs=(value, "K D"))
        check_distribution("FreeDurations.of", "probs", value)
        made = cls(*value.shape)
        made.logits = nn.Parameter(safe_log(value))
        return made

    def log_probs(self) -> Tensor:
        return widened(self.logits).log_softmax(-1)

    @torch.no_grad()
    def maximise(self, counts: Tensor) -> None:
        counts = counts + self.prior
        total = counts.sum(-1, keepdim=True)
        found = safe_log(counts / torch.where(total > 0, total, 1))
        self.logits.copy_(torch.where(total > 0, found, self.logits))

    def free_parameters(self) -> int:
        return self.states * (self.longest - 1)


@explained
class PoissonDurations(Durations):
    """``d - 1`` has a Poisson distribution, cut off after D: ``p(d | z = k)`` in proportion to ``rate^(d-1) / (d-1)!``.

    Args:
        states: K.
        longest: D.

    Raises:
        ArgumentError: for sizes that are no whole numbers from 1.
    """

    def __init__(self, states: int, longest: int):
        super().__init__(states, longest)
        self.log_rates = nn.Parameter(torch.full((states,), math.log(max(1.0, longest / 4)), dtype=torch.float64))

    @classmethod
    def of(cls, rates: Any, longest: int) -> "PoissonDurations":
        """Durations of given rates ``(K,)``, which are the means of ``d - 1`` but for what is cut off.

        Raises:
            ArgumentError: for a rate that is not positive.
        """
        value = given("PoissonDurations.of", rates=rates)["rates"]
        check_tensors("PoissonDurations.of", rates=(value, "K"))
        refuse("PoissonDurations.of", "rates", value, value <= 0, "has values that are not positive")
        made = cls(len(value), longest)
        made.log_rates = nn.Parameter(value.log())
        return made

    @property
    def rates(self) -> Tensor:
        """``(K,)``."""
        return widened(self.log_rates).exp()

    def log_probs(self) -> Tensor:
        n = self._durations() - 1
        return (n * widened(self.log_rates)[:, None] - torch.lgamma(n + 1)).log_softmax(-1)

    def scores(self) -> Tensor:
        return (self._durations() - 1).expand(self.states, -1).unsqueeze(-1)


@explained
class NegativeBinomialDurations(Durations):
    """``d - 1`` has a negative binomial distribution, cut off after D; a size of 1 is the geometric one of a chain.

        p(d | z = k)  in proportion to  Gamma(d - 1 + size) / (Gamma(size) (d-1)!) (1 - stop)^(d-1)

    Args:
        states: K.
        longest: D.

    Raises:
        ArgumentError: for sizes that are no whole numbers from 1.
    """

    def __init__(self, states: int, longest: int):
        super().__init__(states, longest)
        self.log_sizes = nn.Parameter(torch.zeros(states, dtype=torch.float64))
        start = 1 / max(2.0, longest / 4)
        self.stop_logits = nn.Parameter(torch.full((states,), start, dtype=torch.float64).logit())

    @classmethod
    def of(cls, sizes: Any, stops: Any, longest: int) -> "NegativeBinomialDurations":
        """Durations of given sizes ``(K,)``, above 0, and probabilities to stop ``(K,)``, between 0 and 1.

        Raises:
            ArgumentError: for values outside of these.
        """
        where = "NegativeBinomialDurations.of"
        values = given(where, sizes=sizes, stops=stops)
        check_tensors(where, sizes=(values["sizes"], "K"), stops=(values["stops"], "K"))
        refuse(where, "sizes", values["sizes"], values["sizes"] <= 0, "has values that are not positive")
        stop = values["stops"]
        refuse(where, "stops", stop, (stop <= 0) | (stop >= 1), "has values that are not between 0 and 1")
        made = cls(len(stop), longest)
        made.log_sizes, made.stop_logits = nn.Parameter(values["sizes"].log()), nn.Parameter(stop.logit())
        return made

    @property
    def sizes(self) -> Tensor:
        """``(K,)``."""
        return widened(self.log_sizes).exp()

    @property
    def stops(self) -> Tensor:
        """``(K,)``."""
        return widened(self.stop_logits).sigmoid()

    def log_probs(self) -> Tensor:
        n, size = self._durations() - 1, self.sizes[:, None]
        going_on = nn.functional.logsigmoid(-widened(self.stop_logits))[:, None]
        return (torch.lgamma(n + size) - torch.lgamma(size) - torch.lgamma(n + 1) + n * going_on).log_softmax(-1)

    def scores(self) -> Tensor:
        n, size = self._durations() - 1, self.sizes[:, None]
        return torch.stack([size * (torch.digamma(n + size) - torch.digamma(size)), -n * self.stops[:, None]], -1)
