"""JSON files are read within limits: whatever is in one, its value or a sentence that names it comes out."""

import json

import pytest

from dualform.core.errors import CheckpointError, ConfigError, DataError
from dualform.core.json_file import DEEPEST, entry, parse_json, read_json, read_table, to_json
from dualform.core.options import brief, options


def nested(levels):
    return "[" * levels + "]" * levels


@pytest.mark.parametrize("value", [{}, [], None, True, -1, 2**63, 1e-300, "é\u2028🙂", {"a": [{"b": [1, 2.5, "x"]}]}])
def test_what_was_written_is_read(tmp_path, value):
    path = tmp_path / "a.json"
    path.write_text(to_json(value), encoding="utf-8")
    assert read_json(path) == value
    path.write_text("\ufeff" + to_json(value), encoding="utf-8")  # as some editors do
    assert read_json(path) == value


@pytest.mark.parametrize(
    "text, said",
    [
        (b"", "Expecting value"),
        (b'{"a": 1', "delimiter"),
        (b'{"a": 1} x', "Extra data"),
        (b'{"a": "\xff"}', "byte 7 is not UTF-8"),
        (b'{"a": NaN}', "NaN is no number of JSON"),
        (b"[-Infinity]", "-Infinity is no number"),
        (b"[1e999]", "the number '1e999' is too large"),
        (b"[" + b"9" * 9999 + b"]", "4300 digits"),
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', "the key 'b' stands twice"),
        (nested(DEEPEST + 1).encode(), f"more than {DEEPEST} levels deep"),
        (nested(100_000).encode(), f"more than {DEEPEST} levels deep"),
        (b'{"a":' * 100_000, f"more than {DEEPEST} levels deep"),
        (b" " * (2**24 + 1), "more than 16,777,216 bytes"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_no_json_is_a_sentence_that_names_the_file(tmp_path, text, said):
    path = tmp_path / "a.json"
    path.write_bytes(text)
    with pytest.raises(DataError, match=said) as caught:
        read_json(path, error=DataError, hint="make it anew")
    message = str(caught.value)
    assert message.startswith(f"{path}: cannot be read as JSON: ") and message.endswith("\n  hint: make it anew")


def test_what_the_system_refuses_and_what_is_no_object(tmp_path):
    with pytest.raises(CheckpointError, match=r"a.json: cannot be read: No such file"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").mkdir()
    with pytest.raises(CheckpointError, match=r"a.json: cannot be read: "):
        read_json(tmp_path / "a.json")
    for text, kind in [("[]", "a list"), ("1", "a number"), ("true", "true or false"), ("null", "null"), ('""', "a t")]:
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(CheckpointError, match=f"b.json: holds {kind}.*, expected an object"):
            read_table(tmp_path / "b.json")


def test_entries_are_there_and_of_their_type():
    table = parse_json('{"a": 1, "b": null, "c": "x"}')
    assert entry(table, "a", int, "f") == 1 and entry(table, "a", float, "f") == 1
    assert entry(table, "b", int | None, "f") is None
    with pytest.raises(CheckpointError, match="f: the key 'd' is missing\n  hint: it has a, b, c"):
        entry(table, "d", int, "f")
    with pytest.raises(DataError, match="f: c is 'x', expected a whole number"):
        entry(table, "c", int, "f", error=DataError)


def test_what_json_does_not_have_is_not_written():
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            to_json({"loss": value})
    assert json.loads(to_json({"a": 1})) == {"a": 1}


def test_numbers_that_no_tensor_holds_are_refused():
    @options
    class Sizes:
        size: int = 1
        rate: float = 1.0
        both: tuple[int, int] = (1, 1)

    for given in ({"size": 2**63}, {"rate": 10**400}, {"both": (1, -(2**64))}):
        with pytest.raises(ConfigError, match="expected whole numbers of 64 bits"):
            Sizes(**given)
    assert Sizes(size=2**63 - 1).size == 2**63 - 1
    assert brief(10**400) == "a number of 1329 bits" and len(brief("x" * 10**6)) < 100
