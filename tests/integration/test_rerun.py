"""`rerun`: a recorded cell again, as by hand, as a new attempt; nothing of its record is run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from stand_in_worker import FAILS, HANGS, OK, SPAWNS

from harness.ranks import launch_command
from harness.records import provenance
from harness.records.provenance import ENVIRONMENT, new_record
from harness.records.reading import read_record
from harness.records.record import Record
from harness.records.store import Entry, Store, record_key
from launch.cells.rerun import checked, differences
from matrices.cell import Cell, Evaluate, Model
from matrices.errors import UserError

HERE = Path(__file__).parent
DEADLINE_SECONDS = 40.0


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    # Read anew, as the process under test does: a checkout changes while tests run.
    provenance.stack.cache_clear()


def published(results: Path, seed: int, cell: Cell | None = None, **changes: object) -> Entry:
    store = Store(results)
    store.prepare()
    cell = cell or Cell(method="base", seed=seed, evaluate=Evaluate(tasks=()))
    first = new_record(cell, launch_command.command(cell, False, 2))
    record = first.model_copy(update={"status": "ok", "ended": first.started, **changes})
    key = record_key(record.cell_id, record.stack_id)
    return store.publish(store.start(lambda place, attempt: record, key), record)


def rerun(directory: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(HERE / "run_stand_in_rerun.py"), "rerun", str(directory), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=HERE.parents[1],
        env=os.environ | {"PYTHONPATH": str(HERE)},
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=DEADLINE_SECONDS)
    return process.returncode, out, err


def test_a_rerun_is_the_next_attempt_and_changes_nothing_else(tmp_path: Path) -> None:
    first = published(tmp_path / "results", OK)
    before = (first.directory / "record.json").read_bytes()
    code, out, err = end(rerun(first.directory))
    assert (code, "stack is not" in err) == (0, False), err
    path = Path(out.strip())
    record = read_record(path)
    assert path.parent.name == f"{first.directory.name}.2"
    assert (record.status, record.attempt, record.cell_id) == ("ok", 2, first.record.cell_id)
    assert record.command == first.record.command
    assert record.command[-2:] == ["cell.json", "by-hand"], "right wherever the record is moved"
    assert (first.directory / "record.json").read_bytes() == before
    assert "seed 0 in" in (path.parent / "log.txt").read_text()


def test_a_rerun_that_fails_exits_3(tmp_path: Path) -> None:
    first = published(tmp_path / "results", FAILS)
    code, out, _ = end(rerun(first.directory / "record.json"))
    assert code == 3
    assert read_record(Path(out.strip())).status == "failed"


def test_another_stack_is_said_on_one_line(tmp_path: Path) -> None:
    first = published(tmp_path / "results", OK)
    packages = first.record.stack.packages | {"torch": "1.0"}
    stack = first.record.stack.model_copy(update={"packages": packages})
    old = published(tmp_path / "old", OK, stack=stack, stack_id="0" * 64)
    code, out, err = end(rerun(old.directory))
    now = first.record.stack.packages["torch"]
    assert f"tunebench: the stack is not the recorded one: torch 1.0 -> {now}\n" in err
    assert code == 0
    assert Path(out.strip()).parent.name == first.directory.name, "a first attempt on this stack"


def test_differences_name_package_device_and_environment(tmp_path: Path) -> None:
    record: Record = published(tmp_path / "results", OK).record
    assert differences(record) == ""
    hardware = record.hardware.model_copy(update={"cpu": "a Z80"})
    # The threads are those of the record again, so they do not differ.
    told = {"OMP_NUM_THREADS": "8", "MKL_NUM_THREADS": "3"}
    changed = record.model_copy(
        update={
            "hardware": hardware,
            "provenance": record.provenance.model_copy(update={"environment": told}),
        }
    )
    assert differences(changed) == f"device a Z80 -> {record.hardware.cpu}, MKL_NUM_THREADS 3 -> –"


def test_nothing_in_a_record_is_executed(tmp_path: Path) -> None:
    trap = tmp_path / "trap.sh"
    trap.write_text(f"#!/bin/sh\ntouch {tmp_path / 'sprung'}\n")
    trap.chmod(0o755)
    bad = [str(trap), "launch", "--num_cpu_threads_per_process", f"1; {trap}", str(trap), "out"]
    first = published(tmp_path / "results", OK, command=bad)
    (first.directory / "profile.yaml").write_text(f"command_file: {trap}\n")
    code, out, err = end(rerun(first.directory))
    assert code == 0, err
    record = read_record(Path(out.strip()))
    assert str(trap) not in " ".join(record.command)
    assert not (Path(out.strip()).parent / "profile.yaml").exists()
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        (Cell(method="base", model=Model(name="a/b", trust_remote_code=True)), "trust-remote-code"),
        (Cell(method="base", evaluate=Evaluate(include_path="/tmp/tasks")), "trust-remote-code"),
        (Cell(method="base", nodes=2, devices=2, parallelism="ddp"), "run its matrix"),
    ],
)
def test_a_cell_that_may_not_run_here_is_a_users_problem(
    tmp_path: Path, cell: Cell, says: str
) -> None:
    record = new_record(cell, ["x"])
    with pytest.raises(UserError, match=says):
        checked(record, trust_code=False)
    with pytest.raises(UserError, match="changed after the run"):
        checked(record.model_copy(update={"cell_id": "0" * 64}), trust_code=True)


def test_what_is_no_record_is_a_users_problem(tmp_path: Path) -> None:
    code, _, err = end(rerun(tmp_path))
    assert (code, len(err.splitlines())) == (2, 1)
    assert "no record here" in err


@pytest.mark.parametrize("seed", [HANGS, SPAWNS])
def test_sigterm_lets_the_worker_finish_its_record(tmp_path: Path, seed: int) -> None:
    first = published(tmp_path / "results", seed)
    process = rerun(first.directory)
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (found := list((tmp_path / "results").glob(".running/*/worker.pid"))):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    worker = int(found[0].read_text())
    process.send_signal(signal.SIGTERM)
    code, out, err = end(process)
    assert code == 143, err
    assert not psutil.pid_exists(worker)
    record = read_record(Path(out.strip()))
    assert (record.status, record.attempt) == ("interrupted", 2)
    assert record.speed.step_seconds == [0.25, 0.5]
