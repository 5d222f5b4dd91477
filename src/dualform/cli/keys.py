"""Keys of a recipe that were given to ``dualform train`` without ``--set``, and the command that was meant."""

import shlex
from pathlib import Path
from typing import Any

from typer.core import TyperCommand

from dualform.core.errors import ConfigError


class TrainCommand(TyperCommand):
    """``train``, which answers ``--lr 3``, ``data.path=notes`` and ``my.toml notes/`` with what to write instead."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As of any command.

        Raises:
            ConfigError: for a key of the recipe that is given without ``--set``; its hint is the whole command.
        """
        takes = {name: not getattr(p, "is_flag", False) for p in self.get_params(ctx) for name in p.opts}
        meant, misplaced = _meant(args, takes)
        if misplaced:
            raise ConfigError(
                f"train: {', '.join(misplaced)}: keys of the recipe, such as data.path, are set with --set",
                hint=f"write: dualform train {' '.join(meant)}",
            )
        return super().parse_args(ctx, args)


def _meant(args: list[str], takes: dict[str, bool]) -> tuple[list[str], list[str]]:
    """The arguments with every key behind a ``--set``, as a shell reads them; and the words that were not.

    Args:
        args: as they were given.
        takes: the command's options, and whether each is followed by a value.
    """
    rest, meant, misplaced, recipes = list(args), list[str](), list[str](), 0
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        follows = bool(rest) and not rest[0].startswith("--")
        if word == "--":
            return [*meant, word, *map(shlex.quote, rest)], misplaced
        if name in takes:
            meant.append(shlex.quote(word))
            if takes[name] and not equals and rest:
                value = rest.pop(0)
                if name == "--set" and "=" not in value and rest and not rest[0].startswith("--"):
                    misplaced.append(f"{value} {rest[0]}")
                    value = f"{value}={rest.pop(0)}"
                meant.append(shlex.quote(value))
        elif name.startswith("--") and (key := _key(name[2:])):
            given = value if equals else rest.pop(0) if follows else "true"
            meant.append(f"--set {shlex.quote(f'{key}={given}')}")
            misplaced.append(name)
        elif equals and name.replace(".", "").isidentifier() and not Path(word).exists():
            meant.append(f"--set {shlex.quote(f'{_key(name) or name}={value}')}")
            misplaced.append(word)
        else:
            recipes += not word.startswith("-")
            if recipes == 2 and Path(word).exists():
                meant.append(_text(word))
                misplaced.append(word)
            else:
                meant.append(shlex.quote(word))
    return meant, misplaced


def _key(name: str) -> str:
    from dualform.train.recipe import key_of

    return key_of(name)


def _text(path: str) -> str:
    from dualform.train.recipe import setting

    return setting("data.path", path)
