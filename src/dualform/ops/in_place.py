"""The operator that a compiler sees where a one-step update writes to memory of the caller's."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dualform.ops.dispatch import on_device, ordinary_dispatch
from dualform.ops.state import check_out_state, give_state

if TYPE_CHECKING:
    from dualform.ops.op import Op


def writing(op: "Op[Any]", library: torch.library.Library, schema: str) -> Callable[..., Tensor]:
    """Define ``dualform::<name>_``: y of a step, whose next state is written to ``out_state``.

    Its schema says so. Compiled programs then write in place, row by row where there are ``rows``, instead of computing
    states that they copy afterwards. It records no gradient.

    Args:
        op: a one-step update, whose record has the fields ``state``, ``out_state`` and ``rows``.
        library: where it is defined.
        schema: the arguments of the operator that writes nothing.
    """
    name = f"{op.name}_"

    def run(forced: str, *args: Any) -> Tensor:
        a = op.arguments(*args)
        op.check(a)
        check_out_state(name, a.out_state, a.state)
        backend = op.choose(forced, a)
        with torch.no_grad(), on_device(a.state.device), ordinary_dispatch():
            y, after = (backend.infer or backend.forward)(a)
            give_state(after, a.out_state, a.rows)
        return y

    def fake(forced: str, *args: Any) -> Tensor:
        return op.fake(op.arguments(*args))[0]

    library.define(f"{name}(str backend, {schema.replace('Tensor? out_state', 'Tensor(a!) out_state')}) -> Tensor")
    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dualform::{name}", fake, lib=library)
    return getattr(torch.ops.dualform, name).default
