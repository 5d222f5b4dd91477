"""``dualform demo``: train, generate, save the state and resume, in a few minutes on a CPU."""

import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dualform.cli.text import printable
from dualform.core.errors import CheckpointError, DualformError

if TYPE_CHECKING:
    from rich.console import Console

    from dualform.generation.session import Session
    from dualform.models.lm import LanguageModel
    from dualform.models.tokenizer import Tokenizer

EPILOG = """[bold]Examples[/bold]
  dualform demo                              about two minutes of training on two CPU cores
  dualform demo --minutes 10 --out runs/ten  longer is better"""

PROMPT = "class Reader:\n    def __init__(self"
_MARK = "made-by-dualform-demo"  # a file that marks a folder as made by this command
_WRITTEN, _SHORT, _LONG, _RESUMED = 400, 100, 20_000, 120  # tokens


def demo(
    minutes: Annotated[
        float | None, typer.Option(help="Minutes of training, if not those of the built-in recipe.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The run's folder; one that a demo made before is replaced.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(help="Of the weights, the order of the data and the draws.")] = 0,
) -> None:
    """Train a small byte-level hybrid on Python's own library, and write with it. Downloads nothing."""
    from rich.console import Console

    from dualform.train.loop import train
    from dualform.train.recipe import Recipe

    console = Console(highlight=False, soft_wrap=True)
    overrides = [f"seed={seed}", f"out={json.dumps(str(out))}"]
    recipe = Recipe.load(overrides=overrides if minutes is None else [*overrides, f"minutes={minutes}"])
    _claim(out)
    _heading(console, "train")
    console.print(
        "A hybrid of Mamba-2 and windowed attention learns the Python standard library, byte by byte,\n"
        f"for {recipe.minutes:g} minutes. Nothing is downloaded; Ctrl-C stops it.\n"
    )
    train(recipe, console=console)
    _show(console, out, seed)


def _claim(out: Path) -> None:
    """Empty the folder of an earlier demo, or make it; refuse one that holds something else."""
    if out.is_dir() and (out / _MARK).exists():
        from dualform.train.claim import holding

        with holding(out):
            shutil.rmtree(out)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(
            f"{out}: not empty, and not made by a demo", hint="give another folder: dualform demo --out FOLDER"
        )
    out.mkdir(parents=True)
    (out / _MARK).touch()


def _show(console: "Console", out: Path, seed: int) -> None:
    from rich.markup import escape

    from dualform.cli.folders import load_model

    model, tokenizer = load_model(str(out))
    _heading(console, "write")
    session = _write(console, model, tokenizer, seed)
    _heading(console, "a state of constant size")
    _measure(console, model, tokenizer)
    _heading(console, "save the state, load it, go on")
    state = out / "demo.state"
    _resume(console, model, session, state)
    _heading(console, "try next")
    commands = [
        (f'dualform generate {out} "import "', "your own prompt; it works in a pipe, too"),
        (f"dualform generate {out} --state {state}", "go on from the state above"),
        ("dualform train --set minutes=10 --out runs/ten", "longer is better; --set changes any key"),
        ("dualform train --set data.path=FOLDER --out runs/mine", "your own text"),
        ("dualform info mamba2-130m", "the sizes of the papers"),
        ("dualform check", "verify the contract on this machine"),
    ]
    width = max(len(command) for command, _ in commands)
    for command, what in commands:
        console.print(f"[bold]{escape(command.ljust(width))}[/bold]  [dim]{what}[/dim]")


def _write(console: "Console", model: "LanguageModel", tokenizer: "Tokenizer", seed: int) -> "Session":
    """Stream a completion; the session it leaves."""
    from dualform.generation.engine import generate
    from dualform.generation.options import Sampling

    sampling = Sampling(temperature=0.7, top_p=0.95)
    generation = generate(model, tokenizer.encode(PROMPT), _WRITTEN, sampling=sampling, seed=seed)
    console.print(PROMPT, style="bold", markup=False, end="")
    decoder, times = tokenizer.stream(), []
    for token in generation:
        times.append(time.perf_counter())
        console.file.write(printable(decoder.push(token)))
        console.file.flush()
    console.file.write(decoder.flush() + "\n\n")
    rate = (len(times) - 1) / (times[-1] - times[0])
    console.print(f"{len(times)} tokens, {rate:,.0f} tokens/s")
    return generation.state


def _measure(console: "Console", model: "LanguageModel", tokenizer: "Tokenizer") -> None:
    """The size of the state after a short and after a long text."""
    from dualform.core.tree import nbytes
    from dualform.generation.engine import generate

    console.print("All that the model remembers of a text, however long:")
    source = Path(json.__file__).with_name("decoder.py").read_text(encoding="utf-8")
    tokens = tokenizer.encode(source)
    sizes = []
    for length in (_SHORT, _LONG):
        start = time.perf_counter()
        session = generate(model, (tokens * (1 + length // len(tokens)))[:length], 0).state
        rate = length / (time.perf_counter() - start)
        sizes.append(nbytes(session.state))
        console.print(f"  after {length:6,} tokens  {sizes[-1]:,} bytes  [dim](read at {rate:,.0f} tokens/s)[/dim]")
    if len(set(sizes)) > 1:
        raise DualformError(f"the state has grown from {sizes[0]:,} to {sizes[1]:,} bytes; it should be constant")


def _resume(console: "Console", model: "LanguageModel", session: "Session", path: Path) -> None:
    """Save, load and go on; compare with a generation that was never interrupted."""
    from dualform.generation.engine import generate
    from dualform.generation.session import Session

    unbroken = list(generate(model, [], _RESUMED, state=session))
    session.save(path, model)
    resumed = list(generate(model, [], _RESUMED, state=Session.load(path, model)))
    size = f"{path.stat().st_size:,} bytes"
    console.print(f"saved after {session.tokens} tokens to {path} ({size}), and loaded again", markup=False)
    if resumed != unbroken:
        raise DualformError("the loaded state goes on otherwise than the one in memory")
    console.print(f"the next {_RESUMED} tokens are the same as without the interruption, one by one")


def _heading(console: "Console", title: str) -> None:
    console.print()
    console.rule(f"[bold]{title}[/bold]", align="left", style="dim")
