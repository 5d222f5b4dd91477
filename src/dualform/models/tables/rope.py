"""The options of rotary embeddings as transformers writes them: in a table of their own, or as keys beside others."""

from collections.abc import Mapping
from typing import Any

from dualform.core.errors import ConfigError
from dualform.core.options import brief, check_types
from dualform.layers.rotary import RotaryConfig

_KEYS = ("rope_theta", "partial_rotary_factor")
_OLD = {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}  # of GPT-NeoX
_SCALED: Mapping[str, Mapping[str, str]] = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "slow",
        "high_freq_factor": "fast",
        "original_max_position_embeddings": "original",
    },
    "yarn": {
        "factor": "factor",
        "beta_slow": "slow",
        "beta_fast": "fast",
        "original_max_position_embeddings": "original",
        "attention_factor": "magnitude",
        "truncate": "rounded",
    },
}
"""By the kind of scaling, its keys there and the fields of a ``RotaryConfig``."""


def flat(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A table whose ``rope_parameters``, or ``rope_scaling`` of older files, are keys beside the others.

    Where angles are scaled, ``rope_theta`` is a ``RotaryConfig``.

    Raises:
        ConfigError: for a kind of scaling that the layers here do not have, or a value that none can have.
    """
    found = {key: value for key, value in table.items() if key not in _OLD}
    found |= {new: table[old] for old, new in _OLD.items() if old in table}
    for key in ("rope_parameters", "rope_scaling"):
        given = found.pop(key, None)
        if given is None:
            continue
        if not isinstance(given, Mapping):
            raise ConfigError(f"{where}{key} is {brief(given)}, expected an object")
        found |= {name: given[name] for name in _KEYS if given.get(name) is not None}
        kind = given.get("rope_type", given.get("type", "default"))
        if kind == "default":
            continue
        if not isinstance(kind, str) or kind not in _SCALED:
            raise ConfigError(f"{where}{key} is of the kind {brief(kind)}, which the layers here do not have")
        fields: dict[str, Any] = {
            here: given[there] for there, here in _SCALED[kind].items() if given.get(there) is not None
        }
        if "original" not in fields and kind == "yarn" and isinstance(table.get("max_position_embeddings"), int):
            fields["original"] = table["max_position_embeddings"]
        if odd := sorted(given.keys() - {*_SCALED[kind], *_KEYS, "rope_type", "type"}):
            raise ConfigError(f"{where}{key} has {brief(odd[0])}, which the layers here do not have")
        fields |= {"base": found.get("rope_theta", 10000.0), "scaling": kind}
        check_types(RotaryConfig, fields, f"{where}{key}")
        found["rope_theta"] = RotaryConfig(**fields)
    return found


def nested(table: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse: a table with ``rope_parameters``, as transformers writes it today.

    Raises:
        ConfigError: for angles that transformers does not have.
    """
    kept = {key: value for key, value in table.items() if key not in _KEYS}
    base = table.get("rope_theta")
    if base is None:
        return kept
    given = {key: table[key] for key in _KEYS if key in table}
    if isinstance(base, RotaryConfig):
        if base.interleaved:
            raise ConfigError("rope: interleaved pairs")
        names = _SCALED[base.scaling] if base.scaling else {}
        scaled = {there: getattr(base, here) for there, here in names.items() if getattr(base, here) is not None}
        given |= {"rope_type": base.scaling or "default", "rope_theta": base.base, **scaled}
    return {**kept, "rope_parameters": {"rope_type": "default", **given}}


def rotated(share: float, d_head: int, where: str = "") -> int | None:
    """Features of a head that are rotated, given their share; None for all of them.

    Raises:
        ConfigError: for an odd number of them, of which transformers makes one more.
    """
    count = int(share * d_head)
    if count < d_head and count % 2:
        raise ConfigError(f"{where}partial_rotary_factor makes {count} of {d_head} features, expected an even number")
    return None if count >= d_head else count


def share(d_rope: int | None, d_head: int) -> float:
    """The inverse of :func:`rotated`."""
    exact = 1.0 if d_rope is None else d_rope / d_head
    return exact if d_rope is None or int(exact * d_head) == d_rope else exact + 0.5 / d_head  # rounded down there
