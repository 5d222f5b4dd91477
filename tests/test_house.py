"""The rules of the house that no linter knows: sizes, safety, lazy imports, and project files that agree."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import dualform
from dualform.core.errors import DualformError

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "dualform"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = sorted(SOURCE.rglob("*.py"))
KERNELS = ("ops/triton/", "ops/cuda/", "ops/native/")
CPP = {".c", ".cc", ".cpp", ".cu", ".h", ".hpp"}
SOURCES = [*MODULES, *(path for path in sorted(ROOT.glob("native/**/*")) if path.suffix in CPP)]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
# Documented once, on Recurrence, Mixer and PartConfig; an implementation speaks up only where it differs.
CONTRACT = {"init_state", "forward", "step", "build"}


def place(path: Path) -> str:
    return path.relative_to(SOURCE if path.is_relative_to(SOURCE) else ROOT).as_posix()


@pytest.fixture(params=MODULES, ids=place)
def module(request: pytest.FixtureRequest) -> tuple[str, ast.Module]:
    return place(request.param), ast.parse(request.param.read_text())


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, FUNCTIONS))


@pytest.mark.parametrize("path", SOURCES, ids=place)
def test_a_file_is_read_in_one_sitting(path):
    limit = 600 if place(path).startswith((*KERNELS, "native/")) else 400
    assert len(path.read_text().splitlines()) <= limit


def test_signatures_are_narrow(module):
    name, tree = module
    if name.startswith(KERNELS):
        return  # a kernel takes strides and block sizes, one argument each
    if name.startswith("compat/"):
        return  # upstream's own signatures, argument for argument
    limit = 8
    if name.startswith("ops/"):
        limit = 14  # the field's own signatures; ssd has the widest
    elif name.startswith("cli/"):
        limit = 15  # one argument per option of a command
    elif name in ("series/estimators.py", "series/aeon.py"):
        limit = 11  # one argument per option, as scikit-learn's searches over options want it
    wide = {}
    for function in functions(tree):
        arguments = function.args
        names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        count = len([n for n in names if n not in ("self", "cls")])
        if count > limit:
            wide[function.name] = count
    assert not wide


@pytest.mark.parametrize("path", [p for p in MODULES if not place(p).startswith(KERNELS)], ids=place)
def test_public_methods_are_documented(path):
    name = ".".join(["dualform", *path.relative_to(SOURCE).with_suffix("").parts]).removesuffix(".__init__")
    try:
        module = importlib.import_module(name)
    except DualformError as error:  # one of an extra that is not here
        assert "is not installed" in str(error)
        return
    owners = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == name and c.__name__[0] != "_"]
    bare = [
        f"{owner.__name__}.{method}"
        for owner in owners
        for method, value in vars(owner).items()
        if getattr(value, "__qualname__", "") == f"{owner.__qualname__}.{method}"  # else the default of a field
        if inspect.isfunction(value) and not method.startswith("_") and method not in CONTRACT
        if not inspect.getdoc(getattr(owner, method))  # a base may have said it
    ]
    assert not bare


def test_nothing_is_unpickled(module):
    """Files that arrive from elsewhere must not run code: safetensors and JSON, and one reader of tensors alone."""
    name, tree = module
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported = {(node.module or "").split(".")[0]}
        else:
            imported = set()
        assert not imported & {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if name == "models/saving/weights.py" and called == "torch.load":
                assert "weights_only=True" in map(ast.unparse, node.keywords)
                continue
            if name == "models/saving/weights.py" and called == "torch.save":  # of tensors, where others read no more
                assert ast.unparse(node.args[0]) == "dict(tensors)"
                continue
            assert called not in {"torch.load", "torch.save", "accelerator.save_state", "accelerator.load_state"}
            assert not any(keyword.arg == "allow_pickle" for keyword in node.keywords)


def test_core_is_mathematics(module):
    name, tree = module
    if name.startswith("core/"):
        used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not used & {"nn.Module", "torch.nn.Module", "torch.cuda"}


def written_files() -> list[Path]:
    folders = [ROOT / name for name in ("src", "native", "tests", "docs", "benchmarks", "experiments", ".ci")]
    suffixes = {"", ".py", ".md", ".toml", ".txt", ".cff", ".yaml", ".yml", ".svg", ".json", *CPP}
    inside = [p for folder in folders for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    beside = [p for p in ROOT.iterdir() if p.is_file() and p.name != ".git"]  # a file in a worktree
    return [p for p in (*inside, *beside) if p.suffix in suffixes]


def test_no_path_of_one_machine_is_written_down():
    pattern = re.compile(r"(?<![\w.~])/(?:home|root|Users|work|mnt|farm)/\w")
    found = [f"{p.relative_to(ROOT)}: {m.group()}" for p in written_files() for m in pattern.finditer(p.read_text())]
    assert not found


def loaded_after(code: str) -> set[str]:
    """The top-level modules a fresh interpreter has loaded after running ``code``."""
    report = "import sys; sys.stderr.write('\\nloaded ' + ' '.join({name.split('.')[0] for name in sys.modules}))"
    script = f"import atexit\natexit.register(lambda: exec({report!r}))\n{code}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.rsplit("loaded ", 1)[1].split())


HEAVY = {
    "accelerate",
    "huggingface_hub",
    "matplotlib",
    "numpy",
    "pandas",
    "safetensors",
    "sklearn",
    "tensorboard",
    "tokenizers",
    "torch",
}


def test_importing_the_package_loads_nothing_heavy():
    loaded = loaded_after("import dualform; assert 'load' in dir(dualform)")
    assert "dualform" in loaded
    assert not loaded & HEAVY


def test_every_public_name_resolves():
    missing = [name for name in dualform.__all__ if not hasattr(dualform, name)]
    assert not missing


@pytest.mark.parametrize(
    "command",
    [
        "",
        "demo",
        "train",
        "generate",
        "eval",
        "compare",
        "fit",
        "forecast",
        "info",
        "convert",
        "inspect",
        "verify",
        "check",
        "doctor",
    ],
)
def test_help_loads_nothing_heavy(command):
    arguments = ["dualform", *command.split(), "--help"]
    loaded = loaded_after(f"import sys; sys.argv = {arguments}; from dualform.cli.main import main; main()")
    assert "typer" in loaded
    assert not loaded & HEAVY


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("#")[0].strip().split("==") for line in lines if line.split("#")[0].strip()]
    return {canonical(name): Version(version) for name, version in pairs}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_constraints_pin_every_direct_dependency():
    pinned = pins()
    wanted = [*PROJECT["dependencies"], *(r for group in PROJECT["optional-dependencies"].values() for r in group)]
    for requirement in map(Requirement, wanted):
        assert pinned[canonical(requirement.name)] in requirement.specifier, requirement


def test_the_version_is_the_same_everywhere():
    assert f"\nversion: {dualform.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^## \[{re.escape(dualform.__version__)}\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
