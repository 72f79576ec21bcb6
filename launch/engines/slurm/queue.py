"""Reads a SLURM cluster: partitions, nodes, limits and the states of jobs.

It uses SLURM's commands as their manual pages document them, with one call for all jobs. Accounting
(`sacct`) is optional.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from harness.system import child_process
from launch.engines.engine import NoAnswer as NoAnswer
from matrices.errors import UserError, nearest

# slurm.conf's default, for when `scontrol show config` does not answer.
MAX_ARRAY_SIZE = 1001
# man squeue, JOB STATE CODES: a job in any other state has ended.
UNFINISHED = frozenset(
    {
        "CONFIGURING",
        "COMPLETING",
        "PENDING",
        "REQUEUED",
        "REQUEUE_FED",
        "REQUEUE_HOLD",
        "RESIZING",
        "RESV_DEL_HOLD",
        "RUNNING",
        "SIGNALING",
        "SPECIAL_EXIT",
        "STAGE_OUT",
        "STOPPED",
        "SUSPENDED",
    }
)
WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD"})
ANSWER_SECONDS = 60
# days-hours[:minutes[:seconds]], or minutes, minutes:seconds, hours:minutes:seconds.
_LONG_TIME = re.compile(r"(\d+)-(\d+)(?::(\d+))?(?::(\d+))?")
_SHORT_TIME = re.compile(r"\d+(:\d+){0,2}")


@dataclass(frozen=True)
class SlurmNode:
    """One node of a partition. `gpus` counts those of all types."""

    name: str
    cpus: int
    gpus: int


@dataclass(frozen=True)
class Partition:
    """One partition; times in minutes, none where there is no limit."""

    name: str
    default: bool
    up: bool
    nodes: tuple[SlurmNode, ...]
    default_minutes: int | None
    most_minutes: int | None

    @property
    def has_gpus(self) -> bool:
        return any(node.gpus for node in self.nodes)


@dataclass(frozen=True)
class JobState:
    """The state of one task of an array in the queue. `reason` says why it waits; empty when it
    does not wait."""

    job: str
    state: str
    reason: str = ""
    nodes: str = ""

    @property
    def unfinished(self) -> bool:
        return self.state in UNFINISHED

    @property
    def waiting(self) -> bool:
        return self.state in WAITING


def require_slurm() -> None:
    """Raises UserError where SLURM's commands or submitit are missing."""
    if importlib.util.find_spec("submitit") is None:
        raise UserError("--on slurm needs submitit: pip install 'tunebench[slurm]'")
    lacking = [name for name in ("sbatch", "squeue", "sinfo", "scontrol") if not shutil.which(name)]
    if lacking:
        raise UserError(
            f"--on slurm needs SLURM's commands and there is no {', '.join(lacking)} on this "
            "machine's PATH; run it where you would run sbatch"
        )


