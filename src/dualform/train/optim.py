"""AdamW with the treatment that parameters of state space models need, and its schedule."""

import math
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from dualform.core.errors import ConfigError
from dualform.core.options import brief
from dualform.layers.mixer import Hint
from dualform.train.recipe import AUTO, WARMUP, WARMUP_SHARE, Optim


def parameter_hints(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Hint]]:
    """Every trainable parameter once, and how to treat it.

    A layer says so itself in its ``hints``. Otherwise matrices decay; embeddings, and what has fewer than two axes
    (biases, norms, gains), do not. A matrix that is also an embedding is an embedding.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    seen: set[int] = set()
    for path, module in model.named_modules():
        hints: dict[str, Hint] = getattr(module, "hints", {})
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            default = Hint(decay=parameter.dim() >= 2 and id(parameter) not in embeddings)
            yield f"{path}.{name}".lstrip("."), parameter, hints.get(name, default)


def build_optimizer(model: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """AdamW with one group per kind of treatment; ``peak_lr`` of a group is the learning rate that it bears.

    References:
        Loshchilov & Hutter (2019), arXiv:1711.05101.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for _, parameter, hint in parameter_hints(model):
        peak = optim.lr if hint.max_lr is None else min(optim.lr, hint.max_lr)
        groups.setdefault((hint.decay, peak), []).append(parameter)
    options: list[dict[str, Any]] = [
        {"params": parameters, "weight_decay": optim.weight_decay if decay else 0.0, "lr": peak, "peak_lr": peak}
        for (decay, peak), parameters in groups.items()
    ]
    devices = {parameter.device.type for parameters in groups.values() for parameter in parameters}
    return torch.optim.AdamW(options, betas=optim.betas, eps=optim.eps, fused=devices <= {"cpu", "cuda"})


def freeze(model: nn.Module, names: Iterable[str]) -> None:
    """Exclude modules and parameters from training, by their dotted names in the model.

    Raises:
        ConfigError: for a name that the model does not have, with the nearest; or where nothing is left to train.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    known = [*modules, *parameters]
    for name in names:
        if name not in known:
            near = ", ".join(map(repr, get_close_matches(name, known)))
            hint = f"did you mean {near}?" if near else f"known: {', '.join(n for n in known if '.' not in n)}"
            raise ConfigError(f"recipe: optim.freeze names {brief(name)}, no part of the model", hint=hint)
        for parameter in [parameters[name]] if name in parameters else modules[name].parameters():
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ConfigError("recipe: optim.freeze leaves nothing to train", hint="name fewer modules")


def schedule(optim: Optim, step: int, progress: float) -> float:
    """The learning rate of a step (0 is the first) as a share of its peak.

    ``min(1, (step + 1) / (warmup + 1))`` up to the peak, then ``floor + (1 - floor) (1 + cos(pi q)) / 2``, where q goes
    from 0 to 1 over the rest of the run's ``progress``, be that counted in steps or in minutes. Where ``warmup`` is
    ``"auto"``, the rise is ``min(1, max((step + 1) / 51, 10 progress))``: it ends with a tenth of the run on a slow
    machine, too.
    """
    a_step = progress / step if step else 0.0  # of the run, on average
    if optim.warmup == AUTO:
        rise, ended = max((step + 1) / (WARMUP + 1), progress / WARMUP_SHARE), min(WARMUP_SHARE, WARMUP * a_step)
    else:
        rise, ended = (step + 1) / (optim.warmup + 1), optim.warmup * a_step
    q = min(1.0, max(0.0, (progress - ended) / (1 - ended))) if ended < 1 else 0.0
    return min(1.0, rise) * (optim.floor + (1 - optim.floor) * (1 + math.cos(math.pi * q)) / 2)


def set_learning_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Give every group its share of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = share * group["peak_lr"]
