"""A worker that is told to stop stops, wherever the signal finds it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

PRELUDE = """\
import os, signal, sys, time, weakref
from harness.system import interrupts
class Thing:
    def __del__(self):
        if dying: stop()
dying = False
def stop(*_):
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(1000): pass
interrupts.raise_on_sigterm()
began = time.monotonic()
try:
    {body}
    time.sleep(20)
    print("lost")
except interrupts.Interrupted as error:
    interrupts.stop_raising()
    time.sleep(1.5)
    print(error)
"""
PLACES = {
    "between two lines": "stop()",
    "in a weakref callback": "thing = Thing(); seen = weakref.ref(thing, stop); del thing",
    "in a destructor": "thing = Thing(); dying = True; del thing",
    "where BaseException is caught": """
    try: stop(); time.sleep(0.1)
    except BaseException: pass""",
}


@pytest.mark.parametrize("place", PLACES)
def test_it_arrives(place: str, repository: Path) -> None:
    code = PRELUDE.replace("{body}", PLACES[place])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, timeout=15
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"stopped by {signal.SIGTERM.name}"
