"""`--on slurm` against a real slurmctld and slurmds, with real cells on a tiny model."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from conftest import Command, Ran
from slurm_cluster import Cluster, cluster, missing, wait_for

from harness.records.reading import read_record
from harness.records.record import Record

MATRIX = """\
name: few
model: tiny-llama
data: {source: python-reference, max_length: 32, packing: true, max_samples: 40}
train: {steps: 20, warmup_steps: 1, micro_batch_size: 1}
evaluate: {tasks: [], sample_prompts: []}
score_base: false
method: lora
rank: 4
axes:
  seed: [0, 1]
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    with cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running
        wait_for(lambda: not running.leftovers(), what=f"end of {running.leftovers()}")


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    (tmp_path / "few.yaml").write_text(MATRIX)
    return tmp_path


class Watching:
    """A `tunebench run` that goes on while the test does something to it."""

    def __init__(self, slurm: Cluster, environment: dict[str, str], cwd: Path, *more: str) -> None:
        self.results = cwd / "results" / "few"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "launch.entry", "run", "few.yaml", "--no-predict", *more],
            cwd=cwd,
            env=environment | slurm.variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def end(self) -> Ran:
        out, err = self.process.communicate(timeout=240)
        return Ran(self.process.returncode, out, err)

    def said(self, word: str) -> str:
        """What it has written, up to the first line with a word in it."""
        assert self.process.stderr is not None
        lines = []
        for line in self.process.stderr:
            lines.append(line)
            if word in line:
                break
        return "".join(lines)

    def working(self, job: str) -> Path | None:
        """The working directory of a job's cell, once its worker is at it."""
        for path in self.results.glob(".running/*/record.json"):
            record = read_record(path)
            if record.placement.job == job and record.phase is not None:
                return path.parent
        return None


@pytest.fixture
def watch(
    slurm: Cluster, environment: dict[str, str], sweep: Path
) -> Iterator[Callable[..., Watching]]:
    started: list[Watching] = []

    def start(*more: str) -> Watching:
        started.append(Watching(slurm, environment, sweep, *more))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.process.kill()
            each.process.communicate()
    slurm.clear()


def array_of(jobs: Iterable[str]) -> str:
    [array] = {job.split("_")[0] for job in jobs}
    return array


def records(results: Path) -> dict[tuple[int, int], Record]:
    """Published records by seed and attempt."""
    found = [read_record(path) for path in results.glob("*/record.json")]
    return {(record.cell.seed, record.attempt): record for record in found}


