"""What the documents promise is run: their Python, their commands, and the README's table of what works."""

import functools
import importlib
import inspect
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

import dualform

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
OPS_FOLDER = ROOT / "src" / "dualform" / "ops"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
REFERENCE = "".join(path.read_text() for path in sorted((ROOT / "docs" / "api").glob("*.md")))


def only_python(text: str) -> str:
    """The python blocks of a document, every other line blank: line numbers in a traceback are the document's."""
    inside, lines = False, []
    for line in text.splitlines():
        if line.startswith("```"):
            inside = line.strip() == "```python"
            line = ""
        lines.append(line if inside else "")
    return "\n".join(lines)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_the_python_of_a_document_runs(path, tmp_path, monkeypatch):
    code = only_python(path.read_text())
    if path.name == "README.md":
        assert code.strip()
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(path), "exec"), {"__name__": path.stem})


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_of_a_document_lead_somewhere(path):
    text = path.read_text()
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    local = [t.split("#")[0] for t in targets if not t.startswith(("http://", "https://", "#"))]
    assert [t for t in local if not (path.parent / t).exists()] == []


def test_the_reference_has_every_public_name():
    from dualform import ops

    listed = {path: find(path) for path in re.findall(r"^::: (dualform[\w.]*)$", REFERENCE, re.M)}
    assert [path for path, found in listed.items() if found is None] == []
    there = [*listed.values(), *(v for m in listed.values() if inspect.ismodule(m) for v in vars(m).values())]
    names = {name: getattr(home, name) for home in (dualform, ops) for name in home.__all__}
    missing = {name for name, value in names.items() if not any(value is found for found in there)}
    assert missing <= {"__version__", "OPS"}  # data; a package stands for all that it exports
    assert {f"dualform.{name}" for name in ("gaussian", "inspect", "layers", "train")} <= listed.keys()


def find(path: str) -> object:
    """What a dotted name leads to; None where it leads nowhere."""
    module, rest = path, []
    while True:
        try:
            found = importlib.import_module(module)
            return functools.reduce(lambda at, name: getattr(at, name, None), reversed(rest), found)
        except ModuleNotFoundError:
            module, _, name = module.rpartition(".")
            rest.append(name)


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert len(pages) > 10 and [page for page in pages if f": {page}\n" not in navigation] == []


def shell_commands() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", README, re.M | re.S)
    return [line for block in blocks for line in block.splitlines()]


@pytest.mark.skipif(shutil.which("bash") is None, reason="continuous integration runs in bash")
def test_continuous_integration_runs_the_two_commands():
    listed = subprocess.run(["bash", str(ROOT / ".ci" / "run"), "commands"], capture_output=True, text=True)
    assert listed.returncode == 0, listed.stderr
    demo, tests = listed.stdout.splitlines()
    bare = [command for command in shell_commands() if command.startswith("python3 ")]
    assert bare == [demo, tests]


def test_the_two_commands_use_what_the_project_has():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    demo, tests = [command for command in shell_commands() if command.startswith("python3 ")]
    for command in (demo, tests):
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install -c constraints.txt ")
    assert set(re.findall(r"\[(\w+)\]", tests)) <= set(project["optional-dependencies"])
    assert "dualform" in project["scripts"]


def table_rows(heading: str) -> list[list[str]]:
    """The body rows of the table whose first header cell is ``heading``, cell by cell."""
    lines = README.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def code_words(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_the_table_names_every_mixer_and_no_other():
    from dualform.layers import MIXERS

    assert sorted(code_words(row[0])[0] for row in table_rows("mixer")) == sorted(MIXERS)


def test_the_table_names_every_op_and_its_backends():
    from dualform.ops import OPS

    def backends(op: str) -> list[str]:  # those of other machines, too
        file = "step.py" if op.endswith("_update") else f"{op}.py"  # the updates of all ops share one
        folders = [name for name in ("native", "triton", "cuda") if (OPS_FOLDER / name / file).exists()]
        return sorted(["reference", "torch", *folders])

    listed = {code_words(name)[0]: sorted(code_words(found)) for name, _, found, *_ in table_rows("op")}
    assert listed == {op: backends(op) for op in OPS}
    assert all({b.name for b in op.backends} <= set(backends(name)) for name, op in OPS.items())


def test_the_table_names_every_command():
    from dualform.cli.main import app

    commands = sorted(c.name or c.callback.__name__ for c in app.registered_commands)
    assert sorted(code_words(row[0])[0].removeprefix("dualform ") for row in table_rows("command")) == commands
