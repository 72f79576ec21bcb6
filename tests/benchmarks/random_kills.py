"""`python tests/benchmarks/random_kills.py [KILLS] [SEED]`: stop signals and kills at any moment.

Runs `tunebench run` on a small sweep with stand-ins for worker, preflight and simulation, again and
again on one results directory, and stops it: by SIGINT, SIGTERM, SIGHUP or SIGKILL, sent to it, to
its whole group, or (SIGKILL) to its fork server, after a random time or soon after one of MOMENTS.
Then it must have ended with the right exit code, one line and no traceback; a signal that comes
before python runs any code of ours ends it as it ends python, and is counted apart. Within
ENDED_SECONDS nothing that it started may live; what it left must be readable. At last the sweep is
run to its end. Not part of the tests, which send a few of these: it takes about 10 s a kill.
"""

from __future__ import annotations

import collections
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from harness.records.store import Store  # noqa: E402
from launch.engines.status import read_state, statuses  # noqa: E402
from matrices.errors import UserError  # noqa: E402

HERE = ROOT / "tests/integration"
MATRIX = """\
name: kills
model: tiny-llama
method: lora
data: {max_length: 32}
axes: {rank: [1, 2, 3, 4, 5, 6, 7, 8]}
"""
# What standard error says when a moment has come; the first 0.2 s have no word.
MOMENTS = {
    "start": "",
    "imports": "tunebench: importing",
    "predicting": "predicting 0/",
    "predicted": "simulated ",
    "running": "starting, ETA",
    "publishing": ": ok, ",
}
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ENDED_SECONDS = 2.0
LONGEST_SECONDS = 120.0


@dataclass
class Kill:
    """One kill: when, by what, whom, and what was wrong about how the run ended."""

    moment: str
    after: float
    number: int
    whom: str
    code: int | None = None
    wrong: str = ""
    early: bool = False  # python had not come to our code

    def __str__(self) -> str:
        name = signal.Signals(self.number).name
        early = " before our code" if self.early else ""
        when = f"{self.moment:11}+{self.after:5.2f} s"
        return f"{name:8}{self.whom:7}{when}  exit {self.code}{early}"


def chosen(dice: random.Random, aimed: bool) -> Kill:
    number = dice.choice((*STOPS, signal.SIGKILL))
    whom = dice.choice(("runner", "group"))
    if number == signal.SIGKILL:
        whom = dice.choice(("runner", "server"))
    if not aimed:
        return Kill("start", dice.uniform(0, 12), number, whom)
    moment = dice.choice([*MOMENTS])
    return Kill(moment, dice.uniform(0, 0.2), number, whom)


def tried(kill: Kill, place: Path, kills: int) -> Kill:
    mark = secrets.token_hex(8)
    errors = place / f"{kills}.txt"
    with errors.open("wb") as file:
        run = subprocess.Popen(
            [sys.executable, str(HERE / "run_stand_in_cli.py"), "run", "kills.yaml"],
            cwd=place,
            env=environment(place, mark),
            stdout=subprocess.PIPE,
            stderr=file,
            start_new_session=True,
        )
        began = time.monotonic()
        while MOMENTS[kill.moment] not in errors.read_text() and run.poll() is None:
            time.sleep(0.005)
        kill.after = min(kill.after, LONGEST_SECONDS)
        time.sleep(kill.after)
        kill.early = not catches(run.pid, signal.SIGTERM)
        send(kill, run.pid)
        while run.poll() is None and time.monotonic() - began < LONGEST_SECONDS:
            time.sleep(0.01)
    ended = time.monotonic()
    kill.code = run.poll()
    kill.wrong = ending(kill, errors.read_text()) or left(mark, ended) or unreadable(place)
    if run.poll() is None:
        run.kill()
    return kill


def environment(place: Path, mark: str) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": f"{ROOT}:{HERE}",
        "TUNEBENCH_CACHE": str(place / f"cache-{mark}"),
        "STAND_IN_IMPORT_SECONDS": "1",
        "OMP_NUM_THREADS": "1",
        "RANDOM_KILLS": mark,
    }


def send(kill: Kill, runner: int) -> None:
    try:
        if kill.whom == "group":
            os.killpg(runner, kill.number)
        elif kill.whom == "runner":
            os.kill(runner, kill.number)
        else:
            for child in psutil.Process(runner).children():
                if "forkserver" in " ".join(child.cmdline()):
                    child.kill()
    except (ProcessLookupError, psutil.Error):
        return  # it has ended already


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal; python itself has none for SIGTERM."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return True  # it has ended
    caught = next((line.split()[1] for line in lines if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (number - 1) & 1)


def ending(kill: Kill, said: str) -> str:
    """What is wrong with how the runner ended."""
    if kill.code is None:
        return "it did not end"
    if kill.early and kill.code != 0:
        return ""
    if "Traceback" in said or "Exception ignored" in said:
        return f"a traceback: {said[-1500:]}"
    if kill.code == 0:
        return ""  # it had finished, or the dead server cost nothing
    code = kill.code if kill.code > 0 else 128 - kill.code
    if kill.whom == "server":
        return "" if code in (2, 3) else f"exit code {code} for a dead fork server"
    if code != 128 + kill.number:
        return f"exit code {code}"
    lines = [line for line in said.splitlines() if "tunebench: stopped" in line]
    if kill.number != signal.SIGKILL and len(lines) != 1:
        return f"{len(lines)} lines say that it was stopped"
    return ""


def left(mark: str, ended: float) -> str:
    """What lives too long, by the mark in its environment."""
    while found := marked(mark):
        if time.monotonic() - ended > ENDED_SECONDS:
            for each in found:
                each.kill()
            return "left " + ", ".join(" ".join(each.cmdline())[:80] for each in found)
        time.sleep(0.05)
    return ""


def marked(mark: str) -> list[psutil.Process]:
    found = []
    for each in psutil.process_iter():
        try:
            if each.environ().get("RANDOM_KILLS") == mark:
                found.append(each)
        except psutil.Error:
            continue
    return found


def unreadable(place: Path) -> str:
    results = place / "results/kills"
    try:
        statuses(read_state(results))
        Store(results).latest()
    except (UserError, OSError) as error:
        return f"cannot be looked at: {error}"
    return ""


def main(kills: int, seed: int) -> int:
    dice = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        (place / "kills.yaml").write_text(MATRIX)
        done = []
        for number in range(kills):
            # What is finished would not be run again.
            (place / "kills.yaml").write_text(
                MATRIX + f"seed: 0\nlearning_rate: {1e-4 + number * 1e-6}\n"
            )
            kill = tried(chosen(dice, aimed=number % 5 < 3), place, number)
            print(kill, kill.wrong, flush=True)
            done.append(kill)
        last = subprocess.run(
            [sys.executable, str(HERE / "run_stand_in_cli.py"), "run", "kills.yaml"],
            cwd=place,
            env=environment(place, "last"),
            capture_output=True,
            text=True,
            check=False,
        )
    wrong = [kill for kill in done if kill.wrong]
    codes = collections.Counter(kill.code for kill in done)
    early = [kill for kill in done if kill.early]
    print(f"{len(done)} kills, {len(wrong)} wrong; exit codes {dict(codes)}")
    print(f"{len(early)} before python ran our code: {[kill.code for kill in early]}")
    print(f"run to its end: exit {last.returncode}")
    return 1 if wrong or last.returncode else 0


if __name__ == "__main__":
    arguments = [int(argument) for argument in sys.argv[1:]]
    sys.exit(main(*(arguments + [60, 0][len(arguments) :])))
