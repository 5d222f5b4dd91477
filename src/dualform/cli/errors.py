"""Which exceptions are told to a person, and how."""

from dualform.core.allocation import exceeded
from dualform.core.errors import DualformError

_SMALLER = (
    "train: lower data.batch, or raise data.accumulate; check: lower --length; generate, inspect: a smaller model"
)


def sentence(error: BaseException) -> str:
    """What an exception says of what was asked for; empty for one that only the source can explain."""
    if isinstance(error, DualformError):
        return str(error)
    if isinstance(error, OSError):
        what = error.strerror or str(error)
        return f"{error.filename}: {what}" if error.filename else what
    if reason := exceeded(error):
        return str(DualformError(f"not enough memory: {reason}", hint=_SMALLER))
    return ""
