"""Structures that cross into compiled code: described once, filled by name.

Every field of the C structures is made of 64-bit words, so a structure is a flat list of integers. A description gives
the types and names of the fields in the order of the C source, which a test compares with it.
"""

from collections.abc import Callable
from struct import Struct, pack, unpack
from typing import Any

from torch import Tensor


class Kind:
    """A type of fields.

    Args:
        name: the type in C.
        words: how many 64-bit words it has.
        convert: the word of a value that is not None, or the tuple of its words where they are several. None, like a
            field that is not given, is all zeros.
    """

    def __init__(self, name: str, words: int, convert: Callable[[Any], Any]):
        self.name, self.words, self.convert = name, words, convert


def _address(tensor: Tensor) -> int:
    if not tensor.is_contiguous():
        raise TypeError(f"a pointer stands for a contiguous tensor, got strides {tensor.stride()} of {tensor.shape}")
    return tensor.data_ptr()


INT64 = Kind("int64", 1, lambda value: value)
FLAG = Kind("int64", 1, bool)  # 0 or 1, whatever came
DOUBLE = Kind("double", 1, lambda value: unpack("q", pack("d", value))[0])
POINTER = Kind("pointer", 1, _address)  # to the first number of a contiguous tensor


class Structure(Kind):
    """A C structure; also the type of a field in another one.

    Example::

        VIEW = Structure("View", (POINTER, "data"), (INT64, "row time"), of=lambda x: (x.data_ptr(), *x.stride()[:2]))
        SCAN = Structure("Scan", (INT64, "rows length"), (VIEW, "x y"), (POINTER, "sums[2]"))
        SCAN.pack(rows=2, length=5, x=x, y=y, sums=(a, b))

    Args:
        name: its name in C.
        fields: ``(type, names)`` in the order of the C source; ``name[2]`` is an array of two, given as a sequence.
        of: the words of a value in a field of this type; by default the value is a dict of its fields.

    Attributes:
        fields: the type and name of every field, and the length of an array or 0.
        pack: the structure in memory, from its fields by keyword. Those that are not given are zero; an unknown name is
            a TypeError. The memory holds addresses: the caller keeps the tensors alive until the compiled code has been
            called, or queued.
    """

    def __init__(self, name: str, *fields: tuple[Kind, str], of: Callable[[Any], tuple[int, ...]] | None = None):
        self.fields: list[tuple[Kind, str, int]] = []
        for kind, names in fields:
            for field, _, length in (declared.rstrip("]").partition("[") for declared in names.split()):
                self.fields.append((_array(kind, int(length)) if length else kind, field, int(length or 0)))
        words = sum(kind.words for kind, _, _ in self.fields)
        struct = Struct(f"{words}q")
        self.pack: Callable[..., bytes] = self._compile(struct.pack)
        super().__init__(name, words, of or (lambda values: struct.unpack(self.pack(**values))))

    def _compile(self, pack: Callable[..., bytes]) -> Callable[..., bytes]:
        """A function with a keyword for every field: twice as fast as one that looks the names up."""
        known: dict[str, Any] = {"pack": pack}
        words = []
        for kind, field, length in self.fields:
            if kind is INT64:
                words.append(field)
            else:
                several = kind.words > 1 or length > 0
                known |= {f"{field}_": kind.convert, f"no_{field}": (0,) * kind.words if several else 0}
                words.append(f"{'*' * several}(no_{field} if {field} is None else {field}_({field}))")
        keywords = (f"{field}={0 if kind is INT64 else None}" for kind, field, _ in self.fields)
        return eval(f"lambda *, {', '.join(keywords)}: pack({', '.join(words)})", known)


def _array(kind: Kind, length: int) -> Kind:
    def words(value: Any) -> tuple[int, ...]:
        if value is None:
            return (0,) * kind.words
        return (kind.convert(value),) if kind.words == 1 else kind.convert(value)

    def convert(values: Any) -> tuple[int, ...]:
        if len(values) != length:
            raise TypeError(f"an array of {length} was given {len(values)} values")
        return tuple(word for value in values for word in words(value))

    return Kind(kind.name, length * kind.words, convert)
