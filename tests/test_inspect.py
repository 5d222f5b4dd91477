"""Systems inside of layers are those the layers run, and pictures show what they claim."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.image import imread
from typer.testing import CliRunner

import dualform as df
from dualform.core.errors import ArgumentError
from dualform.core.memory import Memory
from dualform.inspect import draw_frequency, draw_impulse, draw_memory, draw_poles, is_linear, state_spaces
from dualform.inspect.folder import pictures_of_measure
from dualform.layers.registry import MIXERS
from dualform.models.heads import SequenceClassifier

LINEAR = ("dss", "lru", "s4", "s4d", "s5")


def layer(kind: str, **options):
    torch.manual_seed(0)
    return MIXERS[kind](**{"d_state": 8, **options}).build(3).double()


def test_which_layers_are_linear():
    assert all(is_linear(layer(kind)) for kind in LINEAR)
    assert not any(is_linear(MIXERS[kind]().build(8)) for kind in ("mamba", "lstm"))


@pytest.mark.parametrize("kind", LINEAR)
def test_state_spaces_answer_as_their_layer_does_before_its_nonlinearity(kind):
    """The gate and output map on top of the systems' outputs give the layer's own."""
    mixer = layer(kind)
    x = torch.randn(1, 20, 3, dtype=torch.float64)
    systems = state_spaces(mixer)
    inputs = [x[0, :, [c]] for c in range(3)] if len(systems) == 3 else [x[0]]
    s = torch.cat([system.simulate(u)[0] for system, u in zip(systems, inputs, strict=True)], 1)
    g = F.gelu(s)
    y = g * torch.sigmoid(mixer.gate(g)) if kind == "s5" else F.glu(mixer.out_proj(g), -1)
    torch.testing.assert_close(y.detach(), mixer(x)[0][0].detach(), rtol=1e-9, atol=1e-9)


def test_channels_and_directions():
    mixer = layer("s4d", bidirectional=True)
    (second,) = state_spaces(mixer, [1])
    torch.testing.assert_close(second.kernel(9)[:, 0, 0], mixer.kernel(9)[0, 1].detach())
    shared = state_spaces(layer("s5"))[0]
    (part,) = state_spaces(layer("s5"), [2, 0])
    torch.testing.assert_close(part.kernel(5), shared.kernel(5)[:, [2, 0]][:, :, [2, 0]])
    with pytest.raises(ArgumentError, match="channel 3, expected 0 to 2"):
        state_spaces(mixer, [3])


def test_a_layer_without_a_fixed_system_says_so():
    with pytest.raises(ArgumentError, match=r"LSTM has no single linear time-invariant.*\n.*S4, S4D, DSS, S5, LRU"):
        state_spaces(MIXERS["lstm"]().build(3))


def drawn(axes) -> np.ndarray:
    return axes.collections[0].get_offsets().data


def test_poles_are_drawn_where_they_are():
    system = df.StateSpace([[-0.5, 3.0], [-3.0, -0.5]], [1.0, 0.0], [1.0, 0.0])
    plane, modes = draw_poles(system).axes
    assert sorted(map(tuple, drawn(plane).round(9).tolist())) == [(-0.5, -3.0), (-0.5, 3.0)]
    np.testing.assert_allclose(drawn(modes), [[3 / (2 * np.pi), 2]] * 2, rtol=1e-5)
    plane, modes = draw_poles([system.discretize(0.1)]).axes
    np.testing.assert_allclose(np.abs(drawn(plane) @ [1, 1j]), [np.exp(-0.05)] * 2)
    np.testing.assert_allclose(drawn(modes), [[3 / (2 * np.pi), 2]] * 2, rtol=1e-5)
    plane, _ = draw_poles(df.StateSpace([[2.0]], [1.0], [1.0])).axes
    assert len(drawn(plane)) == 0 and len(plane.collections[1].get_offsets()) == 1
    with pytest.raises(ArgumentError, match="all continuous or all discrete"):
        draw_poles([system, system.discretize(0.1)])


def test_responses_are_drawn_as_they_are():
    lag = df.StateSpace([[-1.0]], [1.0], [1.0])
    (axes,) = draw_impulse({"lag": lag.discretize_recurrence(0.5)}, 4).axes
    step = axes.lines[-1]
    np.testing.assert_allclose(step.get_xdata(), [0, 0.5, 1, 1.5])
    np.testing.assert_allclose(step.get_ydata(), (1 - np.exp(-0.5)) * np.exp(-0.5 * np.arange(4)))
    gain, phase = draw_frequency({"lag": lag.discretize(0.01)}).axes
    turns, decibels = gain.lines[0].get_data()
    middle = np.abs(turns - 1 / (2 * np.pi)).argmin()
    assert abs(decibels[0]) < 0.1 and decibels[middle] == pytest.approx(-3, abs=0.2)
    assert phase.lines[0].get_ydata()[middle] == pytest.approx(-1 / 8, abs=0.01)
    for draw in (draw_impulse, draw_frequency):
        with pytest.raises(ArgumentError, match="lag is continuous"):
            draw({"lag": lag})
        with pytest.raises(ArgumentError, match="no systems"):
            draw({})


def test_a_memory_is_drawn_as_it_remembers():
    u = torch.linspace(0, 9, 400, dtype=torch.float64).sin()
    axes = draw_memory(Memory("legt", 12, window=100.0), u, at=[200, 400]).axes
    assert len(axes) == 2
    remembered = axes[1].lines[1]
    assert remembered.get_xdata()[0] == 300.5 and remembered.get_xdata()[-1] == 399.5
    np.testing.assert_allclose(remembered.get_ydata(), u[300:], atol=1e-2)
    with pytest.raises(ArgumentError, match="ascending"):
        draw_memory(Memory("legs", 12), u, at=[500])


def test_the_picture_of_the_documentation():
    """64 coefficients of 100,000 samples, 1.5 %."""
    name, picture = next(pictures_of_measure("legs"))
    titles = [axis.get_title(loc="right") for axis in picture.axes]
    assert name == "reconstruction" and titles[-1] == "relative error 1.5 %"
    assert picture.axes[0].get_xlim()[1] == 100_000


def names(folder) -> set[str]:
    pictures = list(folder.iterdir())
    assert all(imread(path).std() > 0.01 for path in pictures)  # not blank
    return {path.name for path in pictures}


def test_the_command_draws_layers_memories_and_models(tmp_path):
    from dualform.cli.main import app

    def run(*arguments: str):
        return CliRunner().invoke(app, ["inspect", *arguments])

    out = tmp_path / "layer"
    done = run("s5", "--out", str(out), "--d-model", "3")
    assert done.exit_code == 0 and names(out) == {"poles.png", "impulse.png", "frequency.png"}
    assert str(out / "poles.png") in done.stdout.replace("\n", "")
    assert run("hippo:legt", "--out", str(tmp_path / "memory")).exit_code == 0
    assert names(tmp_path / "memory") == {"reconstruction.png", "poles.png"}
    parts = {"S": (MIXERS["s4d"](d_state=4),), "L": (MIXERS["lstm"](),)}
    SequenceClassifier(df.ModelConfig(0, 4, parts, "LS"), 2, inputs=1).save(tmp_path / "model")
    assert run(str(tmp_path / "model"), "--out", str(tmp_path / "drawn")).exit_code == 0
    drawn = {f"1-0-s4d-{what}.png" for what in ("poles", "impulse", "frequency")}
    assert names(tmp_path / "drawn") == drawn
    kept = {path.name: path.read_bytes() for path in (tmp_path / "drawn").iterdir()}
    done = run(str(tmp_path / "model"), "--out", str(tmp_path / "drawn"))  # what is there stays
    assert names(tmp_path / "drawn") == drawn | {name.replace(".png", "-2.png") for name in drawn}
    assert all((tmp_path / "drawn" / name).read_bytes() == before for name, before in kept.items())
    assert "1-0-s4d-poles-2.png" in done.output.replace("\n", "")
    assert "not drawn: blocks.0.parts.0 (LSTM) is not one linear time-invariant system" in done.output
    assert done.output.count("not drawn") == 1
    for what, says in (("s44d", "did you mean 's4d'"), ("hippo:leg", "one of legs"), ("lstm", "no single linear")):
        assert says in str(run(what, "--out", str(tmp_path / "no")).exception)
