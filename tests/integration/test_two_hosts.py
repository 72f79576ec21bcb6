"""One cell on two machines: its recorded command on each, over a network of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from two_hosts import Host, missing, two_hosts

from harness.ranks.launch_command import accelerate, command
from harness.ranks.state_files import read_states
from harness.records.reading import read_record
from launch.cells import accelerate_profile
from matrices.cell import Adapter, Cell, Data, Evaluate, Model, Train

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())
CELL = Cell(
    method="lora",
    model=Model(name="tiny-llama", weight_dtype="fp32", compute_dtype="fp32"),
    adapter=Adapter(rank=4),
    data=Data(max_length=64),
    train=Train(steps=3, warmup_steps=1, micro_batch_size=2),
    evaluate=Evaluate(tasks=(), sample_prompts=()),
    parallelism="ddp",
    devices=2,
    nodes=2,
)


def started(
    cell: Cell, hosts: tuple[Host, Host], directory: Path, environment: dict[str, str]
) -> list[subprocess.Popen[bytes]]:
    directory.mkdir(parents=True)
    (directory / "cell.json").write_text(cell.model_dump_json())
    accelerate_profile.write(cell, directory)
    meeting = (hosts[0].address, 29511)
    processes = []
    for number, host in enumerate(hosts):
        argv = command(cell, False, 1, directory, directory, accelerate(), meeting, number)
        log = directory / f"{number}.txt"
        processes.append(host.start(argv, environment | {"OMP_NUM_THREADS": "1"}, log, directory))
    return processes


def test_two_machines_train_one_cell(environment: dict[str, str], tmp_path: Path) -> None:
    with two_hosts() as hosts:
        directory = tmp_path / "cell"
        for process in started(CELL, hosts, directory, environment):
            assert process.wait(240) == 0, (directory / "0.txt").read_text()[-2000:]
        record = read_record(directory / "record.json")
        assert record.status == "ok"
        assert [state.host for state in record.ranks] == [host.name for host in hosts]
        assert [state.rank for state in record.ranks] == [0, 1]
        assert record.verified.world_size == 2
        assert len(record.memory.phases["backward"]) == 2
        assert len(record.quality.train_loss) == 3


def test_a_lost_machine_ends_the_other(environment: dict[str, str], tmp_path: Path) -> None:
    long = CELL.model_copy(update={"train": Train(steps=5000, micro_batch_size=2)})
    with two_hosts() as hosts:
        directory = tmp_path / "cell"
        first, _ = started(long, hosts, directory, environment)
        _await_training(directory)
        for pid in hosts[1].pids():
            os.kill(pid, signal.SIGKILL)
        assert first.wait(120) != 0
        record = read_record(directory / "record.json")
        assert record.status == "failed"
        assert record.failure is not None
        assert record.phase == "train"
        # What was measured until then is kept.
        assert record.memory.peak_bytes


def _await_training(directory: Path) -> None:
    until = time.monotonic() + 240
    while not [s for s in read_states(directory) if s.phase == "train" and (s.step or 0) > 2]:
        assert time.monotonic() < until, (directory / "0.txt").read_text()[-2000:]
        time.sleep(0.5)
