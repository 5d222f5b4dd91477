"""Deep Kalman filters: a small network as the transition of an extended filter, learned by the likelihood."""

import torch
from torch import Tensor, nn

import dualform as df


class Swing(nn.Module):
    """``x + W2 tanh(W1 x + b1)``: what moves a state is learned, and at the start nothing does."""

    def __init__(self, states: int, hidden: int):
        super().__init__()
        self.inner = nn.Linear(states, hidden, dtype=torch.float64)
        self.outer = nn.Linear(hidden, states, bias=False, dtype=torch.float64)
        nn.init.normal_(self.outer.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(torch.tanh(self.inner(x)))


def pendulum(x: Tensor) -> Tensor:
    return torch.stack([x[0] + 0.3 * x[1], x[1] - 0.3 * torch.sin(x[0])])


def model(f) -> df.NonlinearGaussian:
    eye = torch.eye(2, dtype=torch.float64)
    return df.NonlinearGaussian(f, lambda x: x, Q=0.01 * eye, R=0.01 * eye, P0=eye)


def test_a_network_learns_the_transition_of_a_filter():
    """Its likelihood of new series comes near that of the true pendulum, far from that of a state that stays."""
    g = torch.Generator().manual_seed(0)
    (y, _), (new, _) = (model(pendulum).sample(14, batch=10, generator=g) for _ in range(2))
    torch.manual_seed(0)
    learned = model(Swing(2, 8))
    optimizer = torch.optim.Adam(learned.parameters(), lr=5e-2)
    for _ in range(30):
        optimizer.zero_grad()
        loss = -learned.log_likelihood(y).mean()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        best, found, none = (m.log_likelihood(new).mean() for m in (model(pendulum), learned, model(lambda x: 1.0 * x)))
        ahead, still = (m.forecast(new[:, :10], 4).mean for m in (learned, model(lambda x: 1.0 * x)))
    assert none < found < best and best - found < 0.45 * (best - none)
    error, naive = ((new[:, 10:] - mean).square().mean() for mean in (ahead, still))
    assert error < 0.5 * naive


def test_the_gradient_of_the_likelihood_is_that_of_the_loop():
    """The extended filter of a network, step by step, with gradients by PyTorch alone."""
    torch.manual_seed(0)
    f = Swing(2, 3)
    nn.init.normal_(f.outer.weight, std=0.5)
    m, (y, _) = model(f), model(pendulum).sample(6, batch=2, generator=torch.Generator().manual_seed(1))
    m.log_likelihood(y).sum().backward()
    got = [p.grad.clone() for p in f.parameters()]
    f.zero_grad()
    total = y.new_zeros(())
    for series in y:
        mean, P, eye = y.new_zeros(2), torch.eye(2, dtype=y.dtype), torch.eye(2, dtype=y.dtype)
        for seen in series:
            A = torch.func.jacrev(f)(mean)
            mean, P = f(mean), A @ P @ A.T + m.Q
            S, v = P + m.R, seen - mean
            total = total + torch.distributions.MultivariateNormal(mean, S).log_prob(seen)
            K = P @ torch.linalg.inv(S)
            mean, P = mean + K @ v, (eye - K) @ P
    total.backward()
    for p, want in zip(f.parameters(), got, strict=True):
        torch.testing.assert_close(want, p.grad)
