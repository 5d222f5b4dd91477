"""What training leaves out at random: in the mean nothing, evaluated nothing, and one decision for a whole sequence."""

from dataclasses import replace
from io import StringIO

import pytest
import torch
from rich.console import Console

import dualform as df
from dualform.core.errors import CheckpointError, ConfigError
from dualform.core.packing import Packing
from dualform.layers.block import Block, ChainConfig, ParallelConfig, SublayerConfig
from dualform.layers.drop import Drop, depth_rates, drop_path, dropout
from dualform.layers.mamba import MambaConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.layers.mlp import MLPConfig
from dualform.models.config import RATES, ModelConfig
from dualform.models.heads import SequenceRegressor
from dualform.models.lm import LanguageModel
from dualform.models.saving.model import load, save
from dualform.train.checkpoint import checkpoints
from dualform.train.loop import train
from dualform.train.recipe import Data, Lora, Optim, Recipe
from dualform.train.setup import build_model

V, D = 13, 8
QUIET = Console(quiet=True)
MIXER, MLP = Mamba2Config(d_state=4, d_head=4), MLPConfig(d_hidden=8)
CONFIG = ModelConfig(V, D, {"M": (MIXER, MLP), "S": (MIXER,)}, "MSMS", shared="S")
ALL = {"dropout": 0.3, "drop_path": 0.4, "embed_dropout": 0.2}


def model_of(config=CONFIG, **rates):
    torch.manual_seed(1)
    return LanguageModel(replace(config, **rates)).double()


def tokens(batch=3, time=7):
    return torch.randint(V, (batch, time), generator=torch.Generator().manual_seed(2))


def test_the_mean_of_what_is_left_is_everything():
    torch.manual_seed(0)
    y, n = torch.full((20000, 3, 2), 2.0, dtype=torch.float64), 20000
    for rate in (0.1, 0.6):
        deviation = 2 * (rate / (1 - rate) / n) ** 0.5
        assert (drop_path(y, rate).mean(0) - 2).abs().max() < 4 * deviation
        assert (dropout(y, rate).mean(0) - 2).abs().max() < 4 * deviation
        assert set(drop_path(y, rate).unique().tolist()) == {0.0, 2 / (1 - rate)}


def test_a_path_is_dropped_for_a_whole_row_and_a_whole_sequence():
    torch.manual_seed(0)
    rows = drop_path(torch.ones(50, 4, 3), 0.5)
    assert (rows == rows[:, :1, :1]).all() and 0 < (rows[:, 0, 0] == 0).sum() < 50
    lengths = torch.tensor([3, 0, 5, 1] * 20)
    borders = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    for given in (borders, Packing.of("here", borders, torch.ones(1, 180, 3))):
        line = drop_path(torch.ones(1, 180, 3), 0.5, given)[0]
        each = [piece for piece in line.split(lengths.tolist()) if len(piece)]
        assert all((piece == piece[0, 0]).all() for piece in each)
        assert 10 < sum(bool(piece[0, 0] == 0) for piece in each) < 50


