"""What is read from SLURM's commands, and what is asked of sbatch. The commands are stand-ins that
print what SLURM 22.05 printed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.records.provenance import new_record
from harness.records.record import Record
from harness.records.store import Entry, Store
from launch.engines import remote_plan
from launch.engines.order import Order
from launch.engines.slurm import queue, submit, task
from launch.engines.slurm.queue import JobState, NoAnswer, Partition, SlurmNode
from launch.engines.slurm.submit import JobResources
from launch.planning.plan import Job, plan_jobs
from matrices.cell import Cell
from matrices.errors import UserError

Pretend = Callable[[str, str, int], None]
SINFO = """\
cpu*|n1|2|(null)|up|10:00|1:00:00
cpu*|n2|4+|(null)|up|10:00|1:00:00
gpu|g1|64|gpu:a100:4(S:0-1),gpu:h100:1|up|n/a|infinite
old|o1|8|gpu:2|down|1-00:00:00|2-00:00:00
"""
CPU = Partition("cpu", True, True, (SlurmNode("n1", 2, 0), SlurmNode("n2", 4, 0)), 10, 60)
GPU = Partition("gpu", False, True, (SlurmNode("g1", 64, 5),), None, None)


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pretend:
    """Put a command on the PATH that prints a text, and writes its arguments to a file."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")

    def make(name: str, text: str, code: int = 0) -> None:
        (programs / f"{name}.text").write_text(text)
        script = f'#!/bin/sh\necho "$@" > {programs}/{name}.argv\ncat {programs}/{name}.text\n'
        (programs / name).write_text(f"{script}exit {code}\n")
        (programs / name).chmod(0o755)

    return make


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90),
        ("10:30", 11),
        ("1:02:03", 63),
        ("1-0", 1440),
        ("2-12:30", 3630),
        ("1-00:00:01", 1441),
        ("0", 0),
        ("UNLIMITED", 0),
    ],
)
def test_times_are_those_of_sbatchs_manual(text: str, minutes: int) -> None:
    assert queue.minutes(text) == minutes


@pytest.mark.parametrize("text", ["soon", "1h", "-5", "1:2:3:4", ""])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="no time as SLURM takes it"):
        queue.minutes(text)


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("(null)", 0),
        ("gpu:2", 2),
        ("gpu", 1),
        ("gpu:a100:4(S:0-1),gpu:h100:1", 5),
        ("craynetwork:2,gpu:tesla:3", 3),
    ],
)
def test_gpus_of_a_node_are_counted_over_types(gres: str, gpus: int) -> None:
    assert queue.gpus_of(gres) == gpus


def test_partitions_are_read_and_chosen(pretend: Pretend) -> None:
    pretend("sinfo", SINFO, 0)
    assert queue.partition(None) == CPU
    assert queue.partition("gpu") == GPU
    with pytest.raises(UserError, match=r"no partition 'gpus'; did you mean 'gpu'.*cpu, gpu, old"):
        queue.partition("gpus")
    with pytest.raises(UserError, match="partition 'old' is down"):
        queue.partition("old")


def test_a_cluster_without_a_default_partition_has_one_named(pretend: Pretend) -> None:
    pretend("sinfo", SINFO.replace("*", ""), 0)
    with pytest.raises(UserError, match="no default partition; name one"):
        queue.partition(None)


def test_the_queue_is_read_in_one_call(pretend: Pretend, tmp_path: Path) -> None:
    lines = [
        "a|0|1_0|RUNNING|None|n1",
        "a|1|1_1|PENDING|Resources|",
        "a|2|1_2|FAILED|NonZeroExitCode|n2",
        "b|N/A|7|COMPLETING|None|n1",
    ]
    pretend("squeue", "\n".join(lines) + "\n", 0)
    assert queue.queue(["b", "a", "a"]) == {
        ("a", 0): JobState("1_0", "RUNNING", "", "n1"),
        ("a", 1): JobState("1_1", "PENDING", "Resources", ""),
        ("a", 2): JobState("1_2", "FAILED", "", "n2"),
        ("b", 0): JobState("7", "COMPLETING", "", "n1"),
    }
    assert "--name a,b" in (tmp_path / "bin/squeue.argv").read_text()
    unfinished = [state.unfinished for state in queue.queue(["a"]).values()]
    assert unfinished == [True, True, False, True]


