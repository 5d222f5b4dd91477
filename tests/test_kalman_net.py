"""KalmanNet: the filter that it begins as, the laws, what it learns, and what becomes of a gain that is unstable."""

import math

import pytest
import torch
from torch import Tensor

import dualform as df
from dualform.core.errors import ArgumentError
from dualform.core.laws import LAWS, Trial
from dualform.gaussian.kalman_net import KalmanNet

NAN = math.nan


def turning(angle: float, Q: float = 0.04, R: float = 1.0) -> df.LinearGaussian:
    """A point that circles slowly inwards, of which one coordinate is seen."""
    c, s = 0.98 * math.cos(angle), 0.98 * math.sin(angle)
    eye = torch.eye(2, dtype=torch.float64)
    return df.LinearGaussian([[c, -s], [s, c]], [[1.0, 0.0]], Q * eye, [[R]], P0=eye)


def series(count: int, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    y, x = turning(0.3).sample(steps, count, generator=torch.Generator().manual_seed(seed))
    return y, x


def error(mean: Tensor, x: Tensor) -> float:
    return (mean - x).square().mean().item()


def built(model, seed: int = 0, gain: float = 0.3, **options) -> KalmanNet:
    """With weights that do something."""
    torch.manual_seed(seed)
    net = KalmanNet(model, hidden=6, **options)
    torch.nn.init.normal_(net.head.weight, std=gain)
    return net


def test_it_begins_as_the_filter_of_its_model():
    y, _ = series(3, 12, 0)
    y[1, 4:6] = NAN
    model = turning(0.1)
    torch.testing.assert_close(KalmanNet(model)(y)[0], model.filter(y).mean)
    bent = df.NonlinearGaussian(
        torch.sin, lambda h: h[:1] * h[1:], Q=0.1 * torch.eye(2), R=[[0.1]], m0=[1.0, 0.5], P0=0.5
    )
    want = bent.filter(y.float()).mean
    torch.testing.assert_close(KalmanNet(bent)(y.float())[0], want)


@pytest.mark.parametrize("law", LAWS)
def test_it_obeys_the_laws(law):
    y, _ = series(4, 11, 1)
    y[2, 7] = NAN
    net = built(turning(0.3))
    for tensor in net.model.buffers():
        tensor.requires_grad_(False)
    symmetric = lambda g: g._replace(belief=g.belief._replace(cov=(g.belief.cov + g.belief.cov.mT) / 2))  # noqa: E731
    worst = LAWS[law](Trial(net, y, warmup=4, tangent=symmetric))
    assert worst is None or worst.error < 1e-9, worst


def test_a_step_is_what_the_docstring_says():
    y, _ = series(2, 5, 2)
    net = built(turning(0.3))
    with torch.no_grad():
        _, state = net(y[:, :4])
        mean, after = net.step(y[:, 4], state)
    A, C, Q, R = (getattr(net.model, name) for name in "ACQR")
    for row in range(2):
        m, P = A @ state.belief.mean[row], A @ state.belief.cov[row] @ A.T + Q
        S = (C @ P @ C.T + R).squeeze()
        v, D = y[row, 4, 0] - m[0], P.diagonal().sqrt()
        w = v / S.sqrt()
        read = torch.cat([w[None], state.moved[row], (m - state.belief.mean[row]) / D]).asinh()
        with torch.no_grad():
            g = net.cell(read[None], state.hidden[row : row + 1])
            extra = D * net.bound * torch.tanh(net.head(g))[0] * w
        torch.testing.assert_close(mean[row], m + P[:, 0] / S * v + extra)
        torch.testing.assert_close(after.surprise[row], 0.9 * state.surprise[row] + 0.1 * w**2)


def test_on_a_model_that_is_right_it_stays_near_the_optimum():
    """Within 5 % of the mean squared error of the Kalman filter, which is the least that there is."""
    torch.manual_seed(0)
    net = KalmanNet(turning(0.3), hidden=8)
    net.fit(*series(48, 30, 3), passes=8, truncate=15, batch=48)
    y, x = series(200, 30, 4)
    best = error(turning(0.3).filter(y).mean, x)
    with torch.no_grad():
        assert best < error(net(y)[0], x) < 1.05 * best


def test_on_a_model_that_is_wrong_it_beats_its_filter():
    """The model takes the noise of the state for a hundredth of what it is, and turns at another speed."""
    y, x = series(200, 30, 4)
    wrong, best = turning(0.1, Q=0.0004), error(turning(0.3).filter(y).mean, x)
    torch.manual_seed(0)
    net = KalmanNet(wrong, hidden=12, bound=20.0)
    losses = []
    net.fit(*series(64, 30, 3), passes=20, truncate=15, lr=2e-2, tell=lambda done, loss: losses.append(loss))
    with torch.no_grad():
        found, nominal = error(net(y)[0], x), error(wrong.filter(y).mean, x)
    assert losses[-1] < 0.8 * losses[0]
    assert found < 0.6 * nominal and found < 2 * best, (found, nominal, best)


def test_a_gain_that_is_unstable_falls_back_to_that_of_the_model():
    y, x = series(20, 60, 5)
    net = KalmanNet(turning(0.3), hidden=4, bound=50.0)
    torch.nn.init.constant_(net.head.bias, -1.0)
    with torch.no_grad():
        lost = error(net(y)[0], x)
        net.usual.fill_(2.0)
        kept, state = net(y)
    best = error(turning(0.3).filter(y).mean, x)
    assert lost > 1e6 * best  # it diverges
    assert error(kept, x) < 1e4 * best and kept.isfinite().all() and state.belief.mean.isfinite().all()
    net.usual.zero_()  # then everything is a surprise
    with torch.no_grad():
        torch.testing.assert_close(net(y)[0], turning(0.3).filter(y).mean)


def test_what_does_not_fit_is_named():
    with pytest.raises(ArgumentError, match="model is float, expected a LinearGaussian"):
        KalmanNet(1.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ArgumentError, match="the model is diffuse"):
        KalmanNet(df.LinearGaussian([[1.0]], [[1.0]], [[1.0]], [[1.0]], P0="diffuse"))
    with pytest.raises(ArgumentError, match="patience 1"):
        KalmanNet(turning(0.1), patience=1)
    net, (y, x) = KalmanNet(turning(0.1)), series(2, 6, 0)
    with pytest.raises(ArgumentError, match="passes 0"):
        net.fit(y, x, passes=0)
    with pytest.raises(ArgumentError, match="states has shape"):
        net.fit(y, x[:, :5])
    with pytest.raises(ArgumentError, match="x has shape"):
        net(y[..., [0, 0]])
