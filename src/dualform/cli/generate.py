"""``dualform generate``: continue a text, in a terminal or in a pipe."""

import signal
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dualform.cli.text import Until, output, printable, read_prompt
from dualform.core.errors import ArgumentError
from dualform.generation.options import Sampling

if TYPE_CHECKING:
    from dualform.generation.engine import Generation
    from dualform.models.tokenizer import TextStream

_DEFAULT = Sampling()
EPILOG = """[bold]Examples[/bold]
  dualform generate runs/demo "import "                stream to the terminal
  head notes.py | dualform generate runs/demo > more   new text alone in a pipe
  dualform generate OWNER/NAME "Who was Kalman?"       the answer of a chat model of the Hub
  dualform generate runs/demo "def " --state a.state   keep the state, and ...
  dualform generate runs/demo --state a.state          ... go on where it ended"""


def generate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Folder of a saved model or a training run, or a name of the Hugging Face Hub."
        ),
    ],
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="[PROMPT]", help="Text to continue; '-', or nothing in a pipe, reads standard input."),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(help="Go on from this file if it exists (the prompt is then optional), and save to it after."),
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=0, help="The most tokens to generate.")] = 256,
    temperature: Annotated[
        float, typer.Option("--temperature", "-t", help="Below 1 is safer, above is wilder; 0 takes the likeliest.")
    ] = _DEFAULT.temperature,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest tokens only; 0 is off.")] = _DEFAULT.top_k,
    top_p: Annotated[
        float, typer.Option(help="Draw from the likeliest tokens that sum to this; 1 is off.")
    ] = _DEFAULT.top_p,
    min_p: Annotated[
        float, typer.Option(help="Drop tokens less likely than this share of the best; 0 is off.")
    ] = _DEFAULT.min_p,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1 makes recent tokens less likely.")
    ] = _DEFAULT.repetition_penalty,
    seed: Annotated[
        int | None, typer.Option(help="Of the random draws; default 0, or the stream of the state.", show_default=False)
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text to end before. Repeatable.", show_default=False)] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after a token with which the model ends a text.")
    ] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, where the model has a chat template, too.")
    ] = False,
    system: Annotated[
        str | None, typer.Option(help="What a conversation begins with, for a chat template.", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")] = "auto",
) -> None:
    """Continue a text, streaming to standard output. Everything else goes to standard error.

    Where the model has a chat template, the prompt is a message, and what comes out is the answer to it.
    The prompt is text throughout: the name of a special token in it, such as <|endoftext|>, is not that token.
    """
    output()
    resume = state is not None and state.exists()
    text = read_prompt(prompt, required=not resume)

    from dualform.cli.folders import load_model
    from dualform.generation.engine import generate as engine
    from dualform.generation.session import WINDOW, Session
    from dualform.models.usage import usage_of

    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    lm, tokenizer = load_model(model, device)
    usage = usage_of(model, tokenizer, lm.config.vocab_size)
    template = None if raw else usage.template
    if system is not None and (template is None or resume):
        why = "the conversation has begun" if template is not None else "there is no chat template"
        raise ArgumentError(f"--system is given, and {why}", hint="leave it out")
    session = Session.load(state, lm) if state is not None and resume else None
    ends = () if ignore_eos else usage.ends
    if session is not None and not text and int(session.history[0, -1]) in ends:
        raise ArgumentError(f"{state}: the model has ended its text", hint="give a prompt, or --ignore-eos to go on")
    decoder = tokenizer.stream()
    before = ""
    if session is not None and not text and int(session.generated):
        last = session.history[0, -min(WINDOW, int(session.generated)) :].tolist()
        before = "".join(map(decoder.push, last))  # what the last run left unfinished, a character or a stop, ends here
    if template is None or not text:
        tokens = [*(tokenizer.begin if session is None else ()), *tokenizer.encode(text)]
    elif session is None:
        opening = [] if system is None else [{"role": "system", "content": system}]
        tokens = template.encode(tokenizer, [*opening, {"role": "user", "content": text}])
    else:
        last = int(session.history[0, -1])
        tokens = template.encode_next(tokenizer, {"role": "user", "content": text}, last=last)
    generation = engine(lm, tokens, max_tokens, sampling=sampling, seed=seed, state=session, stop=ends)
    until = Until(stop or [], before)
    count, rate, interrupted = _stream(generation, decoder, until, ends, finish=state is None)
    if state is not None:
        generation.state.save(state, lm)
    if sys.stderr.isatty():
        where = f", state saved to {state}" if state is not None else ""
        typer.secho(f"{count} tokens, {rate:,.0f} tokens/s{where}", dim=True, err=True)
    if interrupted:
        raise typer.Exit(130)


def _stream(
    generation: "Generation", decoder: "TextStream", until: Until, ends: Collection[int], *, finish: bool
) -> tuple[int, float, bool]:
    """Print text as it becomes certain; the number of tokens, tokens a second, and whether Ctrl-C ended it."""
    times: list[float] = []
    with _interrupt(times) as interrupted:
        for token in generation:
            times.append(time.perf_counter())
            if token in ends:
                break
            _write(until.push(decoder.push(token)))
            if until.found or interrupted:
                break
    if not until.found:
        _write((until.push(decoder.flush()) if finish else "") + until.flush())
    if sys.stdout.isatty():
        _write("\n")
    rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0
    return len(times), rate, bool(interrupted)


def _write(text: str) -> None:
    if text:
        sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()


@contextmanager
def _interrupt(times: list[float]) -> Iterator[list[int]]:
    """Ctrl-C after the first token is only noted, so that the token in progress is finished and the state is whole."""
    noted: list[int] = []

    def note(number: int, frame: object) -> None:
        if noted or not times:
            raise KeyboardInterrupt
        noted.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)
