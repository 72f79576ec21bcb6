"""What a person watching a sweep reads."""

from __future__ import annotations

from typing import Any

import pytest

from harness.records.provenance import new_record
from harness.records.record import Memory, Record, Speed, Tokens
from launch.display import progress
from launch.display.progress import PlainDisplay
from launch.display.schedule import Schedule, clock, describe, outcome
from launch.display.terminal import TerminalDisplay
from launch.planning.plan import Job
from launch.processes.workers import Progress
from matrices.cell import Cell, Method


def job(key: str, method: Method = "lora") -> Job:
    return Job(Cell(method=method), key, f"{method} r8", "run", "", 0, None)


def record(status: str = "ok", **changes: Any) -> Record:
    return new_record(Cell(method="base"), []).model_copy(
        update={"status": status, "reason": None, **changes}
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (34.4, "0:34"), (59.6, "1:00"), (725, "12:05"), (3723, "1:02:03")],
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_a_running_cell_in_words() -> None:
    running = Progress("train", 12, 40, 2.314, 1234.4)
    assert describe(running) == ["train 12/40", "loss 2.31", "1,234 tok/s"]
    assert describe(Progress("memory_steps", message="under the ledger")) == [
        "memory steps",
        "under the ledger",
    ]


def test_a_finished_cell_in_words_says_which_meter_and_nothing_it_does_not_know() -> None:
    tokens = Tokens(all=2000.0, non_padding=1500.4, loss=1000.0)
    full = record(
        memory=Memory(headline="ledger", peak_bytes=3 * 2**29),
        speed=Speed(tokens_per_second=tokens),
    )
    assert outcome(full, 62) == ["ok", "peak 1.50 GiB (ledger)", "1,500 tok/s", "1:02"]
    assert outcome(record("oom", reason="no memory"), 5) == ["oom", "no memory", "0:05"]


def test_the_sweep_ends_when_cells_go_on_as_their_method_did(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    schedule = Schedule()
    jobs = [job("a", "base"), job("b"), job("c"), job("d", "qlora")]
    schedule.begin(jobs)
    schedule.start(jobs[0])
    assert schedule.remaining() is None
    assert schedule.position(jobs[0]) == "[1/4]"
    schedule.end(jobs[0], 10.0)
    schedule.start(jobs[1])
    assert schedule.remaining() == pytest.approx(30.0)
    schedule.end(jobs[1], 40.0)
    schedule.start(jobs[2])
    # c takes 40 s as b did; d, of a method not seen, the mean of all: 25 s.
    assert schedule.remaining() == pytest.approx(65.0)
    now = 115.0
    assert schedule.remaining() == pytest.approx(50.0)
    schedule.end(jobs[2], None)
    assert schedule.position(jobs[3]) == "[4/4]"
    assert schedule.eta() == "ETA sweep 0:25"


def test_plain_lines_at_phase_changes_and_heartbeats_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    display, cell = PlainDisplay(), job("a")
    display.begin([cell])
    display.cell_started(cell)
    for step in range(1, 101):
        now = step * 0.5
        display.update(cell, Progress("train", step, 100, 2.5, 10.0))
    display.cell_finished(cell, record(), now)
    captured = capsys.readouterr()
    prefix = f"{cell.cell.cell_id[:12]} [1/1] lora r8: "
    assert captured.out == ""
    assert captured.err.splitlines() == [
        prefix + "starting, ETA sweep –",
        prefix + "train 1/100, loss 2.5, 10 tok/s, 0:00, ETA sweep –",
        prefix + "train 61/100, loss 2.5, 10 tok/s, 0:30, ETA sweep –",
        prefix + "ok, 0:50",
    ]


def test_a_terminal_without_cursor_control_gets_plain_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(progress.display_for_stderr(), PlainDisplay)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert isinstance(progress.display_for_stderr(), TerminalDisplay)