def run(
    slurm: Cluster, environment: dict[str, str], cwd: Path, *arguments: str, **more: str
) -> Ran:
    done = subprocess.run(
        [sys.executable, "-m", "launch.entry", *arguments],
        cwd=cwd,
        env=environment | slurm.variables | more,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            ["--partition", "cup"],
            "--partition: no partition 'cup'; did you mean 'cpu'?; there are cpu, gpu",
        ),
        (["--time", "soon"], "--time: 'soon' is no time as SLURM takes it"),
        (["--time", "2-0"], "--time: 2-0 is longer than partition cpu allows: 60 minutes"),
        (
            ["--set", "parallelism=ddp", "--set", "devices=6", "--set", "nodes=2"],
            "needs 3 CPUs on a node and the largest of partition cpu has 2",
        ),
        (
            ["--set", "parallelism=ddp", "--set", "devices=3", "--partition", "gpu"],
            "needs 3 GPUs on a node and the largest of partition gpu has 2",
        ),
        (
            ["--set", "parallelism=ddp", "--set", "devices=3", "--set", "nodes=3"],
            "runs on 3 nodes and partition cpu has 2",
        ),
        (["--set", "data.source=nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_a_mistake_costs_one_line_and_no_job(
    slurm: Cluster, environment: dict[str, str], sweep: Path, options: list[str], line: str
) -> None:
    before = slurm.states()
    ran = run(slurm, environment, sweep, "run", "few.yaml", "--on", "slurm", *options)
    assert ran.code == 2, ran.err
    [last] = [text for text in ran.err.splitlines() if "error" in text]
    assert line in last
    assert slurm.states() == before
    assert not (sweep / "results").exists()


def test_a_cluster_that_does_not_answer_costs_one_line(
    slurm: Cluster, environment: dict[str, str], sweep: Path
) -> None:
    nobody = slurm.configuration.read_text().replace("SlurmctldPort=", "SlurmctldPort=1 #")
    (sweep / "slurm.conf").write_text(f"{nobody}\nMessageTimeout=1\n")
    elsewhere = {"SLURM_CONF": str(sweep / "slurm.conf")}
    ran = run(slurm, environment, sweep, "run", "few.yaml", "--on", "slurm", **elsewhere)
    assert ran.code == 2
    assert "SLURM does not answer: sinfo:" in ran.err


def test_cells_on_two_nodes_are_those_of_a_local_run_and_no_cell_runs_twice(
    slurm: Cluster,
    environment: dict[str, str],
    watch: Callable[..., Watching],
    sweep: Path,
    tunebench: Command,
) -> None:
    """Also: the watcher is killed, a local runner joins, one watcher is stopped and another goes
    on."""
    first = watch("--on", "slurm")
    wait_for(lambda: len(list(first.results.glob(".running/*/record.json"))) == 2, what="two cells")
    first.process.kill()
    first.end()
    before = {job: state for job, state in slurm.states().items() if state == "RUNNING"}
    assert len(before) == 2
    for job in before:  # so that there is time for all of the following
        slurm.run("scontrol", "suspend", job, check=True)
    second = watch("--on", "slurm")
    assert "2 cells are in SLURM's queue from an earlier run" in second.said("in SLURM's queue")
    second.process.send_signal(signal.SIGINT)
    stopped = second.end()
    assert stopped.code == 130
    assert f"'scancel {array_of(before)}' cancels them" in stopped.err
    states = slurm.states()
    assert {states[job] for job in before} == {"SUSPENDED"}, "Ctrl-C is for that command alone"
    here = watch()
    third = watch("--on", "slurm")
    asked = json.loads(run(slurm, environment, sweep, "status", "few.yaml", "--json").out)
    assert {each["state"] for each in asked} == {"running"}
    assert {each["job"] for each in asked} == set(before)
    third.said("slurm: 2 running")
    here.said("waiting for what another runner is measuring")
    for job in before:
        slurm.run("scontrol", "resume", job, check=True)
    ran, local = third.end(), here.end()
    assert (ran.code, local.code) == (0, 0), ran.err + local.err
    assert slurm.states().keys() == states.keys()
    found = records(first.results)
    assert set(found) == {(0, 1), (1, 1)}, "each once, whoever asked for it"
    assert {record.status for record in found.values()} == {"ok"}
    assert {record.placement.engine for record in found.values()} == {"slurm"}
    assert {record.placement.job for record in found.values()} == set(before)
    assert run(slurm, environment, sweep, "run", "few.yaml", "--on", "slurm").code == 0
    assert slurm.states().keys() == states.keys(), "nothing was left to submit"

    assert tunebench("run", "few.yaml", "--no-predict", "--results", "own", cwd=sweep).code == 0
    own = records(sweep / "own")
    assert {key: r.quality.train_loss for key, r in own.items()} == {
        key: r.quality.train_loss for key, r in found.items()
    }
    assert {r.cell_id for r in own.values()} == {r.cell_id for r in found.values()}
    assert {r.stack_id for r in own.values()} == {r.stack_id for r in found.values()}


def test_what_is_cancelled_pre_empted_or_loses_its_node_leaves_a_record_and_runs_again(
    slurm: Cluster, environment: dict[str, str], watch: Callable[..., Watching], sweep: Path
) -> None:
    sweep.joinpath("few.yaml").write_text(MATRIX.replace("[0, 1]", "[0, 1, 2]"))
    before = slurm.states().keys()
    watching = watch("--on", "slurm")
    wait_for(lambda: slurm.states().keys() - before, what="jobs")
    array = array_of(slurm.states().keys() - before)
    cancelled, pre_empted, lost = (f"{array}_{index}" for index in range(3))
    wait_for(lambda: watching.working(cancelled) and watching.working(pre_empted), what="workers")
    slurm.run("scancel", cancelled, check=True)
    # What submitit's own tests do, and SLURM before a time limit or for a more urgent job.
    slurm.run("scancel", "--signal=USR2", pre_empted, check=True)
    wait_for(lambda: watching.working(lost), what="third worker")
    node = slurm.run("squeue", "-h", "-j", lost, "-o", "%N").strip()
    slurm.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test", check=True)
    wait_for(lambda: slurm.states()[lost] == "PENDING", what="requeued job")
    slurm.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
    ran = watching.end()
    assert ran.code == 3, ran.err
    found = records(watching.results)
    assert {key: record.status for key, record in found.items()} == {
        (0, 1): "interrupted",
        (1, 1): "interrupted",
        (1, 2): "ok",
        (2, 1): "interrupted",
        (2, 2): "ok",
    }
    assert "make way: back in the queue" in (found[1, 1].reason or "")
    assert found[1, 2].placement.job == f"{pre_empted}.1"
    assert f"SLURM job {cancelled} ended as CANCELLED" in ran.err
    wait_for(lambda: not slurm.leftovers(), what=f"end of {slurm.leftovers()}")

    again = run(slurm, environment, sweep, "run", "few.yaml", "--on", "slurm", "--no-predict")
    assert again.code == 0, again.err
    assert "submitted 1 cell " in again.err
    assert records(watching.results)[0, 2].status == "ok"


def test_a_cell_on_two_nodes_is_one_record(
    slurm: Cluster, environment: dict[str, str], sweep: Path
) -> None:
    spread = "parallelism: ddp\ndevices: 2\nnodes: 2\n"
    sweep.joinpath("few.yaml").write_text(MATRIX.replace("[0, 1]", "[0]") + spread)
    ran = run(slurm, environment, sweep, "run", "few.yaml", "--on", "slurm", "--no-predict")
    assert ran.code == 0, ran.err
    record = records(sweep / "results" / "few")[0, 1]
    assert record.verified.world_size == 2
    assert [(state.rank, state.status) for state in record.ranks] == [(0, "ok"), (1, "ok")]
    assert record.command[record.command.index("--num_machines") + 1] == "2"
    asked = json.loads(run(slurm, environment, sweep, "status", "results/few", "--json").out)
    assert [(each["state"], each["status"]) for each in asked] == [("done", "ok")]
    wait_for(lambda: not slurm.leftovers(), what=f"end of {slurm.leftovers()}")


def test_a_cell_that_reaches_the_time_limit_too_often_is_a_timeout(
    slurm: Cluster, watch: Callable[..., Watching], sweep: Path
) -> None:
    sweep.joinpath("few.yaml").write_text(MATRIX.replace("[0, 1]", "[7]"))
    before = slurm.states().keys()
    watching = watch("--on", "slurm", "--time", "2", "--requeues", "0", "--partition", "gpu")
    wait_for(lambda: slurm.states().keys() - before, what="a job")
    [job] = slurm.states().keys() - before
    asked = slurm.run("scontrol", "show", "job", job)
    assert "TimeLimit=00:02:00" in asked
    assert "TresPerNode=gres:gpu:1" in asked
    wait_for(lambda: watching.working(job), what="worker")
    slurm.run("scancel", "--signal=USR2", job, check=True)  # as SLURM does before the limit
    ran = watching.end()
    assert ran.code == 0, ran.err
    record = records(watching.results)[7, 1]
    assert (record.status, record.reason) == (
        "timeout",
        "the time limit of the SLURM job is reached, not for the first time",
    )
    # The record is there a moment before its job has ended.
    wait_for(lambda: slurm.states()[job] == "COMPLETED", what="end of the job")
