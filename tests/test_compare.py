"""``dualform compare``: models of one size, their costs, and what is not done twice."""

import json

import pytest
import torch

from dualform.core.errors import ConfigError
from dualform.core.tree import nbytes
from dualform.layers.registry import MIXERS
from dualform.models.lm import LanguageModel
from dualform.train.cost import costs, crossing
from dualform.train.equal import equal_models


def test_models_differ_in_their_mixer_and_not_in_their_size():
    d_model, layers = 64, 2
    models = equal_models(list(MIXERS), d_model=d_model, layers=layers)
    with torch.device("meta"):
        sizes = {name: LanguageModel(config).parameter_count() for name, config in models.items()}
    assert max(sizes.values()) - min(sizes.values()) <= 3 * d_model * layers
    assert {type(config.parts["X"][0]) for config in models.values()} == set(MIXERS.values())
    chosen = equal_models(["mamba2", "s5"], options={"mamba2": {"d_state": 8}})
    assert chosen["mamba2"].parts["X"][0].d_state == 8


@pytest.mark.parametrize(
    "mixers, options, sentence",
    [
        (["mamba3000"], {}, "no mixer 'mamba3000'"),
        (["mamba2"], {"s4": {}}, "options of 's4', which is not among the mixers mamba2"),
        (["mamba2"], {"mamba2": {"d_stat": 3}}, "d_stat"),
        (["mamba2"], {"mamba2": {"d_state": "many"}}, "d_state"),
    ],
)
def test_what_cannot_be_compared(mixers, options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        equal_models(mixers, options=options)


def test_costs_are_of_the_length():
    models = equal_models(["attention", "mamba2"], d_model=16, layers=1)
    found = {name: list(costs(LanguageModel(config), [16, 32, 64])) for name, config in models.items()}
    for name, some in found.items():
        assert [cost.length for cost in some] == [16, 32, 64] and all(c.seconds > 0 and c.step > 0 for c in some)
        lm = LanguageModel(models[name])
        assert [cost.state for cost in some] == [nbytes(lm.init_state(1, max_len=cost.length + 8)) for cost in some]
        assert some[0].kept < some[1].kept < some[2].kept
    assert len({cost.state for cost in found["mamba2"]}) == 1
    slow = LanguageModel(models["mamba2"])
    assert len(list(costs(slow, [16, 32, 64], limit=0.0))) == 1
    assert all(p.grad is None for p in slow.parameters())


def test_what_is_kept_for_the_backward_pass_is_counted_once():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(5))
            self.config = equal_models(["s5"])["s5"]

        def init_state(self, batch, max_len):
            return torch.zeros(1)

        def prepare(self):
            return type("Steps", (), {"step": staticmethod(lambda token, state: (token, state))})

        def features(self, tokens, state):
            return tokens, state

        def loss(self, tokens):
            x = tokens[0, :1].double() * self.weight  # 40 bytes, of which float32 copies are no part
            return (x.exp() * x).sum() + x.exp().sum()

    (cost,) = costs(Twice(), [4])
    assert cost.kept == 8 + 3 * 40  # the token as a number, x, and two exponentials


def test_two_curves_cross_where_straight_lines_in_logarithms_do():
    lengths = [128, 256, 512, 1024]
    line, square = [(n, 600.0 * n) for n in lengths], [(n, 2.0 * n * n) for n in lengths]
    assert crossing(line, square) == pytest.approx(300)
    assert crossing(square, line) is None
    assert crossing(line, [(n, 700.0 * n) for n in lengths]) == 128
    assert crossing(line[:1], square) is None and crossing([], square) is None


def test_a_comparison_is_drawn_and_its_runs_are_not_repeated(dualform, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be: that is the question.\n" * 60)
    small = ("--d-model", 16, "--layers", 1, "--longest", 256, "--mixers", "s5,attention", "--out", tmp_path / "out")
    recipe = [f"data.path={text}", "steps=2", "data.length=16", "data.batch=1", "device=cpu"]
    args = ("compare", *small, *(word for one in recipe for word in ("--set", one)))
    code, out, err = dualform(*args)
    assert code == 0 and not err and "costs less than attention" in out
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert list(found["models"]) == ["s5", "attention"]
    for name, row in found["models"].items():
        assert row["steps"] == 2 and row["bits_per_byte"] > 0 and [c["length"] for c in row["costs"]] == [128, 256]
        assert (tmp_path / "out" / name / "model").is_dir()
    assert found["models"]["s5"]["beats_attention_from"]["state"] == 128
    assert (tmp_path / "out" / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    before = (tmp_path / "out" / "s5" / "summary.json").stat().st_mtime_ns
    code, out, err = dualform(*args)
    assert code == 0 and (tmp_path / "out" / "s5" / "summary.json").stat().st_mtime_ns == before
    code, out, err = dualform(*args, "--set", "steps=3")
    assert code == 2 and "trained with another steps" in err


def test_costs_alone(dualform, tmp_path):
    args = ("compare", "--no-train", "--mixers", "mamba2", "--d-model", 16, "--layers", 1, "--longest", 128)
    code, out, err = dualform(*args, "--out", tmp_path / "out", "--set", "device=cpu", "--option", "mamba2.d_state=4")
    assert code == 0 and "128 tokens" in out and not err
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert "bits_per_byte" not in found["models"]["mamba2"]
    code, out, err = dualform(*args, "--option", "mamba2")
    assert code == 2 and "not of the form MIXER.KEY=VALUE" in err
