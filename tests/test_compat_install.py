"""``dualform.compat.install``: the names, their specs, versions and metadata, and the errors for what there is not."""

import importlib.metadata
import importlib.util
import inspect
import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib import import_module

import pytest

from dualform import compat
from dualform.compat.install import CompatError
from dualform.compat.names import MODULES, PACKAGES, REFUSED
from dualform.core.errors import DualformError


@pytest.fixture
def installed() -> Iterator[None]:
    compat.install()
    yield
    compat.uninstall()


@pytest.fixture
def real_one(tmp_path, monkeypatch) -> Iterator[None]:
    """A distribution that is really there."""
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("__version__ = '2.2.2'\n")
    (tmp_path / "mamba_ssm-2.2.2.dist-info").mkdir()
    (tmp_path / "mamba_ssm-2.2.2.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: mamba-ssm\nVersion: 2.2.2\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    compat.uninstall()
    sys.modules.pop("mamba_ssm", None)


def test_nothing_is_there_before_and_after():
    assert importlib.util.find_spec("mamba_ssm") is None
    compat.install()
    import_module("mamba_ssm.modules.mamba_simple")
    compat.uninstall()
    assert importlib.util.find_spec("mamba_ssm") is None
    assert not any(name.startswith(("mamba_ssm", "causal_conv1d")) for name in sys.modules)
    assert not any(status.active for status in compat.status())


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_its_names(installed, module):
    assert importlib.util.find_spec(module) is not None
    loaded = import_module(module)
    assert loaded.__spec__.name == module
    for name, file in MODULES[module].items():
        assert getattr(loaded, name) is getattr(import_module(f"dualform.compat.{file}"), name)
        assert name in dir(loaded)
    scope: dict[str, object] = {}
    exec(f"from {module} import *", scope)
    assert set(MODULES[module]) <= scope.keys()


def test_submodules_are_attributes(installed):
    import mamba_ssm

    assert mamba_ssm.ops.triton.selective_state_update.selective_state_update.__name__ == "selective_state_update"
    assert not hasattr(mamba_ssm, "selective_state_update")


def test_versions_and_metadata(installed):
    import causal_conv1d
    import mamba_ssm

    for package, module in zip(PACKAGES, (mamba_ssm, causal_conv1d), strict=True):
        assert module.__version__ == package.shown_version
        assert package.shown_version.endswith("+dualform")
        for spelled in (package.distribution, package.distribution.replace("-", "_")):
            assert importlib.metadata.version(spelled) == package.shown_version
        found = importlib.metadata.distribution(package.distribution)
        assert found.metadata["Name"] == package.distribution
        assert module.__name__ in found.read_text("top_level.txt").split()
    listed = {d.metadata["Name"] for d in importlib.metadata.distributions()}
    assert {"torch", *(package.distribution for package in PACKAGES)} <= listed


def test_signatures_name_every_argument():
    """Libraries drop keywords that a signature does not name, in silence."""
    for module, names in MODULES.items():
        for name, file in names.items():
            value = getattr(import_module(f"dualform.compat.{file}"), name)
            functions = [value] if not inspect.isclass(value) else [v for v in vars(value).values() if callable(v)]
            for function in functions:
                kinds = {p.kind for p in inspect.signature(function).parameters.values()}
                assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}, (module, name)


@pytest.mark.parametrize("name", [name for name in REFUSED if "." not in name or name.rpartition(".")[0] in MODULES])
def test_what_is_refused_names_the_way_out(installed, name):
    home, _, leaf = name.rpartition(".")
    with pytest.raises(ImportError) as error:
        exec(f"from {home} import {leaf}" if home else f"import {name}")
    assert isinstance(error.value, DualformError)
    assert name in str(error.value) and REFUSED[name] in str(error.value)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("from mamba_ssm import Mambo", "mamba_ssm has Mamba"),
        ("import mamba_ssm.nothing", "mamba_ssm has Mamba"),
        ("from mamba_ssm.distributed.tensor_parallel import ColumnParallelLinear", "tensor parallelism"),
        ("from mamba_ssm.ops.triton.ssd_combined import _mamba_chunk_scan_combined_fwd", "it is a private kernel"),
        ("from mamba_ssm.ops.triton.ssd_chunk_state import chunk_state", "it is a private kernel"),
    ],
)
def test_other_names_that_there_are_not(installed, line, sentence):
    with pytest.raises(ModuleNotFoundError, match=sentence):
        exec(line)


def test_the_real_one_stays_in_use_and_a_warning_says_so(real_one):
    with pytest.warns(UserWarning, match=r"mamba-ssm 2\.2\.2 is installed and stays in use; install\(force=True\)"):
        mamba, conv = compat.install()
    assert (mamba.active, mamba.real, mamba.version) == (False, True, "2.2.2")
    assert (conv.active, conv.real) == (True, False)
    assert import_module("mamba_ssm").__version__ == "2.2.2"
    with pytest.raises(CompatError, match=r"mamba_ssm was imported before, from .*\n.*before the first import"):
        compat.install(force=True)
    assert import_module("mamba_ssm").__version__ == "2.2.2"


def test_force_stands_in_front_of_the_real_one(real_one):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mamba, _ = compat.install(force=True)
    assert mamba.active and mamba.real
    assert import_module("mamba_ssm").__version__ == mamba.version == PACKAGES[0].shown_version
    assert compat.install() == compat.status()


SCRIPT = """
import sys
import torch
import mamba_ssm
from mamba_ssm import Mamba
import beside
print(__name__, sys.argv[1:], mamba_ssm.__version__)
torch.manual_seed(0)
model = torch.nn.Sequential(Mamba(8, d_state=3), torch.nn.Linear(8, 1))
x, losses = torch.randn(2, 9, 8), []
for _ in range(3):
    loss = (model(x) - 1).square().mean()
    model.zero_grad()
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad
    losses.append(loss.item())
assert losses[0] > losses[1] > losses[2], losses
"""


def test_a_script_runs_as_it_is(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "beside.py").touch()
    done = subprocess.run(
        [sys.executable, "-m", "dualform.compat", str(tmp_path / "train.py"), "--rate", "3"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["__main__", "['--rate',", "'3']", PACKAGES[0].shown_version]


def test_a_script_that_is_not_there(tmp_path, monkeypatch):
    from dualform.compat.__main__ import main

    monkeypatch.setattr(sys, "argv", [])
    with pytest.raises(SystemExit, match=r"there is no nothing\.py"):
        main(["nothing.py"])
    compat.uninstall()
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2


def test_installing_loads_nothing_heavy():
    code = "import sys; from dualform.compat import install; install(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_doctor_tells_of_the_real_packages(real_one, monkeypatch, capsys):
    from dualform.cli.doctor import doctor

    monkeypatch.setenv("COLUMNS", "200")
    doctor()
    assert "2.2.2, the real one; python -m dualform.compat --force script.py runs" in capsys.readouterr().out


def test_doctor_tells_whether_it_is_active(monkeypatch, capsys):
    from dualform.cli.doctor import doctor

    monkeypatch.setenv("COLUMNS", "200")

    def rows() -> str:
        doctor()
        return capsys.readouterr().out

    assert "not installed; python -m dualform.compat script.py runs a script that imports it, on dualform" in rows()
    compat.install()
    try:
        assert f"{PACKAGES[0].shown_version}, by dualform.compat in this process" in rows()
    finally:
        compat.uninstall()
