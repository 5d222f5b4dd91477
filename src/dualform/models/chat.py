"""Chat templates: a conversation as the text, and as the tokens, that a model was trained on.

A template is a Jinja program beside a model's tokenizer. It runs in Jinja's sandbox, where it reads what it is given
and changes nothing. What it writes itself, such as ``<|im_start|>``, are special tokens. What the messages of a
conversation say is text: whoever writes ``<|im_end|>`` in a message does not end it.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any, NoReturn

from jinja2 import Environment, TemplateError, nodes
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dualform.core.errors import ArgumentError, CheckpointError
from dualform.core.json_file import kind_of
from dualform.core.options import brief
from dualform.models.tokenizer import Tokenizer

_LARGEST = 2**24  # characters or entries that one operation of a template may make
_FAILS = (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError)

ASSISTANT = "assistant"  # the role of a model's answers
Piece = tuple[list[int], int | None]
"""Tokens, and the number of the message whose answer they are."""

Message = Mapping[str, Any]
"""``{"role": "user", "content": "..."}``, with further keys where a template reads them."""


class ChatTemplate:
    """A Jinja template in the format of transformers.

    Args:
        source: the template.
        special: the special tokens that it may write, by the names that it has for them: ``{"bos_token": "<s>"}``.
        where: the file and the key in it, for errors.

    Raises:
        CheckpointError: for a source that is not a template.
    """

    def __init__(self, source: str, special: Mapping[str, str] | None = None, where: str = "chat template"):
        self.source, self.special, self.where = source, dict(special or {}), where
        try:
            self._template = _environment().from_string(source)
        except TemplateSyntaxError as error:
            raise CheckpointError(f"{where}: not a template, line {error.lineno}: {brief(str(error))}") from error
        except RecursionError as error:
            raise CheckpointError(f"{where}: not a template: nested too deep") from error

    def render(self, messages: Sequence[Message], *, answer: bool = True, **variables: Any) -> str:
        """The conversation as text.

        Args:
            messages: the first one first.
            answer: whether the text goes on to where the model's answer begins.
            variables: what else the template reads, such as ``tools``.

        Raises:
            ArgumentError: where the template refuses the conversation, or a message is no table with a role.
            CheckpointError: for a template that tries to do more than read, or that fails.
        """
        _check(messages)
        given = {"tools": None, "documents": None, **self.special, **variables}
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=answer, **given)
        except _RefusedError as error:
            raise ArgumentError(f"{self.where}: the template refuses this conversation: {error}") from error
        except SecurityError as error:
            hint = "a template reads a conversation and writes it as text; one that does more is not to be trusted"
            raise CheckpointError(f"{self.where}: refused: {brief(str(error))}", hint=hint) from error
        except _FAILS as error:
            raise CheckpointError(f"{self.where}: fails on this conversation: {brief(str(error))}") from error
        except (RecursionError, MemoryError) as error:
            raise CheckpointError(f"{self.where}: fails on this conversation: it goes on without end") from error

    def encode(
        self, tokenizer: Tokenizer, messages: Sequence[Message], *, answer: bool = True, **variables: Any
    ) -> list[int]:
        """The conversation as tokens; arguments and errors are those of :meth:`render`.

        The names of special tokens that the template writes are those tokens. A text of a message that holds such a
        name is text, the name too.
        """
        _check(messages)
        hidden = _Hidden(tokenizer)
        return hidden.encode(self.render(hidden.within(messages), answer=answer, **hidden.within(variables)))

    def encode_next(self, tokenizer: Tokenizer, message: Message, *, last: int, **variables: Any) -> list[int]:
        """The tokens that follow an answer of the model: its end, one more message, and where the next answer begins.

        Args:
            tokenizer: of the model.
            message: such as ``{"role": "user", "content": "..."}``.
            last: the last token of the model's answer. Where that is the one which ends it, it does not come again.
            variables: what else the template reads.

        Raises:
            CheckpointError: for a template that does not write an answer as it is; otherwise as :meth:`render`.
        """
        _check([message])
        hidden, answered = _Hidden(tokenizer), _unguessable()
        before = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answered}]
        text = self.render([*before, hidden.within(message)], **hidden.within(variables))
        if text.count(answered) != 1:
            raise CheckpointError(f"{self.where}: does not write an answer as it is, so that nothing can follow one")
        tokens = hidden.encode(text.partition(answered)[2])
        return tokens[1:] if tokens[:1] == [last] else tokens

    def encode_answers(self, tokenizer: Tokenizer, messages: Sequence[Message], **variables: Any) -> list[Piece]:
        """The tokens of :meth:`encode`, without a place for one more answer, in pieces.

        An answer is what the template writes of a message of the role ``"assistant"``, with what ends it: from where
        generation would begin to where the next message does. Other pieces are only read.

        Returns:
            ``(tokens, number of the message)`` for each answer, and ``(tokens, None)`` between; none is empty.

        Raises:
            ArgumentError: for a template in whose text an answer cannot be told from the rest; for a tokenizer that
                makes one token of the last characters before an answer and its first, or of its last and what follows.
                Otherwise as :meth:`render`.
        """
        _check(messages)
        hidden = _Hidden(tokenizer)
        shown, given = hidden.within(messages), hidden.within(variables)

        def text(count: int, answer: bool) -> str:
            return self.render(shown[:count], answer=answer, **given)

        whole = text(len(shown), False)
        tokens, pieces, done = hidden.encode(whole), list[Piece](), 0

        def upto(border: str, merged: str) -> int:
            before = hidden.encode(border)
            if tokens[: len(before)] != before:
                hint = "end what is written before and after an answer with a special token, or leave such lines out"
                raise ArgumentError(f"{self.where}: this tokenizer makes one token of {merged}", hint=hint)
            return len(before)

        for number, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            begin, end = text(number, True), text(number + 1, False)
            self._check_places(number, whole, begin, end)
            at = upto(begin, f"the last characters before the answer in message {number} and its first ones")
            to = upto(end, f"the last characters of the answer in message {number} and the first after it")
            if to <= max(at, done):
                raise ArgumentError(f"{self.where}: the template writes nothing of the answer in message {number}")
            pieces += [(tokens[done:at], None), (tokens[max(at, done) : to], number)]
            done = to
        return [piece for piece in (*pieces, (tokens[done:], None)) if piece[0]]

    def _check_places(self, number: int, whole: str, begin: str, end: str) -> None:
        """That an answer stands where generation would begin it, and that what follows leaves it as it was."""
        answer = f"the answer in message {number}"
        if not whole.startswith(end):
            hint = "make it several conversations, each of which ends with the answer that is to be learned"
            raise ArgumentError(f"{self.where}: the template writes {answer} otherwise once others follow", hint=hint)
        if not end.startswith(begin):
            hint = "let it write the same for add_generation_prompt and before an answer that is there"
            what = f"the template does not write {answer} where generation would begin it"
            raise ArgumentError(f"{self.where}: {what}", hint=hint)

    def __repr__(self) -> str:
        return f"ChatTemplate({brief(self.source)})"


class _Hidden:
    """Texts that hold the name of a special token: a template sees a word that means nothing in the place of each."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._texts = tokenizer, dict[str, str]()

    def within(self, value: Any) -> Any:
        """The value, a tree of dicts and lists, with such texts replaced."""
        if isinstance(value, str) and self._tokenizer.encode(value, special=True) != self._tokenizer.encode(value):
            self._texts[word := _unguessable()] = value
            return word
        if isinstance(value, Mapping):
            return {name: self.within(inner) for name, inner in value.items()}
        return [self.within(inner) for inner in value] if isinstance(value, list | tuple) else value

    def encode(self, text: str) -> list[int]:
        """The tokens of what a template has written, with such texts put back."""
        pieces = re.split(f"({'|'.join(self._texts)})", text) if self._texts else [text]
        tokens = list[int]()
        for piece in filter(None, pieces):
            hidden = self._texts.get(piece)
            tokens += self._tokenizer.encode(piece if hidden is None else hidden, special=hidden is None)
        return tokens


