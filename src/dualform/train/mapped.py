"""Arrays in files that may be larger than memory."""

import mmap
from pathlib import Path
from typing import Any

import numpy as np

from dualform.core.errors import DataError


class Mapped(np.ndarray):
    """A flat array in a file, mapped: pages are read when something is taken from them.

    Taking what a file no longer has, as somebody cut it short, ends a process by a signal; here it is an error. The
    array and what is taken from it by a slice cannot be written.

    Raises:
        DataError: when something is taken after the file was cut short.
    """

    _mapping: mmap.mmap | None = None
    _path: Path | None = None

    @classmethod
    def open(cls, path: Path, dtype: Any) -> "Mapped":
        """The whole file as an array.

        Raises:
            OSError: from the operating system.
            ValueError: for an empty file, or one whose size is no multiple of the dtype's.
        """
        with path.open("rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        array = np.frombuffer(mapping, dtype).view(cls)
        array._mapping, array._path = mapping, path
        return array

    def __getitem__(self, index: Any) -> Any:
        mapping = self._mapping
        if mapping is not None and (size := mapping.size()) < len(mapping):
            raise DataError(
                f"{self._path}: {size:,} bytes, but {len(mapping):,} when it was opened: it was cut short meanwhile",
                hint="put the file back and resume the run, or start a new run in another folder",
            )
        return self.view(np.ndarray)[index]
