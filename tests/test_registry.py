"""Layers of other packages: the package of docs/your-own-layer.md, as pip would install it, from the command line."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dualform.core.errors import ConfigError
from dualform.layers.lstm import LSTMConfig
from dualform.layers.registry import MIXERS, Registry, config_of, kind_of, kinds

PAGE = (Path(__file__).parent.parent / "docs" / "your-own-layer.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)


def install(folder: Path, project: dict, modules: dict[str, str]) -> None:
    """What pip leaves in site-packages."""
    for name, code in modules.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = [
        "\n".join([f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())])
        for group, entries in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n\n".join(groups) + "\n")


ALL = """
import json, sys
from dualform.cli.main import app
for line in json.loads(sys.argv[1]):
    app(line, standalone_mode=False)
"""


def dualform(site: Path, *lines: list[str]) -> str:
    """What command lines print, one after another in one new process."""
    run = subprocess.run(
        [sys.executable, "-c", ALL, json.dumps(lines)],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(site), *filter(None, sys.path)]),
            "COLUMNS": "160",
            "OMP_NUM_THREADS": "1",
        },
    )
    assert run.returncode == 0, run.stderr + run.stdout
    return run.stdout


def test_the_package_of_the_page_works_from_the_command_line(tmp_path):
    project, recipe = map(tomllib.loads, blocks("toml"))
    code, *_ = blocks("python")
    install(tmp_path / "site", project["project"], {"my_layers/__init__.py": "", "my_layers/leaky.py": code})
    text, mine, out = tmp_path / "text.txt", tmp_path / "my.toml", str(tmp_path / "run")
    text.write_text("to be or not to be, that is the question.\n" * 40)
    mine.write_text(blocks("toml")[1])
    assert recipe["model"]["parts"]["L"][0]["kind"] == "leaky"
    changed = [f"data.path={text}", "data.length=16", "data.batch=2", "steps=2", "device=cpu"]
    sets = [word for one in changed for word in ("--set", one)]
    said = dualform(
        tmp_path / "site",
        ["train", str(mine), *sets, "--out", out],
        ["info", out],
        ["generate", out, "to be", "-n", "5", "--device", "cpu"],
        ["check", "leaky", "--length", "9"],
    )
    assert "leaky slowest=0.999" in said
    assert re.search(r"^ *leaky d=16 ", said, re.M) and "checks passed" in said


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A registry beside packages that are installed: ``add(entry points, modules)``."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def add(entries: dict[str, str], modules: dict[str, str], name: str = "others") -> None:
        install(tmp_path, {"name": name, "version": "1", "entry-points": {"dualform.testing": entries}}, modules)

    return add


GOOD = "class Config:\n    def build(self, d_model):\n        return d_model\n"


def test_a_package_is_imported_when_it_is_looked_up(site):
    site({"good": "registry_good:Config"}, {"registry_good.py": GOOD})
    registry = Registry("dualform.testing", {"lstm": LSTMConfig})
    assert list(registry) == ["lstm", "good"] and len(registry) == 2 and "good" in registry and "bad" not in registry
    assert registry["lstm"] is LSTMConfig and registry.name_of(LSTMConfig) == "lstm"
    assert "registry_good" not in sys.modules
    assert registry["good"]().build(3) == 3 and registry.name_of(registry["good"]) == "good"
    assert registry.name_of(int) is None and "good" in repr(registry)
    with pytest.raises(KeyError):
        registry["bad"]


@pytest.mark.parametrize(
    "value, said",
    [
        ("registry_broken:Config", "cannot be imported: no such luck"),
        ("registry_fine:Missing", "cannot be imported: module 'registry_fine' has no attribute 'Missing'"),
        ("registry_fine:number", "expected a config class with build"),
        ("registry_absent:Config", "cannot be imported: No module named 'registry_absent'"),
    ],
)
def test_a_package_that_does_not_fit_is_named_and_stands_in_nobodys_way(site, value, said):
    modules = {"registry_broken.py": "raise RuntimeError('no such luck')", "registry_fine.py": f"{GOOD}number = 3\n"}
    site({"bad": value, "fine": "registry_fine:Config"}, modules)
    registry = Registry("dualform.testing", {})
    with pytest.raises(ConfigError) as error:
        registry["bad"]
    assert said in str(error.value) and "others: dualform.testing 'bad'" in str(error.value)
    assert registry.name_of(registry["fine"]) == "fine" and registry.name_of(int) is None


def test_a_name_that_is_taken_is_not_replaced(site):
    site({"lstm": "registry_good:Config", "own": "registry_good:Config"}, {"registry_good.py": GOOD})
    registry = Registry("dualform.testing", {"lstm": LSTMConfig})
    with pytest.warns(UserWarning, match="others: dualform.testing has 'lstm' already"):
        assert "own" in registry
    assert registry["lstm"] is LSTMConfig


def test_kinds_are_mixers_and_feed_forwards(monkeypatch):
    assert {"mamba2", "mlp"} <= set(kinds()) and config_of("lstm") is LSTMConfig and kind_of(LSTMConfig) == "lstm"
    assert kind_of(config_of("mlp")) == "mlp" and kind_of(int) is None
    monkeypatch.setitem(MIXERS, "mine", int)
    assert config_of("mine") is int and kind_of(int) == "mine" and "mine" in kinds()
