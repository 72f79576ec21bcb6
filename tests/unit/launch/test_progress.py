"""What a person watching a sweep reads."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from harness.ranks.progress_file import Progress
from harness.records.memory import Memory
from harness.records.provenance import new_record
from harness.records.record import Record
from harness.records.speed import Speed, Tokens
from launch.display import progress
from launch.display.progress import PlainDisplay
from launch.display.schedule import Schedule, clock, describe, outcome
from launch.display.terminal import TerminalDisplay
from launch.planning.plan import Job
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


def on_terminal(display: TerminalDisplay, width: int, height: int = 24) -> list[str]:
    """The lines that a display keeps redrawing on a terminal of this size."""
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True)
    lines = console.render_lines(display, pad=False)
    return ["".join(segment.text for segment in line) for line in lines]


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> TerminalDisplay:
    """Two of three cells at work; time stands still."""
    monkeypatch.setattr(progress.time, "monotonic", lambda: 0.0)
    monkeypatch.setattr(TerminalDisplay, "_show", lambda self: None)
    display = TerminalDisplay()
    jobs = [job("a"), job("b", "qlora"), job("c")]
    display.begin(jobs)
    for each in jobs[:2]:
        display.cell_started(each)
    display.update(jobs[0], Progress("train", 12, 40, 2.314, 1234.4))
    return display


def test_a_terminal_shows_each_running_cell_and_the_sweep(running: TerminalDisplay) -> None:
    lines = on_terminal(running, 90)
    assert lines[:2] == [
        "[1/3] lora r8 · train 12/40 · loss 2.31 · 1,234 tok/s · 0:00",
        "[2/3] qlora r8 · starting · 0:00",
    ]
    assert lines[2].endswith(" 0/3 cells · ETA sweep –")
    running.cell_finished(running.running["b"][0], record(), 60.0)
    lines = on_terminal(running, 90)
    assert lines[0].startswith("[1/3] lora r8")
    assert lines[1].endswith(" 1/3 cells · ETA sweep 2:00")


@pytest.mark.parametrize("width", [8, 20, 33, 50])
def test_a_narrow_terminal_keeps_each_cell_on_a_line(running: TerminalDisplay, width: int) -> None:
    wide = job("d")
    running.begin([wide])
    running.update(
        Job(wide.cell, "d", "模型 with \x1b[31m a long name", "run", "", 0, None),
        Progress("train", 12, 40, 2.314, 1234.4),
    )
    lines = on_terminal(running, width)
    assert len(lines) == 3
    assert all(cell_len(line) <= width for line in lines)
    assert "\x1b" not in "".join(lines)
    if width == 50:
        assert lines[0] == "[1/1] lora r8 · train 12/40 · loss 2.31 · 0:00"
        assert "train 12/40 · loss 2.31 · 0:00" in lines[2]


def test_more_cells_than_lines_are_counted(running: TerminalDisplay) -> None:
    for number in range(30):
        running.update(job(str(number)), Progress())
    lines = on_terminal(running, 80, height=10)
    assert len(lines) == 9
    assert lines[7] == "and 25 more cells"


TWO_CELLS = """
import sys
from harness.records.provenance import new_record
from launch.display.progress import display_for_stderr
from launch.output import prepare
from launch.planning.plan import Job
from harness.ranks.progress_file import Progress
from matrices.cell import Cell
prepare()
jobs = [Job(Cell(method="lora"), key, "lora " + key, "run", "", 0, None) for key in "ab"]
display = display_for_stderr()
with display.busy("checking models"):
    print("[]")
with display.predicting(2, "importing the stack"):
    pass
display.begin(jobs)
for job in jobs:
    display.cell_started(job)
    sys.stdin.readline()
    display.update(job, Progress("train", 1, 2))
    display.cell_finished(job, new_record(Cell(method="base"), []), 1.0)
display.close()
print("end")
"""


def on_a_real_terminal(
    repository: Path, vanishes: bool = False, **environment: str
) -> tuple[str, str, int]:
    """Standard output, what the terminal got on standard error, and the exit code."""
    terminal, stderr = pty.openpty()
    fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", TWO_CELLS],
        cwd=repository,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env=os.environ | {"TERM": "xterm-256color"} | environment,
    )
    os.close(stderr)
    shown = b""
    while b"[1/2]" not in shown:
        shown += os.read(terminal, 65536)
    if vanishes:
        os.close(terminal)
    out, _ = process.communicate("\n\n", timeout=60)
    while not vanishes:
        try:
            shown += os.read(terminal, 65536)
        except OSError:
            os.close(terminal)
            break
    return out, shown.decode(), process.returncode


def test_progress_on_a_terminal_leaves_standard_output_alone(repository: Path) -> None:
    out, shown, code = on_a_real_terminal(repository)
    assert (out, code) == ("[]\nend\n", 0)
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") > 0, "the cursor is back"
    assert "[2/2] lora b" in shown


def test_no_color_is_obeyed(repository: Path) -> None:
    _, shown, _ = on_a_real_terminal(repository, NO_COLOR="1")
    assert "\x1b[3" not in shown.replace("\x1b[3m", "")


def test_a_terminal_that_vanishes_ends_nothing(repository: Path) -> None:
    out, _, code = on_a_real_terminal(repository, vanishes=True)
    assert (out, code) == ("[]\nend\n", 0)