def run_command(*argv: str) -> str:
    """The standard output of one of SLURM's commands. Raises NoAnswer when it fails."""
    try:
        done = child_process.run(argv, ANSWER_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoAnswer(f"{argv[0]}: {error}") from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise NoAnswer(f"{argv[0]}: {lines[-1] if lines else f'exit code {done.returncode}'}")
    return done.stdout


def partitions() -> list[Partition]:
    """Every partition this user sees. Raises UserError when SLURM does not answer."""
    try:
        lines = run_command(
            "sinfo", "--noheader", "--Node", "-o", "%P|%N|%c|%G|%a|%L|%l"
        ).splitlines()
    except NoAnswer as error:
        raise UserError(f"SLURM does not answer: {error}") from error
    found: dict[str, list[list[str]]] = {}
    for line in lines:
        fields = line.strip().split("|")
        found.setdefault(fields[0], []).append(fields)
    return [_partition(name, rows) for name, rows in found.items()]


def _partition(name: str, rows: Sequence[Sequence[str]]) -> Partition:
    _, _, _, _, available, default, most = rows[0]
    nodes = tuple(SlurmNode(row[1], int(row[2].rstrip("+")), gpus_of(row[3])) for row in rows)
    return Partition(
        name=name.rstrip("*"),
        default=name.endswith("*"),
        up=available == "up",
        nodes=nodes,
        default_minutes=minutes(default) if default[:1].isdigit() else None,
        most_minutes=minutes(most) if most[:1].isdigit() else None,
    )


def partition(name: str | None) -> Partition:
    """The named partition, or the default one. Raises UserError, with the names of all."""
    found = {each.name: each for each in partitions()}
    there_are = f"there are {', '.join(found)}" if found else "there are none"
    if name is None:
        default = next((each for each in found.values() if each.default), None)
        if default is None:
            raise UserError(
                f"SLURM has no default partition; name one: {there_are}", where="--partition"
            )
        return default
    if name not in found:
        raise UserError(
            f"no partition {name!r}{nearest(name, found)}; {there_are}", where="--partition"
        )
    if not found[name].up:
        raise UserError(f"partition {name!r} is down; {there_are}", where="--partition")
    return found[name]


def gpus_of(gres: str) -> int:
    """GPUs in a node's generic resources as sinfo writes them: `gpu:a100:4(S:0-1),gpu:2`.

    A GPU resource is `gpu[:type]:count`, the count 1 when left out (man slurm.conf, Gres).
    """
    count = 0
    for entry in re.sub(r"\([^)]*\)", "", gres).split(","):
        parts = entry.strip().split(":")
        if parts[0] == "gpu":
            count += int(parts[-1]) if len(parts) > 1 and parts[-1].isdigit() else 1
    return count


def minutes(text: str) -> int:
    """Minutes, rounded up, of a time as sbatch's `--time` takes it; 0 and `infinite` mean no
    limit, which is 0. Raises UserError."""
    if text.lower() in ("infinite", "unlimited"):
        return 0
    long = _LONG_TIME.fullmatch(text)
    if long:
        days, hours, minute, second = (int(part or 0) for part in long.groups())
        seconds = ((days * 24 + hours) * 60 + minute) * 60 + second
    elif _SHORT_TIME.fullmatch(text):
        parts = [int(part) for part in text.split(":")]
        hours, minute, second = ([0, *parts, 0] if len(parts) == 1 else [0, *parts])[-3:]
        seconds = (hours * 60 + minute) * 60 + second
    else:
        raise UserError(
            f"{text!r} is no time as SLURM takes it; write minutes, hours:minutes:seconds or "
            "days-hours:minutes",
            where="--time",
        )
    return -(-seconds // 60)


def max_array_size() -> int:
    """The largest number of tasks in one array, by slurm.conf."""
    try:
        found = re.search(
            r"^MaxArraySize\s*=\s*(\d+)", run_command("scontrol", "show", "config"), re.M
        )
    except NoAnswer:
        found = None
    return int(found[1]) if found else MAX_ARRAY_SIZE


def queue(names: Iterable[str]) -> dict[tuple[str, int], JobState]:
    """The states of the tasks of these arrays (job names), by name and index in the array.

    One call. The queue also lists jobs that ended lately (slurm.conf, MinJobAge: 300 s by default).
    Raises NoAnswer when squeue fails.
    """
    wanted = sorted(set(names) - {""})
    if not wanted:
        return {}
    columns = "%j|%K|%i|%T|%r|%N"
    argv = ["squeue", "--noheader", "--array", "--states=all"]
    found: dict[tuple[str, int], JobState] = {}
    for line in run_command(*argv, "--name", ",".join(wanted), "-o", columns).splitlines():
        name, index, job, state, reason, nodes = line.strip().split("|")
        waits = "" if reason == "None" or state not in WAITING else reason
        found[name, int(index) if index.isdigit() else 0] = JobState(job, state, waits, nodes)
    return found


def ended_states(jobs: Sequence[str]) -> Mapping[str, JobState]:
    """The states of jobs that the queue does not list any more, by accounting; empty without it."""
    if not jobs or not shutil.which("sacct"):
        return {}
    argv = ["sacct", "--noheader", "--parsable2", "--allocations"]
    try:
        lines = run_command(*argv, "-o", "JobID,State,NodeList", "-j", ",".join(jobs)).splitlines()
    except NoAnswer:
        return {}
    rows = (line.split("|") for line in lines if line.count("|") == 2)
    # `CANCELLED by 0`: only the state matters.
    return {job: JobState(job, state.split()[0], nodes=nodes) for job, state, nodes in rows}


def node_address(node: str) -> str:
    """The address of a node: SLURM's NodeAddr, because its name may not resolve.

    Raises NoAnswer.
    """
    found = re.search(r"\bNodeAddr=(\S+)", run_command("scontrol", "show", "node", node))
    if found is None:
        raise NoAnswer(f"scontrol: no address of node {node}")
    return found[1]


def first_node(nodes: str) -> str:
    """The first name of a node list (`n[1-3,7]`), as scontrol expands it. Raises NoAnswer."""
    return run_command("scontrol", "show", "hostnames", nodes).split()[0]
