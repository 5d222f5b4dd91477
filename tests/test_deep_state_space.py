"""Deep state space models, beside the Kalman filter as a loop; and that they learn what depends on covariates."""

import math

import pytest
import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.forecast import DeepStateSpace

NAN = math.nan


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def built(**options) -> DeepStateSpace:
    torch.manual_seed(0)
    return DeepStateSpace(2, width=8, layers=1, **options).eval()


def loop(model: DeepStateSpace, y: Tensor, x: Tensor, row: int, horizon: int) -> tuple[float, list[float], list[float]]:
    """The log-likelihood of a series, and the moments of what follows, matrix by matrix."""
    with torch.no_grad():
        s = model.system(x)
    A, C, m, P = s.A, s.C[0], s.m0[row], s.P0[row]
    known = ~y[row].isnan()
    centre, scale = y[row][known].mean(), y[row][known].std(correction=0)
    loglik, means, variances = 0.0, [], []
    for t in range(y.shape[1] + horizon):
        if t:
            m, P = A @ m, A @ P @ A.T + s.Q[row, t]
        mean, S = (C @ m + s.d[row, t]).item(), (C @ P @ C + s.R[row, t, 0, 0]).item()
        if t >= y.shape[1]:
            means.append((centre + scale * mean).item())
            variances.append((scale**2 * S).item())
        elif known[t]:
            v = ((y[row, t] - centre) / scale).item() - mean
            loglik -= (math.log(2 * math.pi * S) + v * v / S) / 2 + math.log(scale.item())
            K = P @ C / S
            m, P = m + K * v, P - torch.outer(K, K) * S
    return loglik, means, variances


@pytest.mark.parametrize("season, trend", [(1, False), (1, True), (4, True)])
def test_it_is_the_kalman_filter_of_what_the_network_writes(season, trend):
    model, y, x = built(season=season, trend=trend), 5 + 3 * draw(3, 20), draw(3, 26, 2, seed=1)
    y[1, 4:7] = NAN
    got, ahead = model.log_likelihood(y, x), model.forecast(y, 6, x)
    for row in range(3):
        loglik, means, variances = loop(model, y, x, row, 6)
        assert got[row].item() == pytest.approx(loglik)
        torch.testing.assert_close(ahead.mean[row, :, 0], torch.tensor(means, dtype=torch.float64))
        torch.testing.assert_close(ahead.cov[row, :, 0, 0], torch.tensor(variances, dtype=torch.float64))
        high = ahead.interval(0.95)[1][row, :, 0]
        torch.testing.assert_close(
            high, torch.tensor(means).double() + 1.959964 * torch.tensor(variances).double().sqrt()
        )


def test_gradients_reach_every_weight():
    model, y, x = built(season=4, series=3), draw(3, 20), draw(3, 20, 2, seed=1)
    model.log_likelihood(y, x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_it_learns_what_noise_depends_on():
    """Noise is five times as large where the first covariate is 1, and the level jumps with the second."""
    x = (draw(20, 50, 2, seed=2) > 0).double()
    spread = 0.2 + 0.8 * x[..., 0]
    y = 0.05 * draw(20, 50, seed=3).cumsum(1) + 2 * x[..., 1] + spread * draw(20, 50, seed=4)
    torch.manual_seed(0)
    model = DeepStateSpace(2, trend=False, width=16, layers=1)
    model.fit(y[:16], x[:16], steps=60, batch=16, lr=2e-2)
    with torch.no_grad():
        s = model.system(x[16:])
        loud, calm = (s.R[:, 5:, 0, 0].sqrt()[x[16:, 5:, 0] == k].mean() for k in (1.0, 0.0))
        moved, stayed = (s.d[:, 5:, 0][x[16:, 5:, 1] == k].mean() for k in (1.0, 0.0))
        seen = model.log_likelihood(y[16:], x[16:]).mean() / 50  # of series that it was not fitted to
    scale = y[:16].std(1, correction=0).mean()
    assert 2.5 < loud / calm < 8 and 1.4 < (moved - stayed) * scale < 2.6
    constant = -math.log(2 * math.pi * spread.square().mean().item()) / 2 - 0.5  # of noise whose size is one number
    assert seen > constant + 0.15


def test_series_are_told_apart():
    model, y, x = built(series=3), draw(2, 12), draw(12, 2, seed=1)
    both = model.log_likelihood(y, x, [2, 0])
    torch.testing.assert_close(model.log_likelihood(y[:1], x, [2]), both[:1])
    assert model.log_likelihood(y[:1], x, [1]).item() != pytest.approx(both[0].item(), rel=1e-9)
    for series in ([0, 3], [0], [0.5, 1.0]):
        with pytest.raises(ArgumentError, match="expected 2 numbers from 0 to 2"):
            model.log_likelihood(y, x, series)
    with pytest.raises(ArgumentError, match="does not tell them apart"):
        built().log_likelihood(y, x, [0, 1])


def test_what_does_not_fit_is_named():
    model, y, x = built(), draw(2, 12), draw(2, 15, 2)
    for call, message in (
        (lambda: model.forecast(y, 4, x), r"x has shape \(2, 15, 2\), expected \(2, 16 or more, 2\)"),
        (lambda: model.forecast(y, 0, x), "horizon is 0"),
        (lambda: model.log_likelihood(y[0], x), r"y has shape \(12,\)"),
        (lambda: model.log_likelihood(torch.ones(2, 12), x), "series 0 has no two different numbers"),
        (lambda: model.log_likelihood(y / 0, x), "y is infinite in series 0, step 0"),
        (lambda: model.fit(y, x * NAN), "x"),
        (lambda: DeepStateSpace(0), "covariates is 0"),
        (lambda: DeepStateSpace(1, backbone="s4dd"), "backbone is 's4dd'"),
    ):
        with pytest.raises(ArgumentError, match=message):
            call()
