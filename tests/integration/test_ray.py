"""`tunebench run --on ray` on a real cluster of several nodes on this machine."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil
import pytest
from conftest import Command
from ray_cluster import RayCluster

from harness.ranks import state_files
from harness.records.ranks import RankState
from harness.records.reading import read_record
from harness.records.record import Record

pytest.importorskip("ray", reason="the package ray is not installed")

DEADLINE_SECONDS = 240.0
MATRIX = """\
name: ray
model: tiny-llama
data: {{source: python-reference, max_length: 64, packing: true}}
train: {{steps: {steps}, warmup_steps: 1, micro_batch_size: 1, learning_rate: 2.0e-3}}
evaluate: {{tasks: [], sample_prompts: []}}
score_base: false
method: lora
axes: {{rank: {ranks}}}
"""
T = TypeVar("T")


@pytest.fixture(scope="module")
def cluster(environment: dict[str, str]) -> Iterator[RayCluster]:
    with RayCluster(environment) as found:
        yield found  # which waits for the last process of it to be gone


def write_matrix(directory: Path, steps: int, ranks: str) -> None:
    (directory / "ray.yaml").write_text(MATRIX.format(steps=steps, ranks=ranks))


def eventually(get: Callable[[], T | None], what: str) -> T:
    """The first value that is not none or false."""
    end = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < end:
        if found := get():
            return found
        time.sleep(0.1)
    pytest.fail(f"no {what} in {DEADLINE_SECONDS:g} s")


def lives(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class Sweep:
    """A run of the directory's matrix on the cluster, in the background."""

    def __init__(self, cluster: RayCluster, directory: Path, environment: dict[str, str]) -> None:
        self.results = directory / "results/ray"
        # Attempts of a runner that died stay here until their cells are claimed again, and on a
        # loaded machine their ranks take a moment to be gone.
        self.earlier = self._attempts()
        options = ["--on", "ray", "--address", cluster.address, "--no-predict"]
        # A processor for each of two cells.
        environment = environment | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "launch.entry", "run", "ray.yaml", *options],
            cwd=directory,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def training(self) -> RankState:
        """The state of a living rank, once a cell has begun to train."""
        return eventually(self._training, "cell that trains")

    def _attempts(self) -> set[Path]:
        running = self.results / ".running"
        return set(running.iterdir()) if running.is_dir() else set()

    def _training(self) -> RankState | None:
        new = self._attempts() - self.earlier
        states = [state for directory in new for state in state_files.read_states(directory)]
        training = [state for state in states if state.step and state.pid]
        return next((state for state in training if lives(state.pid or 0)), None)

    def interrupt(self) -> str:
        """Send Ctrl-C to the driver; returns what was to be seen then and one second later."""
        seen = self.training()
        before = _signals(self.process.pid)
        sent = time.time()
        self.process.send_signal(signal.SIGINT)
        time.sleep(1)
        return (
            f"sent at {sent:.3f} to {self.process.pid}, rank {seen.rank} with pid {seen.pid} in "
            f"step {seen.step}\nbefore: {before}\nafter 1 s: {_signals(self.process.pid)}"
        )

    def wait(self) -> tuple[int, str]:
        _, said = self.process.communicate(timeout=DEADLINE_SECONDS)
        return self.process.returncode, said

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def _signals(pid: int) -> str:
    """Which signals a process has pending, blocks, ignores and catches (proc(5))."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError as error:
        return str(error)
    return ", ".join(" ".join(line.split()) for line in lines if line[:3] in ("Sig", "Shd"))


def records(results: Path) -> list[Record]:
    return [read_record(path) for path in sorted(results.glob("*/record.json"))]


def test_a_sweep_on_ray_gives_the_records_of_this_machine(
    cluster: RayCluster, tunebench: Command, tmp_path: Path
) -> None:
    write_matrix(tmp_path, steps=2, ranks="[2, 4]")
    options = ("--on", "ray", "--address", cluster.address, "--no-predict")
    here = tunebench("run", "ray.yaml", "--results", "here", "--no-predict", cwd=tmp_path)
    there = tunebench("run", "ray.yaml", "--results", "there", *options, cwd=tmp_path)
    assert (here.code, there.code) == (0, 0), here.err + there.err
    local, on_ray = records(tmp_path / "here"), records(tmp_path / "there")
    assert len(local) == len(on_ray) == 2
    for ours, theirs in zip(on_ray, local, strict=True):
        assert (ours.cell_id, ours.stack_id) == (theirs.cell_id, theirs.stack_id)
        assert ours.quality.train_loss == theirs.quality.train_loss
        assert ours.memory.by_category == theirs.memory.by_category
        assert ours.memory.peak_bytes == theirs.memory.peak_bytes
        assert ours.verified == theirs.verified
        assert (ours.placement.engine, theirs.placement.engine) == ("ray", "local")
        assert ours.placement.job

    again = tunebench("run", "ray.yaml", "--results", "here", *options, cwd=tmp_path)
    assert again.code == 0, again.err
    assert len(records(tmp_path / "here")) == 2


def test_nothing_is_lost_when_driver_node_and_user_end_it(
    cluster: RayCluster, environment: dict[str, str], tmp_path: Path
) -> None:
    # Two cells fit the cluster, the third waits.
    write_matrix(tmp_path, steps=120, ranks="[2, 4, 8]")
    sweeps = []
    try:
        sweeps.append(Sweep(cluster, tmp_path, environment))
        sweeps[0].training()
        sweeps[0].process.kill()
        sweeps[0].process.wait()
        cluster.wait_for_no("launch.engines.ray.task")
        cluster.wait_for_no("forkserver")

        sweeps.append(Sweep(cluster, tmp_path, environment))
        evidence = sweeps[1].interrupt()
        code, said = sweeps[1].wait()
        assert code == 128 + signal.SIGINT, f"{evidence}\nended at {time.time():.3f}: {said}"
        assert " to write " in said.split("stopping: ")[1].splitlines()[0]
        assert "run the same command again to go on" in said
        stopped = records(sweeps[1].results)
        # One of the two may have come to its end just before.
        assert "interrupted" in {record.status for record in stopped} <= {"interrupted", "ok"}
        assert len({record.cell_id for record in stopped}) <= 2  # the third had not begun

        sweeps.append(Sweep(cluster, tmp_path, environment))
        pid = sweeps[2].training().pid or 0
        cluster.tell(f"kill {pid}")
        code, said = sweeps[2].wait()
        assert code == 0, said
        assert "its node died; it starts again" in said
    finally:
        for sweep in sweeps:
            sweep.end()
    found = records(sweeps[2].results)
    finished = [record for record in found if record.status == "ok"]
    assert len(finished) == len({record.cell_id for record in finished}) == 3
    assert {record.status for record in found} == {"ok", "interrupted"}
    # Driver, Ctrl-C and node have each cut one cell short at least.
    assert len(found) - len(finished) >= 3
    assert not lives(pid)
    assert list((sweeps[2].results / ".running").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--resource", "accelerator=1"], "accelerator 1, and the largest is"),
        (["--resource", "accelerator"], "is not NAME=PER_DEVICE"),
        (["--set", "nodes=2", "--set", "devices=2", "--set", "parallelism=ddp"], "--on slurm"),
    ],
)
def test_what_the_cluster_can_never_do_is_said_in_one_line(
    cluster: RayCluster, tunebench: Command, tmp_path: Path, options: list[str], told: str
) -> None:
    write_matrix(tmp_path, steps=2, ranks="[2]")
    on = ("--on", "ray", "--address", cluster.address)
    ran = tunebench("run", "ray.yaml", *on, *options, cwd=tmp_path)
    assert ran.code == 2
    assert told in ran.err
    assert len(ran.err.strip().splitlines()) == 1
    assert records(tmp_path / "results/ray") == []


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("127.0.0.1:9", "nothing answers at"),
        ("head", "is no HOST:PORT"),
        ("ray://127.0.0.1:10001", "give HOST:PORT"),
    ],
)
def test_a_wrong_address_is_said_in_one_line(
    tunebench: Command, tmp_path: Path, address: str, told: str
) -> None:
    write_matrix(tmp_path, steps=2, ranks="[2]")
    ran = tunebench("run", "ray.yaml", "--on", "ray", "--address", address, cwd=tmp_path)
    assert ran.code == 2
    assert told in ran.err
    assert len(ran.err.strip().splitlines()) == 1
