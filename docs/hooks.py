"""What the pages say of the source tree reads well on the site too, which does not contain it."""

import re
from typing import Any

_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]+\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links that leave the documents become their text; a link inside that leads nowhere still fails the build."""
    return _OUTSIDE.sub(r"\1", markdown)
