"""Sequential, parallel and stepped are one filter: random models, and data with values missing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dualform as df
from gaussians import build, terms

NAN = float("nan")


CASES = {
    "n": st.integers(1, 4),
    "m": st.integers(1, 3),
    "length": st.integers(1, 40),
    "batch": st.integers(1, 5),
    "rank": st.integers(1, 4),
    "varies": st.booleans(),
    "missing": st.sampled_from([0.0, 0.2, 0.8]),
    "blind": st.integers(0, 40),  # steps at the beginning of which nothing is seen
    "seed": st.integers(0, 1000),
}


def case(n, m, length, batch, rank, varies, missing, blind, seed):
    """A model with its observations: of any size, singular or not, constant or varying in time."""
    given = terms(n, m, k=min(rank, n), steps=length if varies else None, seed=seed)
    g = torch.Generator().manual_seed(seed)
    y = 3 * torch.randn(batch, length, m, generator=g, dtype=torch.float64)
    gone = torch.rand(batch, length, m, generator=g) < missing
    gone[:, : blind if blind < length else 0] = True
    return build(given, length if varies else None), y.masked_fill(gone, NAN)


def filtered(model, y, parallel):
    found = df.KalmanFilter(model, parallel=parallel).filter(y)
    return found.mean, found.cov, found.loglik


def stepped(model, y):
    kf = df.KalmanFilter(model)
    state, out = kf.init_state(len(y)), []
    for one in y.unbind(1):
        found, state = kf.step(one, state)
        out.append(found[:3])
    return [torch.stack(parts, 1) for parts in zip(*out, strict=True)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(**CASES)
def test_all_forms_are_one_filter(**given):
    model, y = case(**given)
    with torch.no_grad():
        want = filtered(model, y, False)
        for got in (filtered(model, y, True), stepped(model, y)):
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(**CASES)
def test_both_forms_are_one_smoother(**given):
    model, y = case(**given)
    with torch.no_grad():
        a, b = (df.KalmanFilter(model, parallel=parallel).smooth(y) for parallel in (False, True))
    for x, z in (
        (a.mean, b.mean),
        (a.cov, b.cov),
        (a.lag_one_cov, b.lag_one_cov),
        (a.log_likelihood, b.log_likelihood),
    ):
        torch.testing.assert_close(x, z, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("parallel", "length"), [(False, 10**6), (True, 10**5)])
@torch.no_grad()
def test_covariances_in_float32_stay_positive_semi_definite(parallel, length):
    A = torch.tensor([[1.0, 1, 0], [0, 0.9, 0.3], [0, -0.3, 0.9]])
    one, noise = torch.ones(1, 1), torch.diag(torch.tensor([0.1, 0.01, 0.0]))
    model = df.LinearGaussian(A, torch.tensor([[1.0, 0, 1]]), noise, one, torch.zeros(3), 100 * torch.eye(3)).float()
    y = torch.randn(1, length, 1).cumsum(1)
    found = df.KalmanFilter(model, parallel=parallel).filter(y.masked_fill(torch.rand(y.shape) < 0.1, NAN))
    assert found.cov.dtype == torch.float32 and torch.equal(found.cov, found.cov.mT)
    spread = torch.linalg.eigvalsh(found.cov[0].double())
    assert (spread[:, 0] > 0).all() and found.loglik.isfinite().all()
