"""How the pages are made of Markdown and docstrings; nothing that a reader's browser would have to fetch."""

import re
from html import unescape
from typing import Any

import griffe
from latex2mathml.converter import convert

_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]+\)")
_MATHS = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.S)
_ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):<code>(~?)([\w.]+)</code>")
_LITERAL = re.compile(r"(?<=\S)::</p>|<p>::</p>\n?")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links that leave the documents become their text; a link inside that leads nowhere still fails the build."""
    return markdown if "/" in page.file.src_uri else _OUTSIDE.sub(r"\1", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Formulas become MathML; the references of docstrings become links, and their blocks of code lose the colons."""
    html = _MATHS.sub(_mathml, html)
    html = _ROLE.sub(_link, html)
    return _LITERAL.sub(lambda found: "" if found[0].startswith("<p>") else ":</p>", html)


def _mathml(found: re.Match[str]) -> str:
    return convert(unescape(found[3]), display="block" if found[2] == "[" else "inline")


def _link(found: re.Match[str]) -> str:
    shown = found[2].rsplit(".", 1)[-1] if found[1] else found[2]
    return f'<autoref optional identifier="{found[2]}"><code>{shown}</code></autoref>'


class Options(griffe.Extension):
    """Classes under ``@options`` and named tuples have a constructor with their fields, as dataclasses do."""

    def on_class_instance(self, *, cls: griffe.Class, **_: Any) -> None:
        """Decorate them with ``dataclasses.dataclass``."""
        parts = griffe.ExprName("dataclasses"), griffe.ExprName("dataclass")
        parts[1].parent = parts[0]
        dataclass = griffe.ExprAttribute(list(parts))
        for decorator in cls.decorators:
            if decorator.callable_path == "dualform.core.options.options":
                decorator.value = dataclass
        if any(str(base) == "NamedTuple" for base in cls.bases):
            cls.decorators.append(griffe.Decorator(dataclass, lineno=None, endlineno=None))
