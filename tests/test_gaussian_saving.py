"""Linear-Gaussian models in folders: what is read is what was written, to the last bit, or a sentence."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import dualform as df
from dualform.cli.main import app
from dualform.core.errors import ArgumentError, CheckpointError, ConfigError, DualformError
from dualform.gaussian import Autoregressive, Irregular, Level, Seasonal
from dualform.gaussian.continuous import ContinuousLinearGaussian
from dualform.gaussian.model import LinearGaussian

TWO = torch.eye(2, dtype=torch.float64)
PARTS = Level(variance=2.0) + Seasonal(4, variance=0.1), Autoregressive(1, coefficients=[0.5], variance=1.0)
MODELS = {
    "structural": lambda: (PARTS[0] + PARTS[1] + Irregular(variance=3.0)).build(),  # diffuse and stationary states
    "terms": lambda: LinearGaussian(
        0.5 * TWO, torch.randn(7, 1, 2).double(), [[0.3]], [[0.2]], [1, 2], 2 * TWO,
        S=[[1.0], [0.5]], c=[0.1, 0.2], B=[[1.0], [0.0]], time_varying=("C",), convention="kfas",
    ),
    "continuous": lambda: ContinuousLinearGaussian([[-0.1]], [[1.0]], [[2.0]], [[0.5]], P0="stationary"),
    "float32 batch": lambda: LinearGaussian(
        torch.rand(3, 1, 1), torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 1), P0="diffuse", prior="first"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back(name, tmp_path):
    torch.manual_seed(0)
    model = MODELS[name]()
    df.save(model, tmp_path)
    back = df.load(tmp_path, verify=True)
    assert type(back) is type(model) and repr(back) == repr(model)
    assert (back.prior, back.convention, back.stationary) == (model.prior, model.convention, model.stationary)
    assert back.time_varying == model.time_varying
    for (a, x), (b, y) in zip(model.state_dict().items(), back.state_dict().items(), strict=True):
        assert (a, x.dtype) == (b, y.dtype) and torch.equal(x, y)
    y = torch.randn(*model.batch, 5, model.d_obs)
    given = {"times": torch.arange(5.0)} if name == "continuous" else {"u": torch.ones(5, 1)} if name == "terms" else {}
    assert torch.equal(model.log_likelihood(y, **given), back.log_likelihood(y, **given))


def test_parameters_are_parameters_again_and_parametrised_ones_their_values(tmp_path):
    model = LinearGaussian(nn.Parameter(torch.tensor([[0.9]]).double()), [[1.0]], [[0.3]], [[0.2]], P0=1.0)
    df.save(model, tmp_path)
    back = df.load(tmp_path, dtype="float32")
    assert [name for name, _ in back.named_parameters()] == ["A"] and back.A.dtype == torch.float32

    class Square(nn.Module):
        def forward(self, x):
            return x.square()

    nn.utils.parametrize.register_parametrization(model, "A", Square())
    df.save(model, tmp_path)
    assert torch.equal(df.load(tmp_path).A, torch.tensor([[0.9]]).double() ** 2)


def test_what_is_no_such_model_is_refused(tmp_path):
    model = MODELS["continuous"]()
    df.save(model, tmp_path)
    with pytest.raises(CheckpointError, match="a ContinuousLinearGaussian, expected a LinearGaussian"):
        df.load(tmp_path, kind=LinearGaussian)
    with pytest.raises(CheckpointError, match="a linear-Gaussian model, expected one that is made of blocks"):
        df.models.saving.described.read_config(tmp_path)
    with pytest.raises(ArgumentError, match=r"save: model is Structural, expected one of .*\n.*model\.build\(\)"):
        df.save(PARTS[0], tmp_path)
    with pytest.raises(ArgumentError, match="layout 'hf' for a ContinuousLinearGaussian"):
        df.save(model, tmp_path, layout="hf")


WRONG = {
    "kind": ({"kind": "HiddenMarkov"}, "unknown kind of model 'HiddenMarkov'"),
    "prior": ({"prior": "last"}, "prior is 'last'"),
    "moving": ({"time_varying": ["A"]}, "A varies in time|A has shape"),
    "no word": ({"stationary": 1}, "stationary is 1, expected true or false"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_config_that_lies_is_refused(case, tmp_path):
    df.save(MODELS["continuous"](), tmp_path)
    (tmp_path / "manifest.json").unlink()
    path, (change, words) = tmp_path / "config.json", WRONG[case]
    about = json.loads(path.read_text())
    about["gaussian"] |= change
    path.write_text(json.dumps(about))
    with pytest.raises(DualformError, match=words):
        df.load(tmp_path)


def test_tensors_that_lie_are_refused(tmp_path):
    df.save(MODELS["structural"](), tmp_path)
    path = tmp_path / "model.safetensors"
    good = load_file(path)
    with pytest.raises(CheckpointError, match="bytes, but"):
        save_file({**good, "E": good["A"].clone()}, path)
        df.load(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="too many, first 'E'"):
        df.load(tmp_path)
    save_file({name: m for name, m in good.items() if name != "C"}, path)
    with pytest.raises(CheckpointError, match="'C' is missing"):
        df.load(tmp_path)
    save_file({**good, "R": -good["R"]}, path)
    with pytest.raises(ConfigError, match="R is not a covariance"):
        df.load(tmp_path)


def test_verify_reads_its_folder(tmp_path):
    df.save(MODELS["structural"](), tmp_path)
    result = CliRunner().invoke(app, ["verify", str(tmp_path)])
    assert result.exit_code == 0 and "2 ok" in result.stdout
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    assert CliRunner().invoke(app, ["verify", str(tmp_path)]).exit_code == 2
