"""What works on macOS and Windows, as far as Linux can show it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.system import platforms

RECORD = "86752f9f314b-494adca8"
LINUX_ONLY = {
    "run": ["run", "quickstart"],
    "rerun": ["rerun", RECORD],
    "status": ["status", "quickstart"],
    "plan --check": ["plan", "quickstart", "--check"],
}


def commands(system: str, lines: list[list[str]], repository: Path) -> list[tuple[int, str, str]]:
    """Exit code, output and exception of each, on a system that lacks what this one has."""
    child = Path(__file__).with_name("on_another_system.py")
    done = subprocess.run(
        [sys.executable, child, system, json.dumps(lines)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(repository), "PYTHONUTF8": "1"},
    )
    assert done.returncode == 0, done.stderr
    *answers, matrices = done.stdout.split("\nmatrix ", 1)
    assert "quickstart" in matrices
    found: list[tuple[int, str, str]] = [
        tuple(json.loads(line)) for line in answers[0].splitlines()
    ]
    return found


@pytest.mark.parametrize("system", ["macOS", "Windows"])
def test_planning_and_reporting_work_and_the_rest_is_one_line(
    system: str, tmp_path: Path, repository: Path
) -> None:
    results = tmp_path / "quickstart"
    shutil.copytree(repository / "tests/data/quickstart", results)
    works: list[list[Any]] = [
        ["--help"],
        ["doctor"],
        ["plan", "quickstart", "--no-predict"],
        ["profiles", "fsdp"],
        ["show", str(results / RECORD)],
        ["report", str(results)],
    ]
    *good, _, _, _, _ = found = commands(system, [*works, *LINUX_ONLY.values()], repository)
    for line, (code, output, exception) in zip(works, good, strict=True):
        assert (code, exception) == (0, ""), (line, output)
        assert output, line
    assert f"- {system}" in good[1][1]
    assert "12 run" in good[2][1]
    assert (results / "report/records.parquet").is_file()
    for name, (code, _, exception) in zip(LINUX_ONLY, found[len(works) :], strict=True):
        assert code == 1
        assert f"tunebench {name} needs Linux, and this is {system}" in exception


def test_without_fork_no_prediction_is_tried(repository: Path) -> None:
    planned, predicted = commands(
        "Windows",
        [["plan", "quickstart"], ["predict", "quickstart", "--gpu", "rtx-4090"]],
        repository,
    )
    assert planned[0] == 0
    assert "not predicted: predictions need a system with fork; Windows has none" in planned[1]
    assert "predictions need a system with fork" in predicted[2]


def test_nothing_is_missing_here() -> None:
    assert platforms.limitations() == ""
    platforms.need_linux("run")
