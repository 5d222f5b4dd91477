"""What the documents promise is run: their Python, files and commands, and the README's table of what works."""

import functools
import importlib
import inspect
import io
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import pytest
import typer

import dualform
from dualform.cli import main as cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
OPS_FOLDER = ROOT / "src" / "dualform" / "ops"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
REFERENCE = "".join(path.read_text() for path in sorted((ROOT / "docs" / "api").glob("*.md")))


class Block(NamedTuple):
    """A fenced block of a document: its language, its title, where it begins, and its lines."""

    language: str
    title: str
    line: int
    text: str


def blocks_of(text: str) -> list[Block]:
    fence = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.M | re.S)
    return [Block(m[1], m[2] or "", text.count("\n", 0, m.start(3)), m[3]) for m in fence.finditer(text)]


def commands_of(block: Block) -> list[list[str]]:
    """The words of the commands of this package in a block of the shell, without their comments."""
    if block.language != "sh":
        return []
    lines = [shlex.split(line, comments=True) for line in block.text.splitlines()]
    found = [line[next((i for i, word in enumerate(line) if word.endswith("dualform")), len(line)) :] for line in lines]
    return [words[1 : words.index("|") if "|" in words else None] for words in found if words]


def piped(line: str) -> bytes:
    """What a line pipes into its command: the content of a file, or nothing."""
    file = re.match(r"cat (\S+) \|", line)
    return Path(file[1]).read_bytes() if file else b""


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_what_a_document_shows_runs(path, tmp_path, monkeypatch, capsys):
    """Its Python as one program; files with a title are written, and commands under "terminal" run, where they stand.

    A line that fails has the number in the traceback that it has in the document.
    """
    blocks, names = blocks_of(path.read_text()), {"__name__": path.stem}
    if path.name == "README.md":
        assert any(block.language == "python" for block in blocks)
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        if block.language == "python":
            exec(compile("\n" * block.line + block.text, str(path), "exec"), names)
        elif block.title == "terminal":
            for line in block.text.splitlines():
                for words in commands_of(block._replace(text=line)):
                    monkeypatch.setattr(sys, "argv", ["dualform", *words])
                    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped(line))))
                    with pytest.raises(SystemExit) as end:
                        cli.main()
                    assert not end.value.code, (words, capsys.readouterr().err)
        elif block.title:
            Path(block.title).write_text(block.text)
    plt.close("all")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_of_a_document_have_their_options(path):
    group = typer.main.get_command(cli.app)
    for words in (words for block in blocks_of(path.read_text()) for words in commands_of(block)):
        name, command, rest = group.resolve_command(group.make_context("dualform", [], resilient_parsing=True), words)
        command.make_context(name, rest)


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


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_a_page_ends_where_the_next_begins(path):
    *_, last = path.read_text().strip().split("\n\n")
    assert re.search(r"\]\([\w./-]+\.md", last), last


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert len(pages) > 10 and [page for page in pages if f": {page}\n" not in navigation] == []


def shell_commands() -> list[str]:
    return [line for block in blocks_of(README) if block.language == "sh" for line in block.text.splitlines()]


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


STEPS = dict.fromkeys(("selective_state_update", "causal_conv1d_update"), "step.py")
BLOCKS = dict.fromkeys(("mamba_step", "mamba2_step"), "block.py")
SHARED = {
    **STEPS,
    **BLOCKS,
    **dict.fromkeys(("add_norm", "gated_norm"), "norm.py"),
    **dict.fromkeys(("markov_filter", "markov_smoother", "markov_path"), "markov.py"),
}  # ops that have their kernels in one file


def test_the_table_names_every_op_and_its_backends():
    from dualform.ops import OPS

    def backends(op: str) -> list[str]:  # those of other machines, too
        file = SHARED.get(op, f"{op}.py")
        folders = [name for name in ("native", "triton", "cuda") if (OPS_FOLDER / name / file).exists()]
        if op in ("lti_step", "attention_step", "mlp_step", "head_step"):
            folders = ["native"]  # beside the others in block.py
        return sorted(["reference", "torch", *folders])

    listed = {code_words(name)[0]: sorted(code_words(found)) for name, _, found, *_ in table_rows("op")}
    assert listed == {op: backends(op) for op in OPS}
    assert all({b.name for b in op.backends} <= set(backends(name)) for name, op in OPS.items())


def test_the_table_names_every_command():
    from dualform.cli.main import app

    commands = sorted(c.name or c.callback.__name__ for c in app.registered_commands)
    assert sorted(code_words(row[0])[0].removeprefix("dualform ") for row in table_rows("command")) == commands
