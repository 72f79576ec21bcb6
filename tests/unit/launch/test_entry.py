"""The command line with outputs, directories and limits that fail it: one line, an exit code."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
TUNEBENCH = f"{sys.executable} -m launch.entry"


def shell(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", script],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("script", "code", "says"),
    [
        (f"{TUNEBENCH} matrices >&-", 2, "standard output is closed"),
        (f"{TUNEBENCH} matrices >/dev/full", 2, "No space left on device"),
        (f"{TUNEBENCH} profiles zero3 >/dev/full", 2, "No space left on device"),
        (f"ulimit -n 20; {TUNEBENCH} matrices", 2, "only 20 files"),
        (f"cd $(mktemp -d); rmdir $PWD; {TUNEBENCH} matrices", 2, "directory does not exist"),
        (f"{TUNEBENCH} plan quickstart --seeds 100000000", 2, "100,000,000"),
        (f"{TUNEBENCH} report tests/data/quickstart --format typo", 2, "there are md, csv"),
        (
            f"{TUNEBENCH} report tests/data/quickstart --page x.html --format no",
            2,
            "there are",
        ),
    ],
)
def test_it_is_one_line(script: str, code: int, says: str) -> None:
    done = shell(script)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("tunebench: error: ")
    assert says in line
    assert not (ROOT / "tests/data/quickstart/report").exists()


def test_an_output_without_these_letters_gets_others() -> None:
    table = f"{TUNEBENCH} report tests/data/quickstart --table methods --format md"
    done = shell(table, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "| 650.9 | -50.2 % |" in done.stdout
    record = next((ROOT / "tests/data/quickstart").iterdir())
    shown = shell(f"{TUNEBENCH} show --json {record}", PYTHONIOENCODING="ascii")
    assert json.loads(shown.stdout) == json.loads((record / "record.json").read_text())


def test_who_stops_reading_gets_no_complaint_and_messages_are_not_needed() -> None:
    done = shell(f"{TUNEBENCH} matrices | (exec <&-; sleep 5); exit ${{PIPESTATUS[0]}}")
    assert (done.returncode, done.stdout, done.stderr) == (141, "", "")
    for nowhere in (">/dev/full", ">&-"):
        assert shell(f"{TUNEBENCH} plan nothere 2{nowhere}").returncode == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_the_command_line_is_imported_is_one_line(number: int, code: int) -> None:
    # The line that `-v` prints is written before the modules of the command line are imported.
    process = subprocess.Popen(
        [sys.executable, "-v", "-m", "launch.entry", "matrices"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    # A small pipe keeps the command from running far ahead of what is read here.
    fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, 4096)
    for line in process.stderr:
        if line.startswith("import 'typer"):
            break
    process.send_signal(number)
    time.sleep(0)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert said.count("tunebench: stopped") == 1
    assert "Traceback" not in said


def test_ctrl_c_arrives_also_where_it_was_blocked() -> None:
    """Ray, for one, starts its children so."""
    code = (
        "import time\nfrom launch import entry\n"
        "entry._run = lambda: print('ready', flush=True) or time.sleep(60)\nentry.main()"
    )
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(20) == 128 + signal.SIGINT
        finally:
            process.kill()
