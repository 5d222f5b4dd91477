"""The LSTM against the textbook's gates, its states and packing against running rows alone."""

import pytest
import torch
from torch import Tensor

from dualform.core.errors import ArgumentError, ConfigError
from dualform.layers.lstm import LSTM, LSTMConfig, LSTMState
from dualform.ops.lstm import _spans, lstm
from vectors import close

CONFIGS = {"plain": (LSTMConfig(), 3), "wide": (LSTMConfig(hidden=5, layers=2), 3), "smallest": (LSTMConfig(), 1)}


@pytest.fixture(params=CONFIGS)
def layer(request: pytest.FixtureRequest) -> LSTM:
    torch.manual_seed(0)
    config, d_model = CONFIGS[request.param]
    return config.build(d_model).double()


def sample(layer: LSTM, rows: int, length: int) -> tuple[Tensor, LSTMState]:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(rows, length, layer.d_model, dtype=torch.float64, generator=draw)
    h = torch.randn(2, rows, layer.layers, layer.hidden, dtype=torch.float64, generator=draw)
    return x, LSTMState(h[0], h[1])


def oracle(layer: LSTM, x: Tensor, state: LSTMState) -> tuple[Tensor, LSTMState]:
    """The gates one by one, for ``(B, T, D)``."""
    h, c = [list(s.unbind(1)) for s in state]
    outputs = []
    for x_t in x.unbind(1):
        below = x_t
        for i in range(layer.layers):
            W, U = (getattr(layer.lstm, f"weight_{name}_l{i}").chunk(4) for name in ("ih", "hh"))
            b, d = (getattr(layer.lstm, f"bias_{name}_l{i}").chunk(4) for name in ("ih", "hh"))
            into, forget, new, out = (below @ W[j].T + b[j] + h[i] @ U[j].T + d[j] for j in range(4))
            c[i] = torch.sigmoid(forget) * c[i] + torch.sigmoid(into) * torch.tanh(new)
            h[i] = below = torch.sigmoid(out) * torch.tanh(c[i])
        outputs.append(layer.out_proj(below))
    return torch.stack(outputs, 1), LSTMState(torch.stack(h, 1), torch.stack(c, 1))


def gradients(layer: LSTM, x: Tensor, state: LSTMState, y: Tensor, after: LSTMState) -> tuple[Tensor, ...]:
    loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()
    loss = loss + after.h.square().sum() + after.c.pow(3).sum()
    return torch.autograd.grad(loss, [x, *state, *layer.parameters()])


def test_oracle(layer: LSTM) -> None:
    x, state = sample(layer, 2, 7)
    for tensor in (x, *state):
        tensor.requires_grad_()
    y, after = layer(x, state)
    want, want_after = oracle(layer, x, state)
    close(y, want, 1e-12)
    close(after.h, want_after.h, 1e-12)
    close(after.c, want_after.c, 1e-12)
    for got, expected in zip(
        gradients(layer, x, state, y, after), gradients(layer, x, state, want, want_after), strict=True
    ):
        close(got, expected, 1e-11)
    assert (after.h.shape, after.h.dtype) == ((2, layer.layers, layer.hidden), torch.float64)


def test_split_and_step(layer: LSTM) -> None:
    x, state = sample(layer, 2, 7)
    want, want_after = layer(x, state)
    first, half = layer(x[:, :3], state)
    second, after = layer(x[:, 3:], half)
    close(torch.cat([first, second], 1), want, 1e-12)
    close(after.c, want_after.c, 1e-12)
    for t in range(7):
        y, state = layer.step(x[:, t], state)
        close(y, want[:, t], 1e-12)


MANY = (2, 120, 0, *[1] * 80, 90, *[7] * 60)  # time is cut: at step 1, and at step 7


@pytest.mark.parametrize("lengths", [(2, 0, 5, 1), (0, 3), (0, 0), (4,), (1, 1, 1), MANY], ids=len)
def test_packed(layer: LSTM, lengths: tuple[int, ...]) -> None:
    x, _ = sample(layer, 1, sum(lengths))
    _, state = sample(layer, len(lengths), 1)
    for tensor in (x, *state):
        tensor.requires_grad_()
    y, after = layer(x, state, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0))
    pieces = []
    for i, part in enumerate(x.split(list(lengths), 1)):
        row = LSTMState(state.h[i : i + 1], state.c[i : i + 1])
        pieces.append(oracle(layer, part, row) if lengths[i] else (part, row))
    want = torch.cat([y for y, _ in pieces], 1)
    want_after = LSTMState(*(torch.cat(leaf) for leaf in zip(*(row for _, row in pieces), strict=True)))
    assert y.shape == want.shape == x.shape
    close(after.h, want_after.h, 1e-12)
    close(after.c, want_after.c, 1e-12)
    if sum(lengths):
        close(y, want, 1e-12)
        for got, expected in zip(
            gradients(layer, x, state, y, after), gradients(layer, x, state, want, want_after), strict=True
        ):
            close(got, expected, 1e-11)


