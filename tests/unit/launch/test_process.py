"""How a record is finished for a worker that could not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from harness.records.provenance import new_record
from harness.records.reading import read_record
from harness.records.record import Record
from harness.records.speed import Speed
from launch.cells.finish import finish_abandoned, finish_record
from launch.cells.watch import CellExit
from launch.processes import workers
from matrices.cell import Cell

SIGKILL, SIGTERM = 9, 15


def working(tmp_path: Path, log: str = "", **changes: Any) -> Path:
    record = new_record(Cell(method="base"), []).model_copy(
        update={"speed": Speed(step_seconds=[1.5]), **changes}
    )
    (tmp_path / "record.json").write_text(record.to_json())
    (tmp_path / "progress.json").write_text(json.dumps({"phase": "backward", "updated": 1.0}))
    (tmp_path / "log.txt").write_text(log)
    return tmp_path


ENDED: dict[str, Any] = {"ended": "2026-01-01T00:00:00.000+00:00", "reason": None}


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("oom", 1), ("diverged", 1)])
def test_a_finished_record_is_left_as_it_is(tmp_path: Path, status: str, code: int) -> None:
    place = working(tmp_path, status=status, **ENDED)
    for outcome in (CellExit(code), CellExit(code, "timeout", 5.0), CellExit(code, "stopped")):
        assert finish_record(place, outcome) == read_record(place / "record.json")


@pytest.mark.parametrize(
    ("outcome", "status", "reason"),
    [
        (CellExit(1, "timeout", 90.0), "timeout", "over its limit of 90 s"),
        (CellExit(-SIGKILL, "timeout", 0.5), "timeout", "over its limit of 0.5 s"),
        (CellExit(1, "stopped", stop_signal=2), "interrupted", "the runner was stopped by SIGINT"),
        (CellExit(-SIGKILL, "stopped", stop_signal=15, memory_kills=1), "interrupted", "SIGTERM"),
        (CellExit(-SIGKILL), "failed", "killed by signal 9 (SIGKILL)"),
        (CellExit(-11, memory_kills=1), "failed", "killed by signal 11 (SIGSEGV)"),
        (CellExit(-SIGKILL, memory_kills=1), "oom", "the machine's memory ran out"),
        (CellExit(1), "failed", "exit code 1 and no finished record: KeyError: 'x'"),
        (CellExit(0), "failed", "exit code 0 and no finished record"),
    ],
)
def test_a_worker_that_died(tmp_path: Path, outcome: CellExit, status: str, reason: str) -> None:
    record = finish_record(working(tmp_path, "Traceback\nKeyError: 'x'\n\n"), outcome)
    assert record.status == status
    assert reason in (record.reason or "")
    assert record.speed.step_seconds == [1.5]
    assert record.phase == "backward"
    assert record.ended is not None
    assert (record.failure is not None) == (outcome.cause == "ended")


def test_a_worker_told_to_stop_at_its_limit_is_a_timeout_not_an_interruption(
    tmp_path: Path,
) -> None:
    place = working(tmp_path, status="interrupted", **ENDED)
    assert finish_record(place, CellExit(1, "timeout", 7.0)).status == "timeout"


def test_a_crash_after_the_last_record_is_not_ok(tmp_path: Path) -> None:
    place = working(tmp_path, status="ok", **ENDED)
    assert finish_record(place, CellExit(-11)).status == "failed"


def test_an_abandoned_record_ended_when_its_files_were_last_touched(tmp_path: Path) -> None:
    place = working(tmp_path)
    for path in place.iterdir():
        os.utime(path, (1_700_000_000, 1_700_000_000))
    record: Record = finish_abandoned(place, read_record(place / "record.json"))
    assert (record.status, record.reason) == ("interrupted", "the runner died")
    assert record.ended == "2023-11-14T22:13:20.000+00:00"
    done = read_record(working(tmp_path, status="ok", **ENDED) / "record.json")
    assert finish_abandoned(place, done) == done


def test_kernel_kills_are_counted_in_every_place_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = tmp_path / "memory.events"
    events.write_text("low 0\noom 7\noom_kill 3\noom_group_kill 1\n")
    assert workers._oom_kill_counter(events) == 3
    control = tmp_path / "memory.oom_control"
    control.write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    assert workers._oom_kill_counter(control) == 2
    assert workers._oom_kill_counter(tmp_path / "none") == 0
    assert workers.memory_kills() >= 0
