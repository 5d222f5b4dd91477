"""Covariances of K states, unconstrained: full, diagonal, spherical, or one for all."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from dualform.core.errors import ArgumentError
from dualform.core.linalg import symmetric_part
from dualform.discrete.emission import widened

Kind = Literal["full", "diagonal", "spherical", "tied"]
KINDS = ("full", "diagonal", "spherical", "tied")
Prior = tuple[float, float]


class Covariances(nn.Module):
    """``Sigma_k`` of a normal distribution of M components.

    The parameter is the Cholesky factor with the logarithm of its diagonal for ``full`` ``(K, M, M)`` and ``tied``
    ``(1, M, M)``; the logarithms of the standard deviations for ``diagonal`` ``(K, M)`` and ``spherical`` ``(K, 1)``.

    Args:
        where: the class that it belongs to, first word of errors.
        states: K.
        width: M.
        kind: which of the four.
        floor: the smallest variance that a fit gives, in any direction, relative to that of the data.
        prior: ``(weight, variance)``: a fit sees so many more observations of that variance in each state.
    """

    data_variance: Tensor

    def __init__(self, where: str, states: int, width: int, kind: Kind, floor: float, prior: Prior | None):
        super().__init__()
        if kind not in KINDS:
            raise ArgumentError(f"{where}: covariance is {kind!r}, expected one of {', '.join(KINDS)}")
        if not floor >= 0:
            raise ArgumentError(f"{where}: floor is {floor!r}, expected 0 or more")
        if prior is not None and not (len(prior) == 2 and prior[0] >= 0 and prior[1] > 0):
            raise ArgumentError(f"{where}: prior is {prior!r}, expected (weight, variance), 0 or more and above 0")
        self.states, self.width, self.kind, self.floor, self.prior = states, width, kind, floor, prior
        shape = {"full": (states, width, width), "tied": (1, width, width), "diagonal": (states, width)}
        self.root = nn.Parameter(torch.zeros(shape.get(kind, (states, 1)), dtype=torch.float64))
        self.register_buffer("data_variance", torch.ones(width, dtype=torch.float64), persistent=False)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return self.kind

    @property
    def dense(self) -> bool:
        """Whether components are correlated."""
        return self.kind in ("full", "tied")

    def cholesky(self) -> Tensor:
        """``L`` of ``Sigma_k = L L^T``, ``(K, M, M)``."""
        if not self.dense:
            return torch.diag_embed(self.deviations())
        root = widened(self.root)
        L = root.tril(-1) + torch.diag_embed(root.diagonal(dim1=-2, dim2=-1).exp())
        return L.expand(self.states, self.width, self.width)

    def deviations(self) -> Tensor:
        """The standard deviations ``(K, M)`` where components are uncorrelated."""
        return widened(self.root).exp().expand(self.states, self.width)

    def forward(self) -> Tensor:
        """``Sigma_k``, ``(K, M, M)``."""
        L = self.cholesky()
        return L @ L.mT

    def log_normal(self, error: Tensor) -> Tensor:
        """``log N(error; 0, Sigma_k)`` of ``(..., K, M)``, of what is not NaN, ``(..., K)``."""
        seen = ~error[..., :1, :].isnan()
        if not self.dense:
            deviation = self.deviations()
            constant = deviation.log() + math.log(2 * math.pi) / 2
            if not torch.compiler.is_compiling() and bool(seen.all()):
                return (error / deviation).square().sum(-1) / -2 - constant.sum(-1)
            white = torch.where(seen, error, 0) / deviation
            return torch.where(seen, white.square() / -2 - constant, 0).sum(-1)
        flat, known = error.flatten(0, -3), seen.flatten(0, -3)[:, 0]
        if torch.compiler.is_compiling():
            return self._each_step(flat, known).unflatten(0, error.shape[:-2])
        if bool(known.all()):
            return self._log_normal(flat, self.cholesky()).unflatten(0, error.shape[:-2])
        sigma, out = self(), flat.new_zeros(flat.shape[:-1])
        patterns, which = known.unique(dim=0, return_inverse=True)
        for i, pattern in enumerate(patterns):
            if pattern.any():
                rows, part = (which == i).nonzero().squeeze(1), pattern.nonzero().squeeze(1)
                L = torch.linalg.cholesky(symmetric_part(sigma[:, part[:, None], part]))
                out = out.index_put((rows,), self._log_normal(flat[rows][..., part], L))
        return out.unflatten(0, error.shape[:-2])

    def _each_step(self, error: Tensor, known: Tensor) -> Tensor:
        """The same of ``(N, K, M)`` with a factorisation for each step, whose shapes do not depend on what is known."""
        both = (known.unsqueeze(-1) & known.unsqueeze(-2)).unsqueeze(1)
        eye = torch.eye(self.width, dtype=error.dtype, device=error.device)
        L = torch.linalg.cholesky(torch.where(both, self(), eye))
        there = known.unsqueeze(1)
        white = torch.linalg.solve_triangular(L, torch.where(there, error, 0).unsqueeze(-1), upper=False).squeeze(-1)
        constant = L.diagonal(dim1=-2, dim2=-1).log() + there.to(error.dtype) * (math.log(2 * math.pi) / 2)
        return (white.square() / -2 - constant).sum(-1)

    @staticmethod
    def _log_normal(error: Tensor, L: Tensor) -> Tensor:
        """``(N, K, M)`` with ``(K, M, M)``."""
        white = torch.linalg.solve_triangular(L, error.permute(1, 2, 0), upper=False)  # (K, M, N)
        scale = L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return (-white.square().sum(1) / 2 - (scale + error.shape[-1] * math.log(2 * math.pi) / 2)[:, None]).mT

    @torch.no_grad()
    def set(self, sigma: Tensor) -> None:
        """Take given covariances ``(K, M, M)``; of the other kinds than full, what they keep of them."""
        if self.dense:
            L = torch.linalg.cholesky(symmetric_part(sigma[: len(self.root)]))
            self.root.copy_(L.tril(-1) + torch.diag_embed(L.diagonal(dim1=-2, dim2=-1).log()))
            return
        variances = sigma.diagonal(dim1=-2, dim2=-1)
        variances = variances if self.kind == "diagonal" else variances.mean(-1, keepdim=True)
        self.root.copy_(variances.log() / 2)

    @torch.no_grad()
    def maximise(self, scatter: Tensor, total: Tensor) -> None:
        """Take the covariances of the greatest likelihood.

        Args:
            scatter: ``sum_n w_nk (y - mean)(y - mean)^T`` ``(K, M, M)``.
            total: ``sum_n w_nk`` of each component ``(K, M)``.
        """
        if self.kind == "tied":
            scatter, total = scatter.sum(0, keepdim=True), total.sum(0, keepdim=True)
        elif self.kind == "spherical":
            trace = scatter.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
            scatter, total = torch.diag_embed(trace.expand_as(total)), total.sum(-1, keepdim=True).expand_as(total)
        if self.prior is not None:
            weight, variance = self.prior
            weight = weight * (self.width if self.kind == "spherical" else 1)
            eye = torch.eye(self.width, dtype=scatter.dtype, device=scatter.device)
            scatter, total = scatter + weight * variance * eye, total + weight
        empty = (total <= 0).any(-1)[:, None, None]
        sigma = scatter / torch.where(total > 0, total, 1)[:, :, None]
        if self.dense:
            sigma = symmetric_part(sigma)
            sigma = self._lifted(torch.where(empty, self()[: len(sigma)], sigma))
        else:
            least = self.floor * self.data_variance
            least = least if self.kind == "diagonal" else least.mean().expand_as(least)
            variances = torch.where(empty[..., 0], self.deviations().square(), sigma.diagonal(dim1=-2, dim2=-1))
            sigma = torch.diag_embed(variances.clamp_min(torch.finfo(sigma.dtype).tiny).maximum(least))
        self.set(sigma)

    def _lifted(self, sigma: Tensor) -> Tensor:
        """The likeliest covariance that is at least the floor in every direction, in units of the data's deviation."""
        unit = self.data_variance.sqrt()
        values, vectors = torch.linalg.eigh(sigma / (unit[:, None] * unit))
        values = values.clamp_min(max(self.floor, 1e-14))
        return symmetric_part((vectors * values.unsqueeze(-2)) @ vectors.mT) * (unit[:, None] * unit)

    def log_prior(self) -> Tensor:
        """The log-density of the prior's observations."""
        if self.prior is None:
            return self.root.new_zeros(())
        weight, variance = self.prior
        L = self.cholesky()[: len(self.root)]
        inverse = torch.linalg.solve_triangular(L, torch.eye(self.width, dtype=L.dtype, device=L.device), upper=False)
        logdet = 2 * L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -weight / 2 * (logdet + variance * inverse.square().sum((-1, -2))).sum()

    def free_parameters(self) -> int:
        """How many numbers describe them."""
        m = self.width
        return self.root.numel() if not self.dense else len(self.root) * m * (m + 1) // 2
