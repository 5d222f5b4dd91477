"""The training of a network that forecasts: on a panel of series, or on synthetic ones."""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor

from dualform.core.errors import ArgumentError, CheckpointError, DualformError
from dualform.core.json_file import entry, read_table, to_json
from dualform.forecast.deep.network import QuantileNetwork
from dualform.forecast.deep.synthetic import synthetic
from dualform.models.saving.files import current, replacing
from dualform.models.saving.verify import check_files
from dualform.train.optim import build_optimizer, schedule
from dualform.train.recipe import Optim

TRAINING_FILE, MOMENTS_FILE = "training.json", "optimizer.safetensors"
HORIZON, CONTEXT, STEPS = 24, 144, 1000
"""Of a network for any series: how far it looks ahead and back, and for how many steps it is trained."""
_BATCH, _ORIGINS = 32, 16
_DRAWN, _LASTS = 128, 12  # synthetic series at a time, and for how many steps
_SAVED = 100  # steps between two saves
_SCORED = 10  # how often a run looks at what is held out
_PATIENCE = 4


class Learned(NamedTuple):
    """How training ended.

    Attributes:
        steps: updates that the weights have had, of those that are kept.
        loss: pinball loss of what was held out, in units of the scale of each series; else that of training.
        held_out: whether something was held out.
    """

    steps: int
    loss: float
    held_out: bool


