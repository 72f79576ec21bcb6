"""The predicting commands as processes: output for machines, exit codes, signals, nothing left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from stand_in_simulate import DIES, HANGS, INVALID, OK

from harness.records.prediction import Prediction

HERE = Path(__file__).parent
DEADLINE_SECONDS = 60.0
MATRIX = """\
name: small
model: llama-3.1-8b
data: {max_length: 512}
axes:
  method: [full, lora]
  rank: [4, 8]
"""


@pytest.fixture
def matrix(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(MATRIX)
    return path


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    return [sys.executable, str(HERE / "run_stand_in_predict.py")]


@pytest.fixture
def own_environment(tmp_path: Path) -> dict[str, str]:
    mine = {
        "PYTHONPATH": str(HERE),
        "TUNEBENCH_CACHE": str(tmp_path / "cache"),
        "STAND_IN_PIDS": str(tmp_path / "pids"),
    }
    return os.environ | mine


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(command: list[str], own_environment: dict[str, str], tmp_path: Path) -> Run:
    def started(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *map(str, arguments)],
            cwd=tmp_path,
            env=own_environment,
            capture_output=True,
            text=True,
            timeout=DEADLINE_SECONDS,
            check=False,
        )

    return started


def test_json_is_one_list_in_matrix_order_and_nothing_else(run: Run, matrix: Path) -> None:
    done = run("predict", matrix, "--gpu", "rtx-4090", "--gpu", "t4", "--json")
    assert done.returncode == 0, done.stderr
    plain: list[dict[str, Any]] = json.loads(done.stdout)
    planned = json.loads(run("plan", matrix, "--no-predict", "--json").stdout)
    cells = [job["cell_id"] for job in planned if job["cell"]["method"] != "base"]
    assert [one["cell_id"] for one in plain] == cells
    for one in plain:
        found = Prediction.model_validate_json(json.dumps(one))
        assert found.cell.cell_id == found.cell_id
        assert set(one) == set(Prediction.model_fields)
        assert [verdict.gpu for verdict in found.verdicts] == ["rtx-4090", "t4"]
        assert found.device == "rtx-4090"
        assert found.memory.by_category
    assert "predicting 0/3" in done.stderr


def test_the_table_says_that_nothing_was_measured(run: Run, matrix: Path) -> None:
    done = run("predict", matrix, "--gpu", "t4", "--explain")
    assert done.returncode == 0, done.stderr
    assert "every figure is predicted, none measured" in done.stdout
    assert "executed: transformers " in done.stdout
    assert "OOM in backward" in done.stdout
    assert "at aten.mm in lm_head" in done.stdout
    assert "lora" in done.stdout


@pytest.mark.parametrize(("seeds", "code"), [([OK, INVALID], 0), ([OK, DIES], 3)])
def test_exit_codes(run: Run, matrix: Path, seeds: list[int], code: int) -> None:
    done = run("predict", matrix, "--set", f"seed={seeds}", "--set", "method=full", "--json")
    assert done.returncode == code, done.stderr
    assert len(json.loads(done.stdout)) == 2


def test_base_cells_of_a_matrix_are_answered_and_implicit_ones_are_not(
    run: Run, matrix: Path
) -> None:
    done = run("predict", matrix, "--set", "method=[base,lora]", "--set", "rank=4", "--json")
    assert done.returncode == 0, done.stderr
    found = [(one["cell"]["method"], one["status"]) for one in json.loads(done.stdout)]
    assert found == [("base", "invalid"), ("lora", "predicted")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_leaves_no_process_behind(
    command: list[str], own_environment: dict[str, str], matrix: Path, number: signal.Signals
) -> None:
    process = subprocess.Popen(
        [*command, "predict", str(matrix), "--set", f"seed={HANGS}"],
        env=own_environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    pids = _pids(Path(own_environment["STAND_IN_PIDS"]), process)
    process.send_signal(number)
    out, err = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 128 + number
    assert out == ""
    assert err.splitlines()[-1] == "tunebench: stopped"
    assert [pid for pid in pids if _alive(pid)] == []


def _pids(file: Path, process: subprocess.Popen[str]) -> list[int]:
    end = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < end and process.poll() is None:
        if file.exists() and (text := file.read_text()):
            return [int(word) for word in text.split()]
        time.sleep(0.02)
    raise AssertionError("the simulating process did not start")


def _alive(pid: int) -> bool:
    # A killed process may wait for init to collect it.
    end = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return False
        time.sleep(0.02)
    return True


def test_a_plan_shows_the_peak_and_remembers_it(run: Run, matrix: Path) -> None:
    first = run("plan", matrix, "--gpu", "t4", "--set", "method=lora")
    assert first.returncode == 0, first.stderr
    assert "predicted peak  t4" in first.stdout
    assert "9.00 GiB" in first.stdout
    assert "predicting 0/2" in first.stderr
    again = run("plan", matrix, "--gpu", "t4", "--set", "method=lora")
    assert again.stdout == first.stdout
    assert "predicting" not in again.stderr
    told = json.loads(run("plan", matrix, "--gpu", "t4", "--json").stdout)
    [full] = [job["prediction"] for job in told if job["cell"]["method"] == "full"]
    assert full["peak_allocated_bytes"] == 33 * 2**30
    assert full["verdicts"] == {"t4": "oom"}


def test_a_failed_prediction_does_not_spoil_a_plan(run: Run, matrix: Path) -> None:
    done = run("plan", matrix, "--set", f"seed={DIES}")
    assert done.returncode == 0, done.stderr
    assert "failed" in done.stdout
    assert done.stderr.splitlines()[-1].startswith("tunebench: note: not predicted: ")


def test_fit_for_machines(run: Run) -> None:
    done = run("fit", "--model", "llama-3.1-8b", "--gpu", "rtx-4090", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    rows = {row["method"]: row for row in told["rows"]}
    assert [rows[method]["fits"] for method in ("full", "lora", "qlora")] == [False, True, True]
    # The stand-in's arithmetic: 8 GiB (lora), half (qlora) and a MiB a token.
    left = told["capacity_bytes"] // 2**20
    assert rows["lora"]["largest_micro_batch"] == (left - 8192) // 2048
    assert rows["qlora"]["longest_sequence"] == (left - 4096) // 256 * 256
    assert rows["full"]["binds"]["category"] in ("weights", "activations")
    assert told["ladder"] == []
    assert told["stack"]["transformers"]
