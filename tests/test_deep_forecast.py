"""Deep forecasters: what they read and say, beside loops and numbers by hand; training, folders, and the command."""

import math
import pickle
import shutil
import sys
from functools import partial

import pandas as pd
import pytest
import torch
from torch import Tensor

from dualform.cli import main as cli
from dualform.core.errors import ArgumentError, CheckpointError
from dualform.forecast import Forecaster, evaluate
from dualform.forecast.deep.network import BACKBONES, LEVELS, QuantileNetwork, _mixed, _weights
from dualform.forecast.deep.synthetic import KINDS, SEASONS, synthetic
from dualform.forecast.deep.training import pretrain, train_on
from dualform.forecast.deep.view import ANCHORS, RATES, view
from dualform.forecast.distribution import Moments, Table
from dualform.forecast.families import called, candidates_of, deep
from dualform.forecast.shape import Shape

NAN = math.nan


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(horizon: int = 4, context: int = 24, backbone: str = "s4d") -> QuantileNetwork:
    torch.manual_seed(0)
    made = QuantileNetwork.build(backbone, horizon, context, width=8, layers=1)
    made.model.double().eval()
    return made


# Synthetic series.


def test_series_are_those_of_their_seed():
    first, second, other = (synthetic(8, 50, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    torch.testing.assert_close(first.y, second.y, equal_nan=True)
    assert first.kind == second.kind and not first.y.nan_to_num().equal(other.y.nan_to_num())


def test_series_are_of_many_kinds():
    found = synthetic(400, 120, torch.Generator().manual_seed(0))
    assert all(70 < found.kind.count(kind) < 130 for kind in KINDS)
    assert {*found.season.tolist()} == {*SEASONS}
    y = found.y.nan_to_num(nan=0.0)
    assert y.isfinite().all() and (y.std(1) > 0).all()
    assert 0.002 < found.y.isnan().double().mean() < 0.05 and (found.y.isnan().sum(1) < 60).all()
    z = found.y - found.y.nanmean(1, keepdim=True)
    scale = z.square().nanmean(1).sqrt()

    def correlation(lag: Tensor) -> Tensor:
        ahead = z.gather(1, (torch.arange(120) + lag[:, None]).clamp_max(119))
        ahead = torch.where(torch.arange(120) + lag[:, None] < 120, ahead, NAN)
        return (z * ahead).nanmean(1) / scale.square()

    near = correlation(torch.ones(400, dtype=torch.int64))
    assert (near > 0.95).double().mean() > 0.1 and (near < 0.3).double().mean() > 0.1  # smooth ones, and rough ones
    seasonal = found.season > 1
    assert (correlation(found.season)[seasonal] > 0.6).double().mean() > 0.3  # with a season that can be seen
    skewness = (z / scale[:, None]).pow(3).nanmean(1)
    assert (skewness.abs() > 1).double().mean() > 0.05  # some that grow or have outliers
    with pytest.raises(ArgumentError, match="count 0 and length 5"):
        synthetic(0, 5, torch.Generator())


# What a network reads.


def simple_forecasts(y: list[float], m: int, origin: int, h: int) -> list[float]:
    """The simple forecasts of a series without gaps, one after the other."""
    last = y[origin]

    def at(t: int) -> float:
        return y[t] if t >= 0 else last

    k = -(-h // m)
    naive = at(origin + h - m * k)
    ago = [origin + h - m * (k + j) for j in range(3)]
    mean = sum(y[t] for t in ago if t >= 0) / len([t for t in ago if t >= 0]) if ago[0] >= 0 else last
    w = max(m, 4)
    drift = 0.0
    if origin + 1 - 2 * w >= 0:
        drift = (sum(y[origin + 1 - w : origin + 1]) - sum(y[origin + 1 - 2 * w : origin + 1 - w])) / w**2
    steps = m * k if m > 1 else h
    moved = []
    for rate in RATES:
        e = 0.0 if m > 1 else y[0]
        for t in range(1, origin + 1):
            new = (y[t] - y[t - m] if t >= m else 0.0) if m > 1 else y[t]
            e = (1 - rate) * e + rate * new
        moved.append(naive + e if m > 1 else e)
    overall = (last - y[0]) / max(origin, 1)
    centre = sum(y[: origin + 1]) / (origin + 1)
    return [last, naive, mean, naive + steps * drift, naive + steps * overall, *moved, centre]


@pytest.mark.parametrize("m", [1, 4])
def test_the_simple_forecasts_are_those_of_a_loop(m):
    y = draw(1, 30, seed=m).cumsum(1)
    origins = torch.tensor([2, 9, 21])
    found = view(y, torch.tensor([m]), origins, 6)
    for o, origin in enumerate(origins.tolist()):
        got = found.last[0, o] + found.scale[0] * found.anchors[0, o]
        want = [simple_forecasts(y[0].tolist(), m, origin, h) for h in range(1, 7)]
        torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))


def test_the_scale_is_known_at_the_first_origin():
    y = draw(2, 30)
    later = y.clone()
    later[:, 12:] = 1e6
    season, origins = torch.tensor([1, 4]), torch.tensor([11, 14])
    before, after = view(y, season, origins, 3), view(later, season, origins, 3)
    assert before.scale.equal(after.scale)
    torch.testing.assert_close(before.inputs[:, :12], after.inputs[:, :12], rtol=0, atol=0)
    torch.testing.assert_close(before.anchors[:, 0], after.anchors[:, 0])
    assert before.scale[0].item() == pytest.approx(y[0, :12].diff().abs().mean().item())


def test_what_is_before_a_series_changes_nothing_of_its_simple_forecasts():
    y, season, origin = draw(2, 20).cumsum(1), torch.tensor([1, 4]), torch.tensor([19])
    padded = torch.cat([torch.full((2, 13), NAN, dtype=torch.float64), y], 1)
    alone, behind = view(y, season, origin, 5), view(padded, season, origin + 13, 5)
    torch.testing.assert_close(behind.anchors, alone.anchors)
    torch.testing.assert_close(behind.scale, alone.scale)


# What it says.


@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_quantiles_do_not_cross_and_scale_with_the_series(backbone):
    made = network(backbone=backbone)
    with torch.no_grad():
        made.model.head.weight.mul_(100)
    y = list(draw(3, 30).cumsum(1))
    y[1][5:8] = NAN
    y[2] = y[2][:7]
    found = made.forecast(y, 4, 11)  # beyond what it says at once, too
    assert found.shape == (3, 11, len(LEVELS)) and found.isfinite().all() and (found.diff(dim=-1) >= 0).all()
    torch.testing.assert_close(made.forecast([1e4 + 7 * part for part in y], 4, 11), 1e4 + 7 * found)
    for part, row in zip(y, found, strict=True):  # whatever stands beside it
        torch.testing.assert_close(made.forecast([part], 4, 11)[0], row)


def test_the_loss_is_the_pinball_loss_of_what_it_says():
    made, y = network(), draw(2, 28).cumsum(1)
    y[0, -1] = NAN
    season, origins = torch.tensor([1, 4]), torch.tensor([20, 23])
    q = made.quantiles(y[:, :24], season, origins)
    scale = view(y[:, :24], season, origins, 4).scale
    terms = []
    for row in range(2):
        for o, origin in enumerate(origins.tolist()):
            for h in range(4):
                if (seen := y[row, origin + 1 + h].item()) == seen:
                    e = [(seen - q[row, o, h, k].item()) / scale[row].item() for k in range(len(LEVELS))]
                    terms.append(sum(max(p * d, (p - 1) * d) for p, d in zip(LEVELS, e, strict=True)) / len(LEVELS))
    assert made.loss(y, season, origins).item() == pytest.approx(sum(terms) / len(terms))


def test_a_mixture_of_equal_distributions_is_that_distribution():
    table = torch.special.ndtri(torch.tensor(LEVELS, dtype=torch.float64))
    mixed = _mixed(table.expand(1, len(LEVELS), 3, -1), _weights())
    torch.testing.assert_close(mixed[0, 0], table, atol=0.12, rtol=0)
    apart = torch.stack([table + 10 * (k - 5) for k in range(len(LEVELS))])[None, :, None]
    assert (_mixed(apart, _weights())[0, 0].diff() > 0).all() and abs(_mixed(apart, _weights())[0, 0, 5]) < 0.2


def test_a_table_of_normal_quantiles_is_normal_at_every_level():
    z = torch.special.ndtri(torch.tensor(LEVELS, dtype=torch.float64))
    table, levels = Table(2 + 3 * z[None], LEVELS), [0.003, 0.04, 0.5, 0.77, 0.999]
    want = 2 + 3 * torch.special.ndtri(torch.tensor(levels, dtype=torch.float64))
    torch.testing.assert_close(table.at(levels)[0], want)
    found = Moments.of_table(table, Shape())
    assert found.expected().item() == pytest.approx(2) and found.deviation.item() == pytest.approx(3, rel=0.01)
    grown = Moments.of_table(Table(0.2 + 0.3 * z[None], LEVELS), Shape(log=True))
    assert grown.expected().item() == pytest.approx(math.exp(0.2 + 0.3**2 / 2), rel=1e-3)
    torch.testing.assert_close(grown.quantiles([0.5])[0, 0].log().item(), 0.2)


# Training on a panel.


def waves(count: int, steps: int) -> dict[str, Tensor]:
    time = torch.arange(steps, dtype=torch.float64)
    noise = 0.1 * draw(count, steps, seed=3)
    return {f"s{k}": 10 * k + torch.sin(2 * math.pi * (time + k) / 9) * (k + 1) + noise[k] for k in range(count)}


def test_one_network_learns_a_panel():
    """Its series have a cycle that none of the simple forecasts knows."""
    series = waves(6, 90)
    forecaster = Forecaster(partial(deep, steps=80, horizon=6), season=1)
    ours = evaluate(forecaster, series, 6, origins=1)
    assert ours.mase.mean() < 0.5 and (ours.coverage[:, 2] > 0.6).all()


def test_a_family_serves_the_forecaster():
    series = waves(3, 60)
    series["short"] = series["s0"][:9]
    forecaster = Forecaster(partial(deep, steps=3), season=4).fit(series)
    labels = [choice.found.candidate.label for choice in forecaster.choices_]
    assert labels == ["deep, season of 4"] * 4 or labels[3] == "deep"
    mean, quantiles, levels = forecaster.predict(9)
    assert {name: (part.shape, quantiles[name].shape) for name, part in mean.items()} == {
        name: ((9,), (9, len(levels))) for name in series
    }
    found = [choice.found for choice in forecaster.choices_]
    assert found[0].shared is found[1].shared and "steps is kept" in found[0].message and found[0].converged
    before = forecaster.predict(3).mean["s1"]
    after = forecaster.update({name: y[:-2] for name, y in series.items()}).predict(3).mean["s1"]
    assert not before.equal(after)
    again = Forecaster(partial(deep, steps=3), season=4).fit(series).predict(9).mean
    torch.testing.assert_close(again["s2"], mean["s2"])
    torch.testing.assert_close(pickle.loads(pickle.dumps(forecaster)).predict(3), forecaster.predict(3))
    assert called("ets") == "ets" and called(partial(deep, steps=3)) == "deep"
    assert [one.label for one in candidates_of(("deep",), series["s0"], 1)] == ["deep"]
    with pytest.raises(ArgumentError, match="takes no covariates"):
        Forecaster("deep").fit(series["s0"], draw(60, 1))
    with pytest.raises(ArgumentError, match="backbone 'gru', 400 steps"):
        Forecaster(partial(deep, backbone="gru")).fit(series["s0"])


def test_training_keeps_the_weights_that_were_best():
    made, series = network(), list(waves(4, 60).values())
    learned = train_on(made, series, 1, 40, seed=1)
    ends = torch.stack([y[-28:] for y in series])
    loss = made.loss(ends, torch.ones(4, dtype=torch.int64), torch.tensor([23])).item()
    assert learned.held_out and loss == pytest.approx(learned.loss)
    alone = train_on(network(), [series[0][:18]], 1, 5)
    assert not alone.held_out and alone.steps == 5


# On synthetic series, once for all.


def test_a_run_that_is_resumed_is_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setattr("dualform.forecast.deep.training._SAVED", 2)
    options = {"steps": 4, "horizon": 4, "context": 24}
    whole = pretrain(tmp_path / "whole", **options)

    def stop(done: int, steps: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(tmp_path / "parts", tell=stop, **options)
    seen = []
    parts = pretrain(tmp_path / "parts", tell=lambda done, steps: seen.append(done), **options)
    assert seen == [2, 3, 4]
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(parts.model.state_dict()[name], value, rtol=0, atol=0)
    with pytest.raises(CheckpointError, match="a run with steps 4, which is now 5"):
        pretrain(tmp_path / "parts", **{**options, "steps": 5})
    damaged = tmp_path / "damaged"
    for name in ("optimizer.safetensors", "training.json", "model.safetensors"):
        shutil.copytree(tmp_path / "parts", damaged, dirs_exist_ok=True)
        content = bytearray((damaged / name).read_bytes())
        content[len(content) // 2] ^= 1
        (damaged / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            pretrain(damaged, **options)
    y = draw(40)
    loaded = QuantileNetwork.load(tmp_path / "parts")
    torch.testing.assert_close(loaded.forecast([y], 1, 6), whole.forecast([y], 1, 6))
    found = Forecaster(partial(deep, weights=tmp_path / "parts")).fit(y)
    assert found.choices_[0].found.candidate.label == "deep, parts"
    torch.testing.assert_close(found.predict_quantiles(6, LEVELS), whole.forecast([y], 1, 6)[0])


def test_a_folder_without_a_network_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no forecast\.json\n.*--pretrain FOLDER"):
        QuantileNetwork.load(tmp_path)
    made = network()
    made.save(tmp_path)
    about = tmp_path / "forecast.json"
    about.write_text(about.read_text().replace('"horizon": 4', '"horizon": 5'))
    with pytest.raises(CheckpointError):
        QuantileNetwork.load(tmp_path)
    with pytest.raises(ArgumentError, match="backbone is 'lstm'"):
        QuantileNetwork.build("lstm", 3, 10)
    with pytest.raises(ArgumentError, match="horizon is 0"):
        QuantileNetwork.build("s4d", 0, 10)
    assert ANCHORS == 8


def test_the_command_makes_a_network_and_forecasts_with_it(tmp_path, monkeypatch, capsys):
    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dualform", "forecast", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code or 0, *capsys.readouterr()

    made, out = tmp_path / "any", tmp_path / "nile"
    code, said, _ = run("--pretrain", made, "--steps", 2)
    assert code == 0 and f"--weights {made}" in said
    code, said, _ = run("--demo", "--weights", made, "--out", out)
    assert code == 0 and said.startswith("volume: deep, any, MASE ")
    report = (out / "report.md").read_text()
    assert "by `--model deep`" in report and "The network was trained before, on other series." in report
    assert "nan" not in report and "| parameter |" not in report
    columns = ["lower_95", "lower_80", "lower_50", "median", "upper_50", "upper_80", "upper_95"]
    assert (pd.read_csv(out / "forecast.csv")[columns].diff(axis=1).iloc[:, 1:] >= 0).all(axis=None)
    for words, message in (
        (("--pretrain", made, "--demo"), "reads no --demo"),
        (("--pretrain", made, "--steps", 3), "a run with steps 2, which is now 3"),
        (("--demo", "--steps", 3), "--steps is of --pretrain"),
        (("--demo", "--weights", tmp_path), "no network that forecasts"),
        (("--demo", "--weights", made, "--model", "ets"), "--weights is of --model deep"),
    ):
        code, _, wrong = run(*words)
        assert code == 2 and message in wrong
