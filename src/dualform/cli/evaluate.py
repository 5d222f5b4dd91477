"""``dualform eval``: how well a model predicts a text."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dualform.cli.text import print_json
from dualform.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.progress import Progress

EPILOG = """[bold]Examples[/bold]
  dualform eval runs/notes --set data.path=letters.txt      your text
  dualform eval OWNER/NAME --set data.path=book.txt         a model of the Hugging Face Hub
  dualform eval runs/notes --set data.path=mails.jsonl --set data.text_field=body --set data.packed=true"""


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Folder of a saved model or a training run, or a name of the Hugging Face Hub."
        ),
    ],
    set_: Annotated[
        list[str],
        typer.Option("--set", metavar="data.KEY=VALUE", help="The text, and how it is read. Repeatable."),
    ],
    streams: Annotated[
        int, typer.Option(min=1, help="Into how many pieces the text is cut, to read them side by side.")
    ] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="Of the weights, such as bfloat16; without it they keep theirs.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Bits per byte and perplexity of a text, read from its beginning to its end with constant memory.

    A state passes from each token to the next, and from one document into the next unless data.packed is true.
    Attention without a window, whose state would grow, begins anew after data.length tokens. With data.chat=true the
    figures are those of the answers.
    """
    from dualform.cli.folders import load_model
    from dualform.models.usage import usage_of
    from dualform.train.data import whole_text
    from dualform.train.evaluate import score
    from dualform.train.recipe import Recipe

    if strange := [one for one in set_ if not one.startswith("data.")]:
        raise ConfigError(f"--set {strange[0]!r}: expected a key of data", hint="such as --set data.path=letters.txt")
    if not any(one.startswith("data.path=") for one in set_):
        raise ConfigError("no text is given", hint="--set data.path=FILE_OR_FOLDER")
    data = Recipe.load(overrides=set_).data
    lm, tokenizer = load_model(model, device, dtype)
    template = usage_of(model, tokenizer, lm.config.vocab_size).template if data.chat else None
    if data.chat and template is None:
        hint = "evaluate it on text, or take another model"
        raise ConfigError(f"data.chat is true, and {model} has no chat template", hint=hint)
    with whole_text(data, tokenizer, template) as dataset, _progress() as bar:
        task = None if bar is None else bar.add_task("reading", total=None)

        def tell(done: int, whole: int) -> None:
            if bar is not None and task is not None:
                bar.update(task, completed=done, total=whole)

        found = score(lm, dataset, length=data.length, packed=data.packed, streams=streams, tell=tell)
        counts, skipped = dataset.about["held_out"], dataset.about["skipped"]
    document = {
        "model": model,
        "path": data.path,
        "of": "answers" if data.chat else "text",
        "documents": counts["documents"],
        "bytes": found.bytes,
        "tokens": found.tokens,
        "bits_per_byte": found.bits_per_byte,
        "perplexity": found.perplexity,
        "nats": found.nats,
    }
    if as_json:
        print_json(document)
        return
    answers = " of answers" if data.chat else ""
    typer.echo(f"{found.bits_per_byte:.4f} bits per byte, perplexity {found.perplexity:.4g} per token{answers}")
    passed = f"; passed over {skipped} files that are not text" if skipped else ""
    read = f"{found.bytes:,} bytes, {found.tokens:,} tokens{answers}, {counts['documents']:,} documents"
    typer.echo(f"{Path(data.path).name}: {read}{passed}")


def _progress() -> "Progress | nullcontext[None]":
    """A bar on a terminal, and nothing elsewhere."""
    import sys

    if not sys.stderr.isatty():
        return nullcontext()
    from rich.console import Console
    from rich.progress import Progress

    return Progress(console=Console(stderr=True), transient=True)
