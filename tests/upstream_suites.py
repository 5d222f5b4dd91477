"""The tests of mamba-ssm and causal-conv1d themselves, run on ``dualform.compat``: what passes, what fails, and why.

    python tests/upstream_suites.py                      # all of them on the CPU, which takes hours on two cores
    python tests/upstream_suites.py --sample 0.05        # a twentieth of the cases of every test, always the same ones
    python tests/upstream_suites.py --device cuda -k update

Their sources are cloned into ``build/upstream`` at the commits named below, and are not changed but for the device. A
test that asks for the inside of a kernel by its private name cannot run here; it is counted as refused.
"""

import argparse
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent


class Suite(NamedTuple):
    """One repository and the files of its tests that concern names which dualform has."""

    repository: str
    commit: str
    files: tuple[str, ...]


SUITES = (
    Suite(
        "state-spaces/mamba",
        "e9594ce",
        (
            "tests/ops/test_selective_scan.py",
            "tests/ops/triton/test_layernorm_gated.py",
            "tests/ops/triton/test_selective_state_update.py",
            "tests/ops/triton/test_ssd.py",
            "tests/test_determinism.py",
            "tests/test_generation.py",
        ),
    ),
    Suite("Dao-AILab/causal-conv1d", "0d2252d", ("tests/test_causal_conv1d.py",)),
)

CONFTEST = '''
"""Written by tests/upstream_suites.py."""
import random

import dualform.compat

dualform.compat.install(force=True)


def pytest_addoption(parser):
    parser.addoption("--sample", type=float, default=1.0)


def pytest_collection_modifyitems(config, items):
    share, draw = config.getoption("--sample"), random.Random(0)
    names = dict.fromkeys(item.function.__name__ for item in items)
    kept = []
    for name in names:
        cases = [item for item in items if item.function.__name__ == name]
        kept += cases if share >= 1 else draw.sample(cases, max(1, round(share * len(cases))))
    chosen = set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]
'''


class Outcome(NamedTuple):
    """How the tests of one file ended."""

    counts: Counter[str]
    reasons: Counter[str]  # of what did not pass


def clone(repository: str, commit: str, folder: Path) -> Path:
    """A repository of GitHub at a commit, below a folder; one that is there already is used."""
    where = folder / repository.replace("/", "-")
    if not where.exists():
        source = f"https://github.com/{repository}"
        subprocess.run(["git", "clone", "--quiet", "--no-checkout", source, str(where)], check=True)
    subprocess.run(["git", "-C", str(where), "checkout", "--quiet", commit], check=True)
    return where


def on_device(source: str, device: str) -> str:
    """The source of a test for another device than a GPU."""
    if device == "cuda":
        return source
    for quote in "'\"":
        source = source.replace(f"{quote}cuda{quote}", f"{quote}{device}{quote}")
    return source.replace("torch.cuda.synchronize()", "None")


def run(path: Path, device: str, options: list[str]) -> Outcome:
    """The tests of a file, in a process of their own."""
    folder = path.parent / f"on_{device}"
    folder.mkdir(exist_ok=True)
    (folder / "conftest.py").write_text(CONFTEST)
    copy, report = folder / path.name, folder / f"{path.stem}.xml"
    copy.write_text(on_device(path.read_text(), device))
    report.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-c",
        os.devnull,
        "--rootdir",
        str(folder),
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run([*command, f"--junitxml={report}", *options, str(copy)], cwd=folder, check=False)
    if not report.exists():
        raise SystemExit(f"error: pytest ended with {done.returncode} and wrote no report on {path}")
    counts, reasons = Counter[str](), Counter[str]()
    for case in ElementTree.parse(report).iter("testcase"):
        ended = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        how = "passed" if ended is None else {"failure": "failed", "error": "failed"}.get(ended.tag, ended.tag)
        if ended is not None and how == "failed":
            text = ended.text or ""
            errors = [line[1:].strip() for line in text.splitlines() if line.startswith("E  ")]
            how = "refused" if "dualform.compat has no" in text else how
            said = next((line for line in errors if "dualform.compat" in line), (errors or ["no message"])[0])
            reasons[f"{case.get('name', '').split('[')[0]}: {said[:160]}"] += 1
        counts[how] += 1
    return Outcome(counts, reasons)


def main() -> int:
    """Run what was asked for, and print a table."""
    parser = argparse.ArgumentParser(description="The tests of mamba-ssm and causal-conv1d on dualform.compat.")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--sample", type=float, default=1.0, help="share of the cases of every test")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "upstream", help="where sources are cloned to")
    parser.add_argument("--only", default="", help="part of the name of a file")
    parser.add_argument("-k", default="", help="as pytest's")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    table: list[tuple[str, Outcome]] = []
    for suite in SUITES:
        where = clone(suite.repository, suite.commit, options.folder)
        for file in suite.files:
            if options.only in file:
                chosen = [f"--sample={options.sample}", *(["-k", options.k] if options.k else [])]
                table.append((f"{suite.repository}/{file}", run(where / file, options.device, chosen)))
    print(f"\n{'':70} passed failed refused skipped")
    for name, (counts, _) in table:
        print(f"{name:70}" + "".join(f"{counts[how]:7}" for how in ("passed", "failed", "refused", "skipped")))
    for name, (_, reasons) in table:
        for reason, count in reasons.most_common():
            print(f"{name.rsplit('/', 1)[-1]}: {count} x {reason}")
    return min(1, sum(counts["failed"] for _, (counts, _) in table))


if __name__ == "__main__":
    sys.exit(main())
