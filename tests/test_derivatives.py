"""Derivatives that kernels have no rules for: of every mixer, in rows and packed, right or refused with the way out."""

import pytest
import torch
from torch.autograd import forward_ad

from dualform.core.errors import ArgumentError, BackendError
from dualform.core.packing import Packing
from dualform.layers.registry import MIXERS
from dualform.ops import backend, linear_scan

BORDERS = torch.tensor([0, 3, 3, 4])
SMALL = {"attention": {"heads": 2}, "mamba2": {"d_head": 4, "d_state": 2}, "mamba": {"d_state": 2}}
SMALL |= {key: {"d_head": 2} for key in ("rwkv6", "rwkv7")} | {"gla": {"heads": 2}}
STEP = 1e-6

pytestmark = [  # forward mode scripts decompositions, and vmap runs row by row what it has no rule for
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def slope(f, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x).square().sum(), x)[0]


def forward_mode(f, x, v):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent


def difference(f, x, v):
    with torch.no_grad():
        return (f(x + STEP * v) - f(x - STEP * v)) / (2 * STEP)


# What is asked for, and the same from values and first derivatives.
KINDS = {
    "jvp": (lambda f, x, v: torch.func.jvp(f, (x,), (v,))[1], difference),
    "forward_ad": (forward_mode, difference),
    "grad": (lambda f, x, v: torch.func.grad(lambda x: f(x).square().sum())(x), lambda f, x, v: slope(f, x)),
    "vmap": (lambda f, x, v: torch.func.vmap(f)(torch.stack([x, v]))[1], lambda f, x, v: f(v)),
    "hvp": (
        lambda f, x, v: torch.autograd.functional.hvp(lambda x: f(x).square().sum(), x, v)[1],
        lambda f, x, v: (slope(f, x + STEP * v) - slope(f, x - STEP * v)) / (2 * STEP),
    ),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", MIXERS)
def test_right_or_refused(name, packed):
    torch.manual_seed(0)
    layer = MIXERS[name](**SMALL.get(name, {})).build(4).double()
    x, v = normal(2, 1, 4, 4)

    def f(x):
        return layer(x, cu_seqlens=BORDERS if packed else None)[0]

    for kind, (ask, exactly) in KINDS.items():
        want = exactly(f, x, v)
        try:
            found = ask(f, x, v)
        except BackendError as error:
            assert "backend('reference')" in str(error), kind
        else:
            torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6, msg=lambda text, kind=kind: f"{kind}: {text}")
        with backend("reference"):
            found = ask(f, x, v)
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6, msg=lambda text, kind=kind: f"{kind}: {text}")


def test_a_packing_outlives_the_transform_that_read_it():
    """What it keeps are plain tensors, whoever made them first."""
    x = normal(1, 4, 2)
    packing = Packing.of("test", BORDERS, x)

    def f(x):
        assert packing.longest == 3
        return linear_scan(x, x, cu_seqlens=packing)[0] * packing.places(4)[1][:, None]

    want = f(x)
    fresh = packing = Packing.of("test", BORDERS, x)
    with backend("reference"):
        torch.func.jvp(f, (x,), (x,))
    torch.testing.assert_close(f(x), want)
    assert fresh.places(4)[1].tolist() == [0, 1, 2, 0] and fresh.not_empty()[0].numpy().tolist() == [0, 2]


def test_borders_made_inside_of_a_transform_are_read():
    x = normal(1, 4, 2)

    def f(x, lengths):
        borders = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        return linear_scan(x, x, cu_seqlens=borders)[0].sum()

    lengths = torch.tensor([1, 3])
    with backend("reference"):
        want = torch.autograd.functional.jacobian(lambda x: f(x, lengths), x)
        torch.testing.assert_close(torch.func.grad(f)(x, lengths), want)
        with pytest.raises(ArgumentError, match=r"cu_seqlens differ along an axis of torch\.func\.vmap"):
            torch.func.vmap(f, (None, 0))(x, torch.tensor([[1, 3], [2, 2]]))
