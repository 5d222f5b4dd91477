"""The options of rotary embeddings as transformers writes them: in a table of their own, or as keys beside others."""

from collections.abc import Mapping
from typing import Any

from dualform.core.errors import ConfigError
from dualform.core.options import brief

_KEYS = ("rope_theta", "partial_rotary_factor")
_OLD = {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}  # of GPT-NeoX


def flat(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A table whose ``rope_parameters``, or ``rope_scaling`` of older files, are keys beside the others.

    Raises:
        ConfigError: for a kind of scaling that the layers here do not have.
    """
    found = {key: value for key, value in table.items() if key not in _OLD}
    found |= {new: table[old] for old, new in _OLD.items() if old in table}
    for key in ("rope_parameters", "rope_scaling"):
        given = found.pop(key, None)
        if given is None:
            continue
        if not isinstance(given, Mapping):
            raise ConfigError(f"{where}{key} is {brief(given)}, expected an object")
        kind = given.get("rope_type", given.get("type", "default"))
        if kind != "default":
            raise ConfigError(f"{where}{key} is of the kind {brief(kind)}, which the layers here do not have")
        found |= {name: given[name] for name in _KEYS if given.get(name) is not None}
    return found


def nested(table: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse: a table with ``rope_parameters``, as transformers writes it today."""
    kept = {key: value for key, value in table.items() if key not in _KEYS}
    if table.get("rope_theta") is None:
        return kept
    given = {key: table[key] for key in _KEYS if key in table}
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