class _RefusedError(Exception):
    """A template called ``raise_exception``."""


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which also refuses an operation whose result does not fit into memory."""

    intercepted_binops = frozenset(("*", "**", "%"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "%" and not numbers and re.search(r"\d{5}|\*", str(left)):
            raise SecurityError("a text is formatted to an enormous width")
        if operator == "**" and not (numbers and abs(left) < _LARGEST and abs(right) < 64):
            raise SecurityError("a power of an enormous number")
        sizes = [len(side) if isinstance(side, str | list | tuple) else side for side in (left, right)]
        if operator == "*" and not numbers and not all(isinstance(n, int) for n in sizes):
            raise SecurityError(f"{brief(left)} * {brief(right)}")
        if operator == "*" and not numbers and sizes[0] * sizes[1] > _LARGEST:
            raise SecurityError("a text or list is repeated too often")
        return super().call_binop(context, operator, left, right)


class _Answers(Extension):
    """``{% generation %} ... {% endgeneration %}``, which marks what a model has said; its content, as it is."""

    def __init__(self, environment: Environment):
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@cache
def _environment() -> _Sandbox:
    made = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Answers, "jinja2.ext.loopcontrols"])
    made.filters["tojson"] = _to_json
    made.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return made


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    """As transformers has it: Jinja's own escapes characters of HTML."""
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)


def _refuse(why: str) -> NoReturn:
    raise _RefusedError(why)


def _unguessable() -> str:
    return f"x{secrets.token_hex(16)}x"


def _check(messages: Any) -> None:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        hint = 'a list of them: [{"role": "user", "content": "Hello"}]'
        raise ArgumentError(f"chat: messages is {kind_of(messages)}, expected messages", hint=hint)
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ArgumentError(
                f"chat: message {i} is {brief(message)}, expected a table with a role and a content",
                hint='such as {"role": "user", "content": "Hello"}',
            )
