"""Linear-Gaussian models for tests, random and structural ones, and the joint distribution that answers everything."""

import math

import torch

import dualform as df

NAN = float("nan")
FORMS = [False, True]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def terms(n=3, m=2, k=None, inputs=0, batch=(), steps=None, seed=0):
    """Every matrix of a random stable model; ``steps`` makes all of them vary in time."""
    time = () if steps is None else (steps,)
    k = n if k is None else k
    A, q, r, p = (normal(*s, seed=seed + i) for i, s in enumerate(((*batch, *time, n, n), (*batch, *time, k, k),
                                                                   (*batch, *time, m, m), (*batch, n, n))))  # fmt: skip
    found = {
        "A": 0.9 * A / torch.linalg.matrix_norm(A, 2)[..., None, None],
        "C": normal(*batch, *time, m, n, seed=seed + 4),
        "Q": q @ q.mT,
        "R": r @ r.mT + 0.1 * torch.eye(m, dtype=torch.float64),
        "m0": normal(*batch, n, seed=seed + 5),
        "P0": p @ p.mT,
        "c": normal(*batch, *time, n, seed=seed + 6),
        "d": normal(*batch, *time, m, seed=seed + 7),
        "S": normal(*batch, *time, n, k, seed=seed + 8),
    }
    if inputs:
        found |= {"B": normal(*batch, *time, n, inputs, seed=seed + 9)}
        found |= {"D": normal(*batch, *time, m, inputs, seed=seed + 10)}
    return found


def build(given, steps=None, **more):
    varying = tuple(name for name in given if name not in ("m0", "P0")) if steps is not None else ()
    return df.LinearGaussian(**given, time_varying=varying, **more)


def observations(*shape, missing=0.3, seed=1):
    g = torch.Generator().manual_seed(seed)
    y = torch.randn(shape, generator=g, dtype=torch.float64)
    return y.masked_fill(torch.rand(shape, generator=g) < missing, NAN)


def joint(model, length, u=None):
    """Mean and covariance of the states 0 .. T and of the observations 1 .. T of one series, stacked."""

    def at(name, t):
        value = getattr(model, name)
        return value[t] if value is not None and name in model.time_varying else value

    n, first = model.d_state, model.prior == "first"
    mean, cov = model.m0, model.P0
    means, to_start, noise = [mean], [torch.eye(n, dtype=mean.dtype)], [torch.zeros(0, 0, dtype=mean.dtype)]
    gains = [mean.new_zeros(n, 0)]  # of all noise so far on each state
    width = 0
    for t in range(length):
        S = at("S", t) if model.S is not None else torch.eye(n, dtype=mean.dtype)
        A, Q = at("A", t), S @ at("Q", t) @ S.mT
        c = at("c", t) if model.c is not None else mean.new_zeros(n)
        if model.B is not None:
            c = c + at("B", t) @ u[t]
        if first and t == 0:
            A, Q, c = torch.eye(n, dtype=mean.dtype), torch.zeros_like(Q), torch.zeros_like(c)
        means.append(A @ means[-1] + c)
        to_start.append(A @ to_start[-1])
        gains = [torch.cat([g, g.new_zeros(n, n)], 1) for g in gains]
        new = A @ gains[-1]
        new[:, width:] = torch.eye(n, dtype=mean.dtype)
        gains.append(new)
        noise.append(Q)
        width += n
    G, F = torch.cat(gains), torch.cat(to_start)
    states, W = torch.cat(means), torch.block_diag(*noise[1:])
    P = F @ cov @ F.mT + G @ W @ G.mT
    C = torch.block_diag(*[at("C", t) for t in range(length)])
    level = torch.cat([at("d", t) for t in range(length)]) if model.d is not None else 0
    if model.D is not None:
        level = level + torch.cat([at("D", t) @ u[t] for t in range(length)])
    H = torch.cat([C.new_zeros(len(C), n), C], 1)
    R = torch.block_diag(*[at("R", t) for t in range(length)])
    return states, P, H, level, R, F


def posterior(model, y, u=None, upto=None, diffuse=None):
    """Mean and covariance of the states 0 .. T given the observations before step ``upto``, and their log-likelihood.

    With diffuse directions, by generalised least squares; the log-likelihood is that of KFAS.
    """
    length = len(y)
    states, P, H, level, R, F = joint(model, length, u)
    seen = ~y.isnan()
    seen[length if upto is None else upto :] = False
    seen = seen.flatten()
    H, R = H[seen], R[seen][:, seen]
    error = (y.flatten() - level)[seen] - H @ states
    V = H @ P @ H.mT + R
    gain = P @ H.mT @ torch.linalg.inv(V)
    mean, cov = states + gain @ error, P - gain @ H @ P
    total = -(error @ torch.linalg.solve(V, error) + torch.logdet(V) + len(error) * math.log(2 * math.pi)) / 2
    if diffuse is not None:
        X = H @ F @ diffuse
        information = X.mT @ torch.linalg.solve(V, X)
        delta = torch.linalg.solve(information, X.mT @ torch.linalg.solve(V, error))
        T = F @ diffuse - gain @ X
        mean, cov = mean + T @ delta, cov + T @ torch.linalg.inv(information) @ T.mT
        total = total + (delta @ information @ delta - torch.logdet(information)) / 2
        total = total + X.shape[1] * math.log(2 * math.pi) / 2
    n = model.d_state
    return mean.view(-1, n), cov.view(length + 1, n, length + 1, n).transpose(1, 2), total


def seasonal(params, season, *, trend=False, harmonics=0, **more):
    """A structural model: variances of the irregular, level, (slope,) and season, the first season at the front."""
    level = torch.tensor([[1.0, 1.0], [0.0, 1.0]] if trend else [[1.0]], dtype=torch.float64)
    if harmonics:
        turns = [2 * math.pi * j / season for j in range(1, harmonics + 1)]
        wave = [
            torch.tensor([[math.cos(w), math.sin(w)], [-math.sin(w), math.cos(w)]], dtype=torch.float64) for w in turns
        ]
        season_block, see, moved = torch.block_diag(*wave), [1.0, 0.0] * harmonics, [params[-1]] * (2 * harmonics)
    else:
        season_block = torch.diag(torch.ones(season - 2, dtype=torch.float64), -1)
        season_block[0] = -1
        see, moved = [1.0] + [0.0] * (season - 2), [params[-1]] + [0.0] * (season - 2)
    C = torch.tensor([[1.0] + [0.0] * trend + see], dtype=torch.float64)
    Q = torch.diag(torch.tensor([*params[1:-1], *moved], dtype=torch.float64))
    R = torch.tensor([[params[0]]], dtype=torch.float64)
    return df.LinearGaussian(torch.block_diag(level, season_block), C, Q, R, prior="first", **more)