def optim(steps: int) -> Optim:
    """AdamW as a run of so many steps wants it."""
    return Optim(lr=4e-3, weight_decay=0.02, warmup=min(50, steps // 10))


# A panel.


def train_on(
    network: QuantileNetwork,
    series: Sequence[Tensor],
    season: int,
    steps: int,
    seed: int = 0,
    tell: Callable[[int, int], None] = lambda done, whole: None,
) -> Learned:
    """Train a network on windows of series; it ends with the weights whose loss on their ends was lowest.

    The last H steps of the series that are long enough are held out; where none is, training takes all its steps.

    Args:
        network: is changed.
        series: each ``(T,)``, NaN where missing.
        season: of all, 1 for none.
        steps: at most.
        seed: of the windows. The global generator is left as it was.
        tell: called with how many steps are done, of how many.

    Raises:
        DualformError: where the loss is not finite.
    """
    H, L = network.horizon, network.context
    long = [len(y) >= 3 * H + 8 for y in series]
    learned = [y[: len(y) - H] if is_long else y for y, is_long in zip(series, long, strict=True)]
    held = [y for y, is_long in zip(series, long, strict=True) if is_long]
    ends = torch.stack([_window(y, len(y) - H, L, H) for y in held]) if held else None
    season_of = torch.full((_BATCH,), season)
    source, best, losses = Generator().manual_seed(seed), None, []
    model, plan, every = network.model, optim(steps), max(1, steps // _SCORED)
    optimizer, looks = build_optimizer(model, plan), 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for step in range(steps):
            x = _panel_windows(learned, L, H, source)
            losses.append(_update(network, optimizer, plan, step, steps, x, season_of, source))
            tell(step + 1, steps)
            if ends is None or ((step + 1) % every and step + 1 < steps):
                continue
            found = _score(network, ends, season)
            if best is None or found < best[0]:
                best = found, looks, step + 1, {name: t.detach().clone() for name, t in model.state_dict().items()}
            elif looks - best[1] >= _PATIENCE:
                break
            looks += 1
    model.eval()
    if best is None:
        recent = losses[-50:]
        return Learned(len(losses), sum(recent) / len(recent), False)
    model.load_state_dict(best[3])
    return Learned(best[2], best[0], True)


@torch.no_grad()
def _score(network: QuantileNetwork, ends: Tensor, season: int) -> float:
    network.model.eval()
    origin, total = torch.tensor([network.context - 1]), 0.0
    for part in ends.split(256):
        total += len(part) * network.loss(part, torch.full((len(part),), season), origin).item()
    return total / len(ends)


def _window(y: Tensor, origin: int, context: int, horizon: int) -> Tensor:
    """The steps before and after an origin ``(L + H,)``, missing where the series has none."""
    x = y.new_full((context + horizon,), math.nan)
    start, stop = max(0, origin - context), min(len(y), origin + horizon)
    x[context - (origin - start) : context + stop - origin] = y[start:stop]
    return x


def _panel_windows(series: list[Tensor], context: int, horizon: int, source: Generator) -> Tensor:
    """Windows ``(B, L + H)`` of random series, with origins where 5 steps or more are known and 1 is to come."""
    sizes = torch.tensor([float(len(y)) for y in series]).sqrt()  # a long series has more windows, but not all of them
    rows = torch.multinomial(sizes, _BATCH, True, generator=source).tolist()
    found = []
    for row in rows:
        y = series[row]
        least = min(len(y) - 1, 5)
        origin = int(torch.randint(least, len(y), (1,), generator=source))
        found.append(_window(y, origin, context, horizon))
    return torch.stack(found)


def _update(
    network: QuantileNetwork,
    optimizer: torch.optim.Optimizer,
    plan: Optim,
    step: int,
    steps: int,
    x: Tensor,
    season: Tensor,
    source: Generator,
) -> float:
    """One step on windows ``(B, L + H)``, from several origins among their last ones."""
    share = schedule(plan, step, step / steps)
    for group in optimizer.param_groups:
        group["lr"] = share * group["peak_lr"]
    network.model.train()
    optimizer.zero_grad()
    loss = network.loss(x, season, origins_of(network.context, source))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.model.parameters(), plan.clip)
    optimizer.step()
    value = loss.item()
    if not math.isfinite(value):
        raise DualformError(f"deep: the loss is {value} after step {step}", hint="are there values near 1e300?")
    return value


def origins_of(context: int, source: Generator) -> Tensor:
    """Up to four origins among the last ones of a context, its end included."""
    behind = torch.randint(0, min(_ORIGINS, context), (3,), generator=source)
    return torch.unique(torch.cat([context - 1 - behind, torch.tensor([context - 1])]))


# Synthetic series.


def pretrain(
    folder: str | os.PathLike[str],
    *,
    backbone: str = "s4d",
    steps: int = STEPS,
    seed: int = 0,
    horizon: int = HORIZON,
    context: int = CONTEXT,
    tell: Callable[[int, int], None] = lambda done, whole: None,
) -> QuantileNetwork:
    """Train a network on synthetic series, so that it forecasts any; its folder is saved on the way, and taken up.

    Two runs with the same arguments are the same run, and so is one that was interrupted.

    Args:
        folder: where it is saved, by :meth:`~dualform.forecast.deep.network.QuantileNetwork.save`, with what it takes
            to go on. One that holds a run of the same arguments, ``steps`` apart, is gone on with.
        backbone: ``"s4d"``, ``"s5"`` or ``"mamba"``.
        steps: updates of the weights, 1 or more.
        seed: of everything that is random.
        horizon: how many steps ahead it says; longer ones are made of several.
        context: how many steps it reads.
        tell: called with how many steps are done, of how many.

    Raises:
        ArgumentError: for an unknown backbone, and sizes below 1.
        CheckpointError: for a folder with another run, or one that cannot be read or written.
    """
    if steps < 1:
        raise ArgumentError(f"pretrain: steps is {steps}, expected 1 or more")
    given = {"backbone": backbone, "seed": seed, "horizon": horizon, "context": context, "steps": steps}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = QuantileNetwork.build(backbone, horizon, context)
    optimizer, plan, done = build_optimizer(network.model, optim(steps)), optim(steps), 0
    if current(Path(folder), TRAINING_FILE).exists():
        network, done = _resumed(Path(folder), given)
        optimizer = build_optimizer(network.model, plan)
        _restore(Path(folder), network, optimizer)
    tell(done, steps)
    drawn, length = None, context + horizon + context // 2
    for step in range(done, steps):
        source = Generator().manual_seed(1_000_003 * seed + 7 * step + 1)
        if drawn is None or step % _LASTS == 0:
            drawn = synthetic(_DRAWN, length, Generator().manual_seed(1_000_033 * (seed + 1) + step // _LASTS))
        x, season = _synthetic_windows(drawn.y, drawn.season, context, horizon, source)
        _update(network, optimizer, plan, step, steps, x, season, source)
        tell(step + 1, steps)
        if (step + 1) % _SAVED == 0 or step + 1 == steps:
            _save(Path(folder), network, optimizer, {**given, "done": step + 1})
    network.model.eval()
    return network


def _synthetic_windows(
    y: Tensor, season: Tensor, context: int, horizon: int, source: Generator
) -> tuple[Tensor, Tensor]:
    """Windows ``(B, L + H)``, half of them with less before the origin, some upside down, and their seasons."""
    rows = torch.randperm(len(y), generator=source)[:_BATCH]
    spare = y.shape[1] - context - horizon + 1
    start = torch.randint(0, spare, (len(rows),), generator=source)
    x = y[rows].gather(1, start[:, None] + torch.arange(context + horizon))
    known = torch.rand(len(rows), generator=source, dtype=torch.float64)
    known = torch.exp(math.log(12) + known * math.log(context / 12)).long().clamp(1, context)
    short = torch.rand(len(rows), generator=source) < 0.6
    hidden = (torch.arange(context + horizon) < context - known[:, None]) & short[:, None]
    sign = torch.where(torch.rand(len(rows), 1, generator=source) < 0.5, -1.0, 1.0)
    return torch.where(hidden, math.nan, sign * x), season[rows]


def _save(folder: Path, network: QuantileNetwork, optimizer: torch.optim.Optimizer, about: dict[str, Any]) -> None:
    moments = {
        f"{name}.{key}": value.detach().contiguous().clone()
        for name, parameter in network.model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    with replacing(folder) as new:
        network.write(new)
        save_file(moments, new / MOMENTS_FILE)
        (new / TRAINING_FILE).write_text(to_json(about), encoding="utf-8")


def _resumed(folder: Path, given: dict[str, Any]) -> tuple[QuantileNetwork, int]:
    check_files(folder, digests=True)
    path = current(folder, TRAINING_FILE)
    about = read_table(path)
    for name, value in given.items():
        if (was := entry(about, name, type(value), path)) != value:
            hint = "another folder, or the arguments that it was begun with"
            raise CheckpointError(f"{folder}: a run with {name} {was!r}, which is now {value!r}", hint=hint)
    if not 0 <= (done := entry(about, "done", int, path)) <= given["steps"]:
        raise CheckpointError(f"{path}: done is {done}, expected 0 to {given['steps']}")
    return QuantileNetwork.load(folder), done


def _restore(folder: Path, network: QuantileNetwork, optimizer: torch.optim.Optimizer) -> None:
    path = current(folder, MOMENTS_FILE)
    try:
        moments = load_file(path)
        for name, parameter in network.model.named_parameters():
            state = {key: moments[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            if state["exp_avg"].shape != parameter.shape or state["exp_avg_sq"].shape != parameter.shape:
                raise CheckpointError(f"{path}: {name} has another shape than in the model")
            optimizer.state[parameter] = state
    except (KeyError, OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}", hint="a new folder begins a new run") from error