def test_a_queue_that_does_not_answer_is_said_and_nothing_is_asked_of_it_in_vain(
    pretend: Pretend,
) -> None:
    pretend("squeue", "slurm_load_jobs error: Unable to contact slurm controller\n", 1)
    with pytest.raises(NoAnswer, match="squeue: slurm_load_jobs error: Unable to contact"):
        queue.queue(["a"])
    assert queue.queue([]) == {}


def test_accounting_is_used_where_there_is_some(pretend: Pretend) -> None:
    pretend("sacct", "1_0|CANCELLED by 0|n1\n1_1|NODE_FAIL|n2\n", 0)
    assert queue.ended_states(["1_0", "1_1"]) == {
        "1_0": JobState("1_0", "CANCELLED", "", "n1"),
        "1_1": JobState("1_1", "NODE_FAIL", "", "n2"),
    }
    pretend("sacct", "Slurm accounting storage is disabled\n", 1)
    assert queue.ended_states(["1_0"]) == {}


def cell_on(devices: int, nodes: int = 1) -> Cell:
    parallelism = "single" if devices == 1 else "ddp"
    return Cell(method="base", parallelism=parallelism, devices=devices, nodes=nodes)


def test_devices_become_gres_and_nodes() -> None:
    asked = submit.sbatch_parameters(
        cell_on(8, 2), GPU, JobResources(gres="gpu:a100", time="1:30:00")
    )
    assert (asked["nodes"], asked["ntasks_per_node"], asked["gres"]) == (2, 1, "gpu:a100:4")
    assert (asked["time"], asked["cpus_per_task"], asked["partition"]) == (90, None, "gpu")
    assert asked["additional_parameters"] == {"requeue": True}
    default = submit.sbatch_parameters(cell_on(1), GPU, JobResources())
    assert (default["gres"], default["time"]) == ("gpu:1", 0)


def test_without_gpus_a_cell_gets_a_nodes_processors() -> None:
    asked = submit.sbatch_parameters(cell_on(1), CPU, JobResources())
    assert (asked["gres"], asked["cpus_per_task"], asked["time"]) == (None, 2, 10)
    assert asked["srun_args"] == ["--cpus-per-task=2"]
    larger = submit.sbatch_parameters(cell_on(3), CPU, JobResources())
    assert larger["cpus_per_task"] == 4, "of the nodes that have enough"
    assert (
        submit.sbatch_parameters(cell_on(1), CPU, JobResources(cpus_per_task=1))["cpus_per_task"]
        == 1
    )


def test_notice_of_the_limit_leaves_most_of_a_short_one() -> None:
    short = submit.sbatch_parameters(cell_on(1), CPU, JobResources(time="1"))
    assert (short["time"], short["signal_delay_s"]) == (1, 30)
    assert (
        submit.sbatch_parameters(cell_on(1), CPU, JobResources(time="60"))["signal_delay_s"] == 90
    )


def record_of(seed: int, status: str = "ok", **changes: object) -> Record:
    record = new_record(Cell(method="base", seed=seed), ["true"])
    return record.model_copy(update={"status": status, "ended": record.started, **changes})


