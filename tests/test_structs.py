"""Structures that cross into compiled code: their descriptions equal the C sources, and are filled by name."""

import ctypes
import re
from pathlib import Path
from struct import unpack

import pytest
import torch
from torch import bfloat16, float16, float32, float64

from c_structures import declared, described
from dualform.ops.cuda import structs as cuda_structs
from dualform.ops.native import structs
from dualform.ops.structs import INT64, POINTER, Structure

HEADER = (Path(__file__).parent.parent / "native" / "dualform.h").read_text()
NATIVE = {found.name: found for found in vars(structs).values() if isinstance(found, Structure)}


def test_every_structure_of_the_header_is_described():
    in_c = {name: fields for name, fields in declared(HEADER).items() if name not in ("bfloat16", "float16")}
    assert {name: described(structure) for name, structure in NATIVE.items()} == in_c
    assert described(structs.STEP) == described(structs.VIEW)


@pytest.mark.parametrize(
    "header, structure",
    [
        ("sequences", cuda_structs.VIEW),
        ("causal_conv1d", cuda_structs.CONV),
        ("diagonal_ssm", cuda_structs.SYSTEM),
        ("selective_scan", cuda_structs.SCAN),
    ],
)
def test_the_structures_of_cuda_sources_are_described(header, structure):
    source = (Path(cuda_structs.__file__).parent / f"{header}.cuh").read_text()
    found = re.search(rf"^struct {structure.name} {{.*?^}};", source, re.DOTALL | re.MULTILINE)
    assert found
    assert declared(found[0]) == {structure.name: described(structure)}


def test_the_constants_of_the_header_are_the_same():
    defines = dict(re.findall(r"#define (\w+) (\d+)", HEADER))
    assert int(defines["DUALFORM_VERSION"]) == structs.VERSION
    assert int(defines["SELECTIVE_SCAN_TILE"]) == structs.SELECTIVE_SCAN_TILE
    assert int(defines["SSD_SPAN"]) == structs.SSD_SPAN
    dtypes = {name: int(n) for name, n in re.findall(r"(\w*FLOAT\w+) = (\d+)", HEADER)}
    names = {"FLOAT32": float32, "FLOAT64": float64, "BFLOAT16": bfloat16, "FLOAT16": float16}
    codes = {name: int(n) for name, n in re.findall(r"(NO_MEMORY|REFUSED|FULL) = (\d+)", HEADER)}
    assert codes == {"NO_MEMORY": structs.NO_MEMORY, "REFUSED": structs.REFUSED, "FULL": structs.FULL}
    assert {names[name]: number for name, number in dtypes.items()} == structs.DTYPES


def test_the_reader_of_c_sees_every_kind_of_field():
    found = declared("struct View {  // of a tensor\n  const void* data;\n  int64 row, time;\n};\ntypedef struct {\n")
    assert found == {"View": [("pointer", "data", 0), ("int64", "row", 0), ("int64", "time", 0)]}
    found = declared("typedef struct {\n  const float *a, *b;  // (D), or null;\n  View x, y;\n  void* s[2];\n} Scan;")
    assert found == {
        "Scan": [("pointer", "a", 0), ("pointer", "b", 0), ("View", "x", 0), ("View", "y", 0), ("pointer", "s", 2)]
    }


PAIR = Structure("Pair", (INT64, "first second"))
ALL = Structure("All", (INT64, "n"), (PAIR, "one two[2]"), (POINTER, "p sums[2]"))


def words(memory: bytes) -> tuple[int, ...]:
    return unpack(f"{len(memory) // 8}q", memory)


def test_fields_are_filled_by_name_and_the_others_are_zero():
    x, y = torch.ones(3), torch.ones(2)
    filled = ALL.pack(two=[None, {"second": 7}], p=x, n=True, sums=(None, y))
    assert words(filled) == (1, 0, 0, 0, 0, 0, 7, x.data_ptr(), 0, y.data_ptr())
    assert words(ALL.pack()) == (0,) * ALL.words
    assert words(ALL.pack(one={"first": 2})) == (0, 2, *(0,) * 8)
    assert ctypes.cast(words(filled)[7], ctypes.POINTER(ctypes.c_float))[2] == 1


@pytest.mark.parametrize(
    "fields, error",
    [
        ({"m": 1}, "'m'"),
        ({"one": {"third": 1}}, "'third'"),
        ({"sums": [None]}, "array of 2 was given 1"),
        ({"p": torch.ones(4, 4).T}, "contiguous tensor, got strides"),
    ],
)
def test_what_does_not_fit_is_refused(fields, error):
    with pytest.raises(TypeError, match=error):
        ALL.pack(**fields)
