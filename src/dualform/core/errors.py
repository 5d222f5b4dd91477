"""Errors that are meant to be read: what came, what was expected, and the remedy.

The command line prints them as one sentence and exits with code 2; nothing inside the library catches them.
"""


class DualformError(Exception):
    """What went wrong, and, where there is one, what to do about it."""

    def __init__(self, what: str, *, hint: str = ""):
        super().__init__(f"{what}\n  hint: {hint}" if hint else what)


class ArgumentError(DualformError, ValueError):
    """An argument whose shape, dtype, device or value does not fit."""


class ConfigError(DualformError, ValueError):
    """A config, recipe or preset that cannot be built."""


class CheckpointError(DualformError):
    """Files of a model, state or run that are missing, damaged or do not match."""


class DataError(DualformError):
    """Training or prompt data that cannot be read."""


class BackendError(DualformError, RuntimeError):
    """A backend that was asked for by name and cannot run the call."""
