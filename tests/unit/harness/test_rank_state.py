"""What a rank tells of itself while it runs, and where its threads stand when it is asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from harness.ranks.state_files import Reporter, read_states, stack_path, state_path
from harness.records.ranks import Failure

STUCK = """
import sys, time
from pathlib import Path
from harness.ranks.state_files import Reporter

def waits_for_ever():
    while True:
        time.sleep(60)

reporter = Reporter(Path(sys.argv[1]), 1, 2)
reporter.progress(phase="backward", step=3)
print("here", flush=True)
waits_for_ever()
"""


def test_states_of_all_ranks_are_read_in_order(tmp_path: Path) -> None:
    for rank in (1, 0):
        reporter = Reporter(tmp_path, rank, 2)
        reporter.progress(phase="load")
        reporter.end("ok")
    (tmp_path / "ranks" / "rank-0.record.json").write_text("{}")
    found = read_states(tmp_path)
    assert [state.rank for state in found] == [0, 1]
    assert [state.status for state in found] == ["ok", "ok"]
    assert [state.pid for state in found] == [os.getpid()] * 2


def test_a_half_written_state_counts_as_silence(tmp_path: Path) -> None:
    Reporter(tmp_path, 0, 2).end("ok")
    state_path(tmp_path, 1).write_text('{"rank": 1, "pha')
    assert [state.rank for state in read_states(tmp_path)] == [0]


def test_the_last_word_stays(tmp_path: Path) -> None:
    reporter = Reporter(tmp_path, 0, 1)
    reporter.progress(phase="forward", step=2)
    failure = Failure(type="E", message="m", phase="forward")
    reporter.end("failed", "forward: m", failure)
    time.sleep(1.5)  # longer than a heartbeat, which must not write over it
    [state] = read_states(tmp_path)
    assert (state.status, state.step, state.failure) == ("failed", 2, failure)


def test_a_rank_beats_while_it_does_nothing_and_shows_its_stacks(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        first = read_states(tmp_path)[0]
        _await(lambda: (read_states(tmp_path)[0].beat or 0) > (first.beat or 0))
        later = read_states(tmp_path)[0]
        assert (later.phase, later.step) == ("backward", 3)
        assert later.progressed == first.progressed
        process.send_signal(signal.SIGUSR1)
        _await(lambda: "waits_for_ever" in stack_path(tmp_path, 1).read_text())
    finally:
        process.kill()
        process.wait()


def _await(true: object) -> None:
    until = time.monotonic() + 30
    while not true():  # type: ignore[operator]
        assert time.monotonic() < until, "it never came true"
        time.sleep(0.05)
