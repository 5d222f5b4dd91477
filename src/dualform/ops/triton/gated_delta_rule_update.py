"""One step of the gated delta rule in Triton, a single pass over its state."""

from torch import Tensor

from dualform.core.shapes import wide
from dualform.ops.gated_delta_rule import GatedDeltaRuleUpdate, gated_delta_rule_update_op
from dualform.ops.layout import inner_contiguous, next_state
from dualform.ops.triton.support import add_backend, blocks, kernels, power_of_two

_MOST_KEYS = 512
_ELEMENTS = 4096  # of the states of a program


def _update(a: GatedDeltaRuleUpdate) -> list[Tensor]:
    dtype, (batch, heads, width), keys = wide(*a[:6]), a.v.shape, a.q.shape[2]
    after, given = next_state(a.out_state, a.state, batch, dtype, 3)
    y = a.v.new_empty(a.v.shape)
    if y.numel() == 0:
        return [y, after]
    state, q, k, v = (inner_contiguous(m, m.dim() - 1) for m in (a.state, a.q, a.k, a.v))
    log = None if a.log_decay is None else a.log_decay.contiguous()
    padded = power_of_two(keys)
    columns = min(max(1, _ELEMENTS // padded), power_of_two(width))
    module = kernels("gated_delta_rule_update")
    module.gated_delta_rule_update[(batch * heads * blocks(width, columns),)](
        state, q, k, v, a.beta.contiguous(), log, y, after, None if a.rows is None else a.rows.contiguous(),
        len(state), heads, heads // q.shape[1], state.stride(0), q.stride(0), k.stride(0), v.stride(0),
        after.stride(0), CHANNELS=log is not None and log.dim() == 3, TABLE=given, N=keys, P=width, NP=padded,
        BP=columns, scale=a.scale, dtype=getattr(module.tl, str(dtype)[6:]),
    )  # fmt: skip
    return [y, after]


def _refuses(a: GatedDeltaRuleUpdate) -> str | None:
    keys = a.q.shape[2]
    return None if 0 < keys <= _MOST_KEYS else f"N is {keys}, expected 1 to {_MOST_KEYS}"


add_backend(gated_delta_rule_update_op, forward=_update, refuses=_refuses)
