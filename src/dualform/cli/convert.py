"""``dualform convert``: a model in the layout of another library, or one of another library in this one's."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.status import Status

    from dualform.models.backbone import Backbone
    from dualform.models.lm import LanguageModel

EPILOG = """[bold]Examples[/bold]
  dualform convert state-spaces/mamba-130m-hf mamba-130m    from the Hugging Face Hub
  dualform convert runs/notes notes-hf --to hf              for transformers
  dualform convert runs/tuned merged                        a run with adapters, merged into its model
  dualform convert RWKV-x070-World-0.1B.pth world           a file of RWKV-7
  dualform convert mamba-130m.Q8_0.gguf mamba-130m          a file of GGUF
  dualform convert runs/notes notes.gguf --to gguf          for llama.cpp: Mamba and Mamba-2
  dualform convert runs/notes notes.onnx --to onnx          one step, for devices without Python
  dualform convert mamba-130m half --dtype bfloat16         in half the bytes
  dualform convert mamba-130m small --quantize int8         in a quarter of them, and what that costs"""


_MEASURED = 2**14  # tokens of a text


class Quantize(StrEnum):
    """What ``dualform.load`` takes as ``quantize``."""

    int8 = "int8"


class To(StrEnum):
    """The layouts: those of ``dualform.models.tables.registry.LAYOUTS``, which would load torch; and a step in ONNX."""

    dualform = "dualform"
    hf = "hf"
    mamba_ssm = "mamba_ssm"
    rwkv7 = "rwkv7"
    gguf = "gguf"
    onnx = "onnx"


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Folder of a model or a training run, a file of RWKV-7 or GGUF, or a name of the Hub.",
        ),
    ],
    target: Annotated[
        Path,
        typer.Argument(
            metavar="TARGET", help="A folder that is not there yet, or with --to rwkv7, gguf or onnx a file."
        ),
    ],
    to: Annotated[
        To,
        typer.Option(
            help="Whose layout: this library's, that of transformers, of mamba-ssm, of RWKV-7's authors, or of "
            "llama.cpp; or onnx, one step of the model."
        ),
    ] = (To.dualform),
    dtype: Annotated[
        str | None, typer.Option(help="Of the weights, such as bfloat16; without it they keep theirs.")
    ] = None,
    quantize: Annotated[
        Quantize | None,
        typer.Option(help="Matrices in 8 bits, for inference on a CPU; prints how much worse the model predicts."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="With --quantize: a file or folder to measure it on; else a part of Python's library."),
    ] = None,
    max_len: Annotated[
        int, typer.Option(min=0, help="With --to onnx: tokens that attention without a window has room for.")
    ] = 0,
) -> None:
    """Write a model in another layout, with its tokenizer.

    The target appears when it is complete, or not at all.
    """
    from dualform.cli.folders import model_folder
    from dualform.core.errors import CheckpointError, ConfigError

    if quantize is not None and to != To.dualform:
        hint = "leave --to out" if to != To.onnx else "ONNX's own tools quantise such a file"
        raise ConfigError(f"--quantize {quantize}: the layout {to.value!r} has no matrices of 8 bits", hint=hint)
    if text is not None and quantize is None:
        raise ConfigError("--text is what --quantize is measured on", hint="add --quantize int8")
    if target.exists() or target.is_symlink():
        raise CheckpointError(f"{target}: is there already", hint="give a name that is not there yet")
    if to == To.onnx:
        from dualform.models.saving.model import load, shape
        from dualform.models.saving.onnx_file import check_step, export_onnx

        check_step(shape(model_folder(source)), max_len)
        with _told(f"reading {source}"):
            model = load(model_folder(source), dtype=dtype or "float32")
        with _told(f"writing {target}"):
            export_onnx(model, target, max_len=max_len)
    else:
        model = _written(source, target, to, dtype, quantize, text)
    size = sum(path.stat().st_size for path in (target.iterdir() if target.is_dir() else [target]))
    typer.echo(f"{target}: {model.parameter_count():,} parameters, {size:,} bytes, in the layout of {to.value}")


def _written(
    source: str, target: Path, to: To, dtype: str | None, quantize: Quantize | None, text: Path | None
) -> "Backbone":
    """Read a model, and write it in the layout of a library."""
    from dualform.cli.folders import model_folder
    from dualform.core.json_file import to_json
    from dualform.models.gguf.write import described_as_gguf
    from dualform.models.saving.described import described_as
    from dualform.models.saving.files import GENERATION_FILE, TOKENIZER_FILE, creating
    from dualform.models.saving.model import load, shape, write
    from dualform.models.saving.one_file import save_gguf, write_file
    from dualform.models.saving.undisturbed import undisturbed
    from dualform.models.tables.rwkv7 import RWKV7File
    from dualform.models.usage import read_ends, usage_files

    if to == To.gguf:  # what cannot be written is refused before anything is read
        table = described_as_gguf(shape(model_folder(source)).config)
    else:
        _, table = described_as(shape(model_folder(source)), to)

    def read(folder: Path) -> "tuple[LanguageModel, dict[str, bytes]]":
        model, beside = load(folder, dtype=dtype), usage_files(folder)
        if GENERATION_FILE not in beside and (ends := read_ends(folder, model.config.vocab_size)):
            beside[GENERATION_FILE] = to_json({"eos_token_id": ends}).encode()
        return model, beside

    with _told(f"reading {source}"):
        model, beside = undisturbed(lambda: model_folder(source), read)
    if quantize is not None:
        _quantize(model, source, text)
    with _told(f"writing {target}"):
        if isinstance(table, RWKV7File):
            write_file(model, target, table)
        elif to == To.gguf:
            tokenizer = beside.get(TOKENIZER_FILE)
            ends = read_ends(model_folder(source), model.config.vocab_size)
            save_gguf(model, target, None if tokenizer is None else tokenizer.decode(), ends)
        else:
            with creating(target) as new:
                write(model, new, layout=to)
                for name, content in beside.items():
                    (new / name).write_bytes(content)
    return model


def _quantize(model: "Backbone", source: str, text: Path | None) -> None:
    """Quantise a model, and say what that costs where there is a way to tell."""
    from dualform.cli.folders import model_folder
    from dualform.core.errors import ArgumentError, CheckpointError
    from dualform.models.lm import LanguageModel
    from dualform.models.quantized import quantize
    from dualform.models.tokenizer import load_tokenizer
    from dualform.train.quantization import quantize_measured, text_of

    if model.quantization is not None:
        raise ArgumentError(f"{source}: is quantised already", hint="without --quantize it is copied")
    why, tokenizer = "it is no language model", None
    if isinstance(model, LanguageModel):
        try:
            tokenizer = load_tokenizer(model_folder(source), model.config.vocab_size)
        except CheckpointError as error:
            why = str(error).split("\n")[0]
    if tokenizer is None or not isinstance(model, LanguageModel):
        quantize(model)
        typer.echo(f"the loss is not measured: {why}")
        return
    with _told(f"quantising {source}"), text_of(text, tokenizer) as dataset:
        found = quantize_measured(model, dataset, limit=_MEASURED)
    change = 100 * (found.after / found.before - 1) if found.before else 0.0
    typer.echo(
        f"{found.after:.4f} bits per byte of {text or 'the demo text'}, {found.before:.4f} before ({change:+.2f} %), "
        f"over {found.tokens:,} tokens"
    )
    typer.echo(
        f"logits moved by {100 * found.distance:.2f} % of their size; the most likely token is the same "
        f"{100 * found.agreement:.1f} % of the time"
    )


def _told(what: str) -> "Status":
    """A line on a terminal that moves while something takes its time."""
    from rich.console import Console
    from rich.markup import escape

    from dualform.cli.text import printable

    return Console(stderr=True).status(escape(printable(what)))
