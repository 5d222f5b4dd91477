"""Sequential, parallel and stepped are one filter: random models, and data with values missing."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dualform as df
from gaussians import build, terms

NAN = float("nan")


@st.composite
def cases(draw):
    """A model with its observations: of any size, singular or not, constant or varying in time."""
    n, m, length = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 40))
    varies, rank, seed = draw(st.booleans()), draw(st.integers(1, n)), draw(st.integers(0, 1000))
    batch = draw(st.integers(1, 5))
    given = terms(n, m, k=rank, steps=length if varies else None, seed=seed)
    g = torch.Generator().manual_seed(seed)
    y = 3 * torch.randn(batch, length, m, generator=g, dtype=torch.float64)
    gone = torch.rand(batch, length, m, generator=g) < draw(st.sampled_from([0.0, 0.2, 0.8]))
    gone[:, : draw(st.integers(0, length))] |= draw(st.booleans())  # nothing at all is seen for a while
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
@given(case=cases())
def test_all_forms_are_one_filter(case):
    model, y = case
    with torch.no_grad():
        want = filtered(model, y, False)
        for got in (filtered(model, y, True), stepped(model, y)):
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=cases())
def test_both_forms_are_one_smoother(case):
    model, y = case
    with torch.no_grad():
        a, b = (df.KalmanFilter(model, parallel=parallel).smooth(y) for parallel in (False, True))
    for x, z in (
        (a.mean, b.mean),
        (a.cov, b.cov),
        (a.lag_one_cov, b.lag_one_cov),
        (a.log_likelihood, b.log_likelihood),
    ):
        torch.testing.assert_close(x, z, rtol=1e-9, atol=1e-9)
