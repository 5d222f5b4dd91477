"""What a C source says of its structures, to compare a description in Python with."""

import re

from dualform.ops.structs import Structure

Field = tuple[str, str, int]  # type, name, and the length of an array or 0
_STRUCTURE = re.compile(r"typedef struct \{([^{}]*)\} (\w+);|struct (\w+) \{([^{}]*)\};")
_DECLARATION = re.compile(r"(?:const )?(?P<type>\w+)(?P<of>\*?) (?P<names>[^;]+)")


def declared(source: str) -> dict[str, list[Field]]:
    """The fields of every structure in a source, in order."""
    source = re.sub(r"//[^\n]*", "", source)
    return {
        m[2] or m[3]: [field for line in (m[1] or m[4]).split(";") if line.strip() for field in _fields(line)]
        for m in _STRUCTURE.finditer(source)
    }


def described(structure: Structure) -> list[Field]:
    """The same of a description."""
    return [(kind.name, name, length) for kind, name, length in structure.fields]


def _fields(line: str) -> list[Field]:
    found = _DECLARATION.fullmatch(" ".join(line.split()))
    assert found, line
    kind = {"int64_t": "int64"}.get(found["type"], found["type"])
    fields = []
    for name in found["names"].split(","):
        name, _, length = name.strip().rstrip("]").partition("[")
        pointer = found["of"] or name.startswith("*")
        fields.append(("pointer" if pointer else kind, name.lstrip("*"), int(length or 0)))
    return fields
