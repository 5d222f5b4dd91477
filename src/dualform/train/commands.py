"""Commands to paste: what a run says that a person may do next."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def resuming(out: str | Path, settings: Mapping[str, Any] | None = None) -> str:
    """``dualform train runs/one --resume --set steps=40``."""
    return " ".join(["dualform train", shlex.quote(str(out)), "--resume", *_set(settings or {})])


def beginning(recipe: str | Path, out: str | Path, settings: Mapping[str, Any]) -> str:
    """``dualform train runs/one --out runs/one-2 --set seed=1``: the recipe of a run, in another folder."""
    return " ".join(["dualform train", shlex.quote(str(recipe)), elsewhere(out), *_set(settings)])


def elsewhere(out: str | Path) -> str:
    """``--out runs/one-2``, beside a folder that cannot be used."""
    return f"--out {shlex.quote(f'{out}-2')}"


def _set(settings: Mapping[str, Any]) -> list[str]:
    """Numbers, texts and lists as JSON writes them, which TOML reads."""
    return [f"--set {shlex.quote(f'{key}={json.dumps(value)}')}" for key, value in settings.items()]
