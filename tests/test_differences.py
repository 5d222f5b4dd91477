"""The differences that a model reads beside its inputs, against a loop, in every form."""

import pytest
import torch
from torch import Tensor

import dualform as df
from dualform.core.errors import ArgumentError, ConfigError
from dualform.core.packing import from_lengths
from dualform.core.tree import clone
from dualform.layers.s4d import S4DConfig
from dualform.models.entrance import Entrance
from dualform.models.heads import HEADS

CONFIG = df.ModelConfig(0, 6, {"S": (S4DConfig(d_state=4),)}, "SS")
LENGTHS = torch.tensor([9, 4, 0, 6])
KEEP = torch.arange(9) < LENGTHS[:, None]
NAN = float("nan")
MISSING = ("refused", "marked", "carried")


def inputs(missing: str) -> Tensor:
    source = torch.Generator().manual_seed(1)
    x = 5 + 3 * torch.randn(4, 9, 2, dtype=torch.float64, generator=source)
    gone = torch.rand(4, 9, 2, generator=source) < 0.4
    return x if missing == "refused" else x.masked_fill(gone, NAN)


def build(missing: str, kind: str = "StepRegressor") -> df.StepRegressor:
    torch.manual_seed(0)
    pooled = {"pooling": "mean"} if kind.startswith("Sequence") else {}
    model = HEADS[kind](CONFIG, 3, inputs=2, standardise="differences", missing=missing, **pooled).double().eval()
    model.fit_inputs(inputs(missing), lengths=LENGTHS)
    return model


def loop(entrance: Entrance, x: Tensor, elapsed: float) -> Tensor:
    """What the blocks read of one sequence ``(T, C)``, channel by channel and step by step."""
    rows = torch.zeros(len(x), entrance.width, dtype=x.dtype)
    for c in range(2):
        last = None
        for t, value in enumerate(x[:, c].tolist()):
            there = value == value
            z = float((value - entrance.mean[c]) / entrance.deviation[c]) if there else None
            if entrance.missing == "carried":
                rows[t, c] = z if there else (last or 0.0)
            else:
                rows[t, c] = z if there else 0.0
            if entrance.missing == "marked":
                rows[t, 2 + c] = float(not there)
            if there and last is not None:
                rows[t, rows.shape[1] - 2 + c] = (z - last) / (float(entrance.slope[c]) * elapsed)
            last = z if there else last
    return rows


@pytest.mark.parametrize("missing", MISSING)
def test_whole_packed_and_in_steps_they_are_those_of_a_loop(missing):
    model, x = build(missing), inputs(missing)
    entrance = model.entrance
    want = torch.stack([loop(entrance, row, 2.0) for row in x])
    y, left = entrance("test", x, elapsed=2.0)
    torch.testing.assert_close(y, want)
    _, middle = entrance("test", x[:, :4], elapsed=2.0)
    torch.testing.assert_close(entrance("test", x[:, 4:], middle, elapsed=2.0)[0], want[:, 4:])
    held = torch.zeros(4, entrance.held, dtype=x.dtype)
    for t in range(9):
        y, held = entrance("test", x[:, t : t + 1], held, elapsed=torch.full((4, 1), 2.0))
        torch.testing.assert_close(y[:, 0], want[:, t])
    torch.testing.assert_close(held, left)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["StepRegressor", "SequenceRegressor"])
@pytest.mark.parametrize("missing", MISSING)
def test_models_are_the_same_whole_padded_packed_and_stepped(missing, kind):
    model, x = build(missing, kind), inputs(missing)
    step, pooled = kind.startswith("Step"), kind.startswith("Sequence")
    y, end = model(x, lengths=LENGTHS, rate=2.0)
    line, packed_end = model(x[KEEP][None], cu_seqlens=from_lengths(LENGTHS), rate=2.0)
    torch.testing.assert_close(line[0] if step else line, y[KEEP] if step else y)
    torch.testing.assert_close((packed_end.blocks if pooled else packed_end)[-1], (end.blocks if pooled else end)[-1])
    for row in (0, 1, 3):
        n = int(LENGTHS[row])
        alone, _ = model(x[row : row + 1, :n], rate=2.0)
        torch.testing.assert_close(alone[0], y[row, :n] if step else y[row])
        state, prepared, found = model.init_state(1), model.prepare(rate=2.0), []
        other = clone(state)
        for t in range(n):
            out, state = model.step(x[row : row + 1, t], state, rate=2.0)
            same, other = prepared.step(x[row : row + 1, t], other)
            torch.testing.assert_close(same, out)
            found.append(out)
        torch.testing.assert_close(torch.cat(found) if step else found[-1][0], y[row, :n] if step else y[row])


def test_an_interval_counts_as_that_many_steps():
    model, x = build("refused"), inputs("refused")
    y, _ = model(x, intervals=torch.full((4, 9), 3.0, dtype=torch.float64))
    torch.testing.assert_close(y, model(x, rate=3.0)[0])
    state = model.init_state(4)
    for t in range(9):
        one, state = model.step(x[:, t], state, interval=torch.full((4,), 3.0, dtype=torch.float64))
        torch.testing.assert_close(one, y[:, t])


def test_the_slope_is_of_differences_inside_sequences(tmp_path):
    model, x = build("refused"), inputs("refused")
    z = (x - model.entrance.mean) / model.entrance.deviation
    inside = torch.cat([z[i, : int(n)].diff(dim=0) for i, n in enumerate(LENGTHS)])
    torch.testing.assert_close(model.entrance.slope, inside.square().mean(0).sqrt())
    model.save(tmp_path)
    torch.testing.assert_close(df.load(tmp_path).eval()(x)[0], model(x)[0], rtol=0, atol=0)
    model.fit_inputs(x[:, :1])
    assert model.entrance.slope.tolist() == [1, 1]


def test_the_slope_is_per_step_where_intervals_are_given():
    model, x = build("refused"), inputs("refused")
    times = 0.5 + torch.rand(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    model.fit_inputs(x, lengths=LENGTHS, intervals=times)
    z = (x - model.entrance.mean) / model.entrance.deviation
    own = [z[i, :n].diff(dim=0) / times[i, 1:n, None] for i, n in enumerate(LENGTHS.tolist()) if n]
    torch.testing.assert_close(model.entrance.slope, torch.cat(own).square().mean(0).sqrt())
    one = model.entrance.slope.clone()
    model.fit_inputs(x, lengths=LENGTHS, intervals=2 * times)
    torch.testing.assert_close(model.entrance.slope, one / 2)
    with pytest.raises(ArgumentError, match="intervals"):
        model.fit_inputs(x, intervals=times[:2])


def test_another_word_is_refused():
    with pytest.raises(ConfigError, match="standardise is 'slopes', expected True, False or 'differences'"):
        Entrance(2, standardise="slopes")