def test_records_of_the_same_software_and_kind_of_device_count_whatever_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ok = record_of(0)
    other_cpu = ok.hardware.model_copy(update={"cpu": "another", "accelerator": None})
    stack = ok.stack.model_copy(update={"packages": ok.stack.packages | {"torch": "2.13.0"}})
    monkeypatch.setattr(submit.provenance, "stack", lambda: stack)
    there = ok.model_copy(update={"hardware": other_cpu, "stack": stack, "stack_id": "f" * 64})
    older = stack.model_copy(update={"packages": stack.packages | {"trl": "0.1"}})
    on_gpu = other_cpu.model_copy(update={"accelerator": "NVIDIA A100"})

    def found(record: Record, on: Partition) -> list[Job]:
        counts = remote_plan.counting(submit.on_gpu(on))
        entries = {"r": Entry(Path("r"), record)}
        return plan_jobs(
            [record.cell], entries, machine=remote_plan.machine(submit.on_gpu(on)), counts=counts
        )

    assert [job.action for job in found(there, CPU)] == ["keep"]
    assert [job.action for job in found(there, GPU)] == ["run"]
    assert [j.action for j in found(there.model_copy(update={"stack": older}), CPU)] == ["run"]
    measured = there.model_copy(update={"hardware": on_gpu})
    assert [job.action for job in found(measured, GPU)] == ["keep"]
    assert [job.action for job in found(measured, CPU)] == ["run"]


def test_an_interrupted_attempt_does_not_hide_a_result() -> None:
    ok = record_of(0)
    later = ok.model_copy(update={"status": "interrupted", "attempt": 2, "ended": "2999-01-01"})
    entries = {"1": Entry(Path("1"), ok), "2": Entry(Path("2"), later)}
    [job] = plan_jobs([ok.cell], entries, counts=remote_plan.counting(gpus=False))
    assert job.entry is not None
    assert (job.action, job.entry.record.status) == ("keep", "ok")


def test_cells_still_queued_are_found_by_the_arrays_name(tmp_path: Path, pretend: Pretend) -> None:
    store = Store(tmp_path / "results")
    folder = store.root / ".slurm" / "tunebench-1"
    folder.mkdir(parents=True)
    content = {"name": "tunebench-1", "cells": ["aa", "bb", "cc"], "labels": ["a", "b", "c"]}
    (folder / "array.json").write_text(json.dumps(content))
    lines = [
        f"tunebench-1|{i}|5_{i}|{state}|None|n1" for i, state in enumerate(("FAILED", "RUNNING"))
    ]
    pretend("squeue", "\n".join(lines) + "\n", 0)
    found = submit.queued(store, ["aa", "bb", "cc"])
    assert {cell: state.job for cell, (_, state) in found.items()} == {"bb": "5_1"}
    assert submit.queued(store, ["zz"]) == {}


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"SLURM_JOB_ID": "12"}, "12"),
        ({"SLURM_JOB_ID": "14", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "2"}, "12_2"),
        ({"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "3"}, "12.3"),
    ],
)
def test_a_jobs_name_tells_its_starts_apart(environment: dict[str, str], name: str) -> None:
    assert task.job_name(environment) == name


@pytest.mark.parametrize(
    ("left", "requeues", "goes_on", "status"),
    [
        ("1:00:00", 0, True, "interrupted"),  # far from the limit: it has to make way
        ("UNLIMITED", 0, True, "interrupted"),
        ("1:20", 1, True, "interrupted"),
        ("1:20", 0, False, "timeout"),
        ("0:00", 0, False, "timeout"),
    ],
)
def test_a_notice_is_a_time_out_only_near_the_limit_and_the_last_one_a_result(
    left: str,
    requeues: int,
    goes_on: bool,
    status: str,
    pretend: Pretend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend("squeue", f"{left}\n", 0)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    told: list[int] = []
    monkeypatch.setattr(task.os, "kill", lambda pid, number: told.append(number))
    notice = task.EndNotice(requeues)
    notice.handle(12, None)
    notice.handle(12, None)
    assert told == [15], "the runner is told once"
    assert notice.goes_on is goes_on
    assert notice.explain(record_of(0, "interrupted")).status == status


def test_an_order_survives_the_journey_to_the_node() -> None:
    cell = cell_on(1)
    order = Order("/r", cell.model_dump_json(), "slurm", attempts={"key": 2}, timeout=5.0)
    sent = Order(**json.loads(json.dumps(dataclasses.asdict(order))))
    assert Cell.model_validate_json(sent.cell) == cell
    assert sent == order