def test_a_packed_batch_drops_the_sequences_that_rows_would():
    """With equal random numbers: as many are drawn for sequences on a line as for rows."""
    block = Block((SublayerConfig(MIXER, drop_path=0.5),), D).double()
    x = torch.randn(6, 5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(4)
    y, _ = block(x)
    torch.manual_seed(4)
    line, _ = block(x.flatten(0, 1)[None], cu_seqlens=5 * torch.arange(7))
    torch.testing.assert_close(line[0].unflatten(0, (6, 5)), y)
    kept = (y != x).flatten(1).any(1)
    assert 0 < kept.sum() < 6
    torch.testing.assert_close(y[kept] - x[kept], 2 * (block.eval()(x)[0][kept] - x[kept]))


def test_padding_is_dropped_with_its_row():
    model = model_of(drop_path=0.9)
    given = tokens(8, 6)
    mask = torch.ones(8, 6, dtype=torch.long).tril(2)
    torch.manual_seed(0)
    padded, _ = model(given, attention_mask=mask)
    borders = torch.cat([torch.zeros(1, dtype=torch.long), mask.sum(1).cumsum(0)])
    torch.manual_seed(0)
    line, _ = model(given[mask.bool()][None], cu_seqlens=borders)
    torch.testing.assert_close(padded[mask.bool()], line[0])


@pytest.mark.parametrize("rates", [{name: rate} for name, rate in ALL.items()] + [ALL])
def test_only_training_drops(rates):
    plain, model = model_of(), model_of(**rates)
    assert plain.state_dict().keys() == model.state_dict().keys()
    x = tokens()
    torch.manual_seed(0)
    first, second = model(x)[0], model(x)[0]
    assert not torch.equal(first, second)
    before = torch.get_rng_state()
    with torch.no_grad():  # as in generation, whatever the mode
        torch.testing.assert_close(model(x)[0], plain(x)[0], rtol=0, atol=0)
    torch.testing.assert_close(model.step(x[:, 0], model.init_state(3))[0], plain(x[:, :1])[0][:, 0])
    torch.testing.assert_close(model.eval()(x)[0], plain(x)[0], rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_rates_no_random_number_is_drawn():
    model, before = model_of(), torch.get_rng_state()
    model.loss(tokens()).backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_model_s_rates_are_for_what_is_added_to_the_stream_and_says_nothing_itself():
    class Seen(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.out_proj = torch.nn.Linear(1, 1)

        def forward(self, x):
            return torch.ones_like(x)

    inner = SublayerConfig(MLP, norm=None, stream=0.0)
    parts = (
        MLP,
        SublayerConfig(MLP, dropout=0.0, drop_path=0.0),
        SublayerConfig(ChainConfig((inner, inner))),
        SublayerConfig(MLP, stream=0.0),
        SublayerConfig(MLP, saved="here"),
    )
    block = Block(parts, 400).double()
    for i in (0, 1, 3, 4):
        block.parts[i] = Seen()
    block.parts[2].parts[0], block.parts[2].parts[1] = Seen(), Seen()
    block.parts[0].register_forward_hook(lambda _, given, y: y)
    zeros = torch.zeros(30, 4, 400, dtype=torch.float64)

    def alone(i):
        one = Block((parts[i],), 400).double()
        one.parts[0] = block.parts[i]
        torch.manual_seed(0)
        return one(zeros, drop=Drop(0.25))[0]

    assert alone(0).unique().tolist() == [0.0, 1 / 0.75]
    assert alone(1).unique().tolist() == [1.0]
    assert alone(2).unique().tolist() == [0.0, 1 / 0.75]  # dropped once, and not inside
    assert alone(3).unique().tolist() == [1.0]
    assert alone(4).unique().tolist() == [0.0]


def test_the_rate_of_paths_grows_with_depth():
    rates = depth_rates(0.4, 4, torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(torch.stack(rates), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64))
    torch.manual_seed(0)
    model = model_of(replace(CONFIG, shared=""), drop_path=0.4)
    counts = torch.zeros(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)

    def count(i):
        def hook(block, given, keywords, out):
            counts[i] += (out[0] == given[0]).flatten(1).all(1).sum()

        return hook

    for i, block in enumerate(model.blocks):
        block.register_forward_hook(count(i), with_kwargs=True)
    model(torch.zeros(4000, 1, dtype=torch.long))
    expected = 4000 * torch.tensor([0.1**2, 0.2, 0.3**2, 0.4])  # a block of two sub-layers, of one, and so on
    assert ((counts - expected).abs() < 5 * expected.sqrt()).all(), counts


def test_branches_drop_by_themselves():
    branch = SublayerConfig(MLP, drop_path=0.5)
    block = Block((SublayerConfig(ParallelConfig((branch, branch)), norm=None),), D).double()
    x = torch.randn(200, 1, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    same = (block(x)[0] == x).flatten(1).all(1).sum()
    assert 25 < same < 75  # a quarter


@pytest.mark.parametrize("rates", [{"drop_path": 0.5}, ALL])
def test_recomputed_activations_drop_the_same(rates):
    gradients = []
    for recompute in (False, True):
        model = model_of(**rates)
        model.recompute = recompute
        torch.manual_seed(5)
        model.loss(tokens(6)).backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_a_regressor_drops_too():
    torch.manual_seed(0)
    model = SequenceRegressor(replace(CONFIG, vocab_size=0, **ALL), 1, inputs=2)
    x = torch.randn(3, 5, 2)
    assert not torch.equal(model(x)[0], model(x)[0])
    assert torch.equal(model.eval()(x)[0], model(x)[0])


@pytest.mark.parametrize("rate", [-0.1, 1.0, 2.0, float("nan"), float("inf")])
def test_other_rates_are_refused(rate):
    for name in RATES:
        with pytest.raises(ConfigError, match=f"model: {name} is .*, expected a share, from 0 to below 1"):
            replace(CONFIG, **{name: rate})
        with pytest.raises(ConfigError, match=f"recipe: {name} is .*, expected a share, from 0 to below 1"):
            Recipe(steps=1, **{name: rate})
    for name in ("dropout", "drop_path"):
        with pytest.raises(ConfigError, match=f"sublayer: {name} is"):
            SublayerConfig(MLP, **{name: rate})


def test_a_path_that_is_not_added_cannot_be_dropped():
    for options in ({"stream": 0.0}, {"saved": "there"}):
        with pytest.raises(ConfigError, match=r"drop_path is 0\.1 of an output that is not added to the stream"):
            SublayerConfig(MLP, drop_path=0.1, **options)


def test_rates_are_saved_and_older_files_have_none(tmp_path):
    parts = {"M": (SublayerConfig(MIXER, dropout=0.1, drop_path=0.2), MLP)}
    config = ModelConfig(V, D, parts, "MM", **ALL)
    assert ModelConfig.from_dict(config.to_dict()) == config
    save(LanguageModel(config), tmp_path / "new")
    assert load(tmp_path / "new").config == config
    older = {key: value for key, value in CONFIG.to_dict().items() if key not in RATES}
    assert ModelConfig.from_dict(older) == CONFIG and (CONFIG.dropout, CONFIG.drop_path) == (0, 0)


@pytest.mark.parametrize("layout", ["hf", "mamba_ssm"])
def test_other_libraries_get_the_function(tmp_path, layout):
    plain = ModelConfig(16, D, {"M": (MambaConfig(d_state=4),)}, "MM")
    parts = plain.parts if layout == "mamba_ssm" else {"M": (SublayerConfig(MambaConfig(d_state=4), dropout=0.5),)}
    model = LanguageModel(replace(plain, parts=parts, **ALL))
    save(model, tmp_path, layout=layout)
    again = load(tmp_path)
    assert again.config == replace(plain, **dict.fromkeys(RATES, 0.0))
    torch.testing.assert_close(again(tokens())[0], model.eval()(tokens())[0], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")
def test_blocks_that_differ_in_their_rate_are_one_program():
    config = ModelConfig(V, D, {"F": (SublayerConfig(MLP, dropout=0.1),)}, "F" * 12, drop_path=0.5)
    model, torch_count = model_of(config), torch._dynamo.utils.counters
    torch.compiler.reset()
    torch_count.clear()
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    x = tokens(4)
    model.loss(x).backward()
    assert torch_count["stats"]["unique_graphs"] == 1
    assert not torch.equal(model(x)[0], model(x)[0])
    torch.testing.assert_close(model.eval()(x)[0], model_of(config).eval()(x)[0])


@pytest.fixture
def recipe(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and saw a bird. " * 120)
    config = ModelConfig(256, D, {"M": (MIXER, MLP)}, "MM")
    return Recipe(
        model=config.to_dict(),
        out=str(tmp_path / "run"),
        steps=4,
        save_every=2,
        device="cpu",
        data=Data(path=str(text), length=16, batch=2, packed=True),
        optim=Optim(lr=0.02, warmup=1),
        **ALL,
    )


def weights(folder):
    return load(folder).state_dict()


def test_a_resumed_run_drops_what_the_unbroken_one_does(recipe, tmp_path):
    whole = train(recipe, console=QUIET)
    assert load(whole).config.dropout == 0.3
    plain = train(replace(recipe, out=str(tmp_path / "plain"), **dict.fromkeys(RATES)), console=QUIET)
    assert not torch.equal(weights(plain)["embed.weight"], weights(whole)["embed.weight"])
    broken = replace(recipe, out=str(tmp_path / "broken"))
    train(replace(broken, steps=2), console=QUIET)
    train(replace(broken, steps=4), console=QUIET, resume=True)
    for name, value in weights(broken.out).items():
        assert torch.equal(value, weights(whole)[name]), name


def test_a_resumed_run_may_change_its_rates_and_says_so(recipe):
    train(replace(recipe, steps=2), console=QUIET)
    said = StringIO()
    train(replace(recipe, dropout=0.5, drop_path=None), console=Console(file=said, width=200), resume=True)
    assert (
        "changed: dropout: 0.3, now 0.5" in said.getvalue() and "changed: drop_path: 0.4, now None" in said.getvalue()
    )


def test_a_rate_of_the_model_itself_is_held(recipe):
    plain = replace(recipe, steps=2, **dict.fromkeys(RATES))
    train(plain, console=QUIET)
    changed = replace(plain, model={**recipe.model, "dropout": 0.1}, steps=4)
    with pytest.raises(CheckpointError, match=r"is of another model: dropout: 0\.0, now 0\.1"):
        train(changed, console=QUIET, resume=True)


def test_a_saved_model_is_trained_on_with_rates(recipe, tmp_path):
    LanguageModel(ModelConfig(256, D, {"M": (MIXER, MLP)}, "MM", drop_path=0.1)).save(tmp_path / "base")
    tuned = replace(recipe, model=str(tmp_path / "base"), drop_path=None)
    assert build_model(tuned)[0].config.dropout == 0.3 and build_model(tuned)[0].config.drop_path == 0.1
    with pytest.raises(ConfigError, match=r"of a saved model it is a key of the recipe: --set dropout=0\.2"):
        Recipe.load("stdlib", [f"model={tmp_path / 'base'}", "model.dropout=0.2"])
    assert Recipe.load("stdlib", ["model.dropout=0.2"]).model["dropout"] == 0.2
    pytest.importorskip("peft")
    adapted = replace(tuned, lora=Lora(rank=2), out=str(tmp_path / "adapted"), steps=2)
    train(adapted, console=QUIET)
    train(replace(adapted, steps=3), console=QUIET, resume=True)
    assert len(checkpoints(tmp_path / "adapted" / "checkpoints")) == 2
    assert df.load(tmp_path / "adapted").config.dropout == 0