def test_ragged_rows_run_in_spans_whose_padding_at_most_doubles_the_work() -> None:
    borders = torch.tensor([0, *MANY]).cumsum(0)
    *_, places, first, second, third = _spans(borders)
    assert [tuple(steps.shape) for steps in (first, second, third)] == [(1, 143), (6, 63), (113, 2)]
    read = torch.cat([steps.flatten() for steps in (first, second, third)])
    assert torch.equal(read[places], torch.arange(sum(MANY)))
    assert (read == sum(MANY)).sum() < sum(MANY)


@pytest.mark.parametrize("large", [1.0, 1e6])
def test_a_row_is_held_exactly_where_its_sequence_has_ended(large: float) -> None:
    """In float32, where PyTorch has a kernel of its own for rows; inputs that fill the gates reach no padding."""
    torch.manual_seed(0)
    layer, lengths = LSTMConfig(hidden=6).build(4), [3, 300, 1]
    x = large * torch.randn(1, sum(lengths), 4)
    with torch.no_grad():
        _, after = layer(x, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0))
        for i, part in enumerate(x.split(lengths, 1)):
            _, alone = layer(part)
            close(after.h[i], alone.h[0], 1e-6)
            close(after.c[i], alone.c[0], 1e-6)


def test_what_is_not_finite_stays_in_its_sequence() -> None:
    torch.manual_seed(0)
    layer, x = LSTMConfig().build(3), torch.randn(1, 9, 3)
    want, end = layer(x, cu_seqlens=torch.tensor([0, 2, 9]))
    x[0, 0] = torch.nan
    y, after = layer(x, cu_seqlens=torch.tensor([0, 2, 9]))
    assert y[0, :2].isnan().all() and torch.equal(y[0, 2:], want[0, 2:])
    assert torch.equal(after.c[1], end.c[1]) and torch.equal(after.h[1], end.h[1])


def test_low_precision_keeps_a_wide_state() -> None:
    x = torch.randn(1, 5, 4)
    layer = LSTMConfig(hidden=6).build(4)
    want, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x)
        close(y, want, 5e-2)
    assert state.c.dtype == torch.float32
    y, state = layer.bfloat16()(x.bfloat16())
    assert (y.dtype, state.h.dtype, state.c.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    packed, _ = layer(x.bfloat16(), cu_seqlens=torch.tensor([0, 5]))
    close(packed, y, 2e-2)


def test_errors_say_what_came() -> None:
    with pytest.raises(ConfigError, match="layers 0"):
        LSTMConfig(layers=0).build(3)
    layer = LSTMConfig().build(3)
    with pytest.raises(ArgumentError, match="x has shape"):
        layer(torch.randn(1, 2, 4))
    with pytest.raises(ArgumentError, match="state has 2 rows, expected 1"):
        layer(torch.randn(1, 2, 3), layer.init_state(2))


@pytest.mark.gpu
@pytest.mark.parametrize("borders", [None, [0, 3, 3, 7]], ids=["whole", "packed"])
def test_cudnn_has_gradients_in_eval_too(borders):
    """Its own network refuses them there."""
    layer = LSTMConfig().build(3).cuda()
    x = torch.randn(1, 7, 3, device="cuda")
    packed = None if borders is None else torch.tensor(borders)
    found = [
        torch.autograd.grad(layer.train(mode)(x, cu_seqlens=packed)[0].sum(), [*layer.parameters()])
        for mode in (True, False)
    ]
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:RNN module weights are not part")
def test_cudnn_takes_tensors_as_they_lie():
    draw = torch.Generator().manual_seed(0)
    x, h, c, W, U = (torch.randn(*s, generator=draw).cuda() for s in ((1, 6, 3), (5, 3), (3, 5), (20, 3), (20, 7)))
    b, packing = torch.zeros(20, device="cuda"), torch.tensor([0, 2, 2, 6])
    given = x, h.T, c, W, U[:, :5], b, b
    for got, want in zip(
        lstm(*given, cu_seqlens=packing), lstm(*(m.contiguous() for m in given), cu_seqlens=packing), strict=True
    ):
        assert torch.equal(got, want)
