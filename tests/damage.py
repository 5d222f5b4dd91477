"""Damage to files of text, JSON and TOML, at random with a seed: in their values, in their keys, and in their bytes."""

import copy
import json
import random
from typing import Any

ABSURD: list[Any] = [None, True, False, 0, -1, 1, 2, 0.5, -0.5, 1e-300, 1e300, 10**12, 2**31, 2**62, -(2**63), 10**30]
ABSURD += ["", "x", "inf", "nan", "\ud800", "\udcff", "\x1b[2J\0", "é" * 300, [], [[]], [1, "x"], {}, {"kind": "lstm"}]
ABSURD += [{"a": {"b": {"c": [None]}}}, float("nan"), float("inf"), [0] * 100, "[" * 300]


def damaged(text: str, rng: random.Random) -> bytes:
    """A JSON text with one to three faults: wrong values, keys that are lost or new, or bytes that are."""
    if rng.random() < 0.3:
        return damaged_bytes(text.encode("utf-8", "surrogatepass"), rng)
    tree = json.loads(text)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        tree = damaged_tree(tree, rng)
    return json.dumps(tree, ensure_ascii=rng.random() < 0.9).encode("utf-8", "surrogatepass")


def damaged_tree(tree: Any, rng: random.Random) -> Any:
    """A copy of a tree with one fault."""
    tree = copy.deepcopy(tree)
    places = [((), tree), *_places(tree)]
    path, value = rng.choice(places)
    if not path:
        return rng.choice(ABSURD) if rng.random() < 0.2 else damaged_tree(tree, rng) if len(places) > 1 else tree
    owner = tree
    for step in path[:-1]:
        owner = owner[step]
    match rng.randrange(6):
        case 0:
            del owner[path[-1]]
        case 1 if isinstance(owner, dict):
            owner[rng.choice(["", "x", "kind", "Å", "d_model", str(path[-1]) + "x"])] = value
        case 2 if isinstance(value, int | float) and not isinstance(value, bool):
            owner[path[-1]] = rng.choice([-value, value + 1, value * 10, value / 3, str(value), [value]])
        case 3:
            owner[path[-1]] = copy.deepcopy(rng.choice(places)[1])
        case _:
            owner[path[-1]] = rng.choice(ABSURD)
    return tree


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes that are cut, changed, repeated, or not text any more."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(out) + 1)
        match rng.randrange(5):
            case 0:
                del out[at:]
            case 1:
                del out[at : at + rng.randrange(1, 20)]
            case 2 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 3:
                out[at:at] = rng.choice([b"\xff", b"\0", b"[" * 5000, b'"', b"{", b"}", b",", b"9" * 5000, b"\xe2\x82"])
            case _:
                out[at:at] = out[at : at + rng.randrange(1, 40)]
    return bytes(out)


def _places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Any]]:
    """Every value inside of a tree, and where it is."""
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found = [((*path, key), value) for key, value in inside]
    return found + [place for where, value in found for place in _places(value, where)]
