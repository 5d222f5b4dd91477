"""Diffuse directions that look alike at first: beside generalised least squares of the whole series."""

import math

import pytest
import torch

from dualform.gaussian import Irregular, Trend, TrigonometricSeasonal
from vectors import close

T, HALF = 60, math.log(2 * math.pi) / 2


def weeks(irregular: bool):
    """A trend and waves of a year of weeks: 14 directions, which 14 weeks hardly tell apart."""
    model = Trend(level_variance=0.3, slope_variance=0.01) + TrigonometricSeasonal(52, 6, variance=1e-3)
    return model + Irregular(variance=0.5) if irregular else model


def observed() -> torch.Tensor:
    t = torch.arange(T, dtype=torch.float64)
    e = torch.randn(T, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return 300 + 0.1 * t + 3 * torch.sin(2 * math.pi * t / 52) + e.cumsum(0) / 4


def by_least_squares(model, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The log-likelihood, and the mean and the variance of ``C h_t`` at each step."""
    one = model.build()
    n = len(one.A)
    powers = [torch.eye(n, dtype=torch.float64)]
    for _ in range(T - 1):
        powers.append(one.A @ powers[-1])
    X = torch.cat([one.C @ power for power in powers])
    V = torch.zeros(T, T, dtype=torch.float64)
    for s in range(1, T):
        load = torch.cat([X.new_zeros(s, n), X[: T - s]])
        V = V + load @ one.Q @ load.mT
    seen = ~y.isnan()
    every = V
    V, X0, y = (V + one.R * torch.eye(T))[seen][:, seen], X[seen], y[seen]
    root = torch.linalg.cholesky(V + 1e-14 * torch.eye(len(y)) * (one.R == 0))
    Xw, yw, cross = (torch.linalg.solve_triangular(root, z, upper=False) for z in (X0, y[:, None], every[seen]))
    Q, R = torch.linalg.qr(Xw)
    beta = torch.linalg.solve_triangular(R, Q.mT @ yw, upper=True)
    rest = yw - Xw @ beta
    log_det = 2 * root.diagonal().log().sum() + 2 * R.diagonal().abs().log().sum()
    left = torch.linalg.solve_triangular(R.mT, (X - cross.mT @ Xw).mT, upper=False)
    mean = X @ beta + cross.mT @ rest
    var = every.diagonal() - cross.square().sum(0) + left.square().sum(0)
    return -(log_det + rest.square().sum()) / 2 - len(y) * HALF, mean[:, 0], var


@pytest.mark.parametrize("irregular", [True, False])
@pytest.mark.parametrize("gap", [False, True])
def test_filter_and_smoother_are_generalised_least_squares(gap, irregular):
    model, y = weeks(irregular), observed()
    if gap:
        y[[3, 4, 9, 30]] = torch.nan
    want, mean, var = by_least_squares(model, y)
    found, C = model.filter(y), model.build().C[0]
    for value in (found.log_likelihood, model.log_likelihood(y), model.smooth(y).log_likelihood):
        assert abs(value - want) < 1e-7
    close(found.mean[-1] @ C, mean[-1], 1e-8)
    assert abs(C @ found.cov[-1] @ C - var[-1]) < 1e-8
    assert not found.diffuse[20:].any() and found.diffuse[:10].flatten(1).any(1).all()
    smooth = model.smooth(y)
    close(smooth.mean @ C, mean, 1e-6)
    torch.testing.assert_close((smooth.cov @ C) @ C, var, rtol=0, atol=1e-7)


def test_rows_are_those_alone_and_the_gradient_is_that_of_least_squares():
    model, y = weeks(True), observed()
    gaps = y.clone()
    gaps[[3, 4, 9, 30]] = torch.nan
    both = model.filter(torch.stack([y, gaps])[..., None])
    for row, each in enumerate((y, gaps)):
        alone = model.filter(each)
        assert abs(both.log_likelihood[row] - alone.log_likelihood) < 1e-8
        close(both.mean[row, 20:], alone.mean[20:], 1e-6)
    loose = Trend(level_variance=None, slope_variance=0.01) + TrigonometricSeasonal(52, 6, variance=1e-3)
    loose = loose + Irregular(variance=0.5)
    place = next(p for p in loose.parameters() if p.requires_grad)
    steps = [place.detach().clone() + h for h in (0, 1e-4, -1e-4)]
    values = []
    for at in steps:
        place.data.copy_(at)
        values.append(loose.log_likelihood(y))
    place.data.copy_(steps[0])
    (slope,) = torch.autograd.grad(loose.log_likelihood(y), place)
    close(slope, (values[1] - values[2]).detach() / 2e-4, 1e-5)
