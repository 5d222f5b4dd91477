"""Two processes are one: the same losses on the same global batch, across signals and resumes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import dualform
from dualform.core.errors import ConfigError
from dualform.layers.attention import AttentionConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.models.config import ModelConfig
from dualform.train import setup
from dualform.train.data import Dataset
from dualform.train.loop import train
from dualform.train.recipe import RECIPE_FILE, Data, Optim, Recipe
from dualform.train.report import read_metrics

QUIET = Console(quiet=True)

# Every process runs this. The first run is broken off by a signal that only one process receives.
SCRIPT = """
import atexit, os, signal, sys
import torch.distributed as dist

@atexit.register
def said_last():
    os.write(1, f"left {not dist.is_initialized()}\\n".encode())

from rich.console import Console
from dualform.train.data import Dataset
from dualform.train.loop import train
from dualform.train.recipe import Recipe

windows, sent = Dataset.windows, []

def interrupted(self, data, seed, step, rank, ranks):
    assert ranks == 2
    if step == 3 and rank == 1 and not sent:
        sent.append(signal.raise_signal(signal.SIGINT))
    return windows(self, data, seed, step, rank, ranks)

Dataset.windows = interrupted
two, shared = sys.argv[1:]
try:
    train(Recipe.load(two))
    sys.exit("the signal was lost")
except KeyboardInterrupt:
    os.write(1, f"stopped {os.environ['RANK']}\\n".encode())  # at once: two processes write
train(Recipe.load(two + "/run"), resume=True)
train(Recipe.load(shared), resume=True)
"""


def torchrun(*arguments):
    """Two processes on this machine: their exit code, and all they print."""
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--local-addr=127.0.0.1"]
    process = subprocess.Popen(
        [sys.executable, *launch, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        shown, _ = process.communicate(timeout=150)
        return process.returncode, shown
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def losses(folder):
    return [(row["step"], row["loss"], row["gradient_norm"]) for row in read_metrics(folder) if row["kind"] == "train"]


def weights(folder):
    return torch.cat([t.flatten() for t in dualform.load(folder / "model").state_dict().values()])


@pytest.fixture
def recipe(tmp_path):
    random, text = np.random.default_rng(0), tmp_path / "text"
    text.mkdir()
    for i in range(20):
        (text / f"{i}.txt").write_text(" ".join(random.choice(["cat", "dog", "bird"], 60)))
    parts = {"M": (Mamba2Config(d_state=4, d_head=4),), "A": (AttentionConfig(heads=2, window=8),)}
    return Recipe(
        model=ModelConfig(256, 8, parts, "MA").to_dict(),
        out=str(tmp_path / "one"),
        steps=8,
        save_every=100,
        log_every=2,
        device="cpu",
        data=Data(path=str(text), held_out=5, length=16, batch=4, accumulate=2),
        optim=Optim(lr=0.02, warmup=2),
    )


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="no gloo")
def test_two_processes_compute_what_one_does(recipe, tmp_path, monkeypatch):
    one, shared, two = Path(recipe.out), tmp_path / "shared", tmp_path / "two"
    windows = Dataset.windows

    def interrupted(self, data, seed, step, *ranks):
        if step == 4 and not shared.exists():
            shared.mkdir()
            signal.raise_signal(signal.SIGINT)
        return windows(self, data, seed, step, *ranks)

    monkeypatch.setattr(Dataset, "windows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, console=QUIET)
    shutil.copytree(one, shared, dirs_exist_ok=True)  # five steps by one process, the rest is for two
    moved = recipe.to_dict() | {"out": str(shared)}
    (shared / RECIPE_FILE).write_text(json.dumps(moved))
    train(recipe, resume=True, console=QUIET)

    two.mkdir()
    best = "cpu" if torch.accelerator.is_available() else "auto"  # one accelerator is not for two
    (two / RECIPE_FILE).write_text(json.dumps(recipe.to_dict() | {"out": str(two / "run"), "device": best}))
    (tmp_path / "script.py").write_text(SCRIPT)
    code, shown = torchrun(tmp_path / "script.py", two, shared)
    assert code == 0, shown
    assert "destroy_process_group" not in shown
    assert sorted(re.findall(r"stopped (\d)", shown)) == ["0", "1"] and shown.count("left True") == 2
    assert "stopped after step 4" in shown and shown.count("held-out: ") == 2 and "2 processes" in shown
    for folder in (two / "run", shared):
        found, want = losses(folder), losses(one)
        assert [row[0] for row in found] == [2, 4, 6, 8]
        assert torch.allclose(torch.tensor(found), torch.tensor(want), rtol=1e-4)
        assert torch.allclose(weights(folder), weights(one), rtol=1e-3, atol=1e-5)


def test_a_batch_that_cannot_be_shared_is_refused(recipe, monkeypatch):
    class Three:
        distributed_type, num_processes = setup.DistributedType.MULTI_CPU, 3

    monkeypatch.setattr(setup, "Accelerator", lambda **options: Three())
    with pytest.raises(ConfigError, match=r"data\.batch is 4, which 3 processes with data.accumulate 2 cannot share"):
        setup.build_accelerator(recipe)
    Three.distributed_type = setup.DistributedType.FSDP
    with pytest.raises(ConfigError, match="FSDP"):
        setup.build_accelerator(replace(recipe, steps=1))


def test_where_one_process_fails_no_other_goes_on():
    class Two:
        device = torch.device("cpu")

        def reduce(self, failures, how):
            return failures + 1  # the other one has failed

    with pytest.raises(SystemExit) as ended, setup.all_or_none(Two()):
        pass
    assert ended.value.code == 2
    with pytest.raises(ValueError, match="mine"), setup.all_or_none(Two()):
        raise ValueError("mine")
