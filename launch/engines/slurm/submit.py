"""Cells as tasks of SLURM job arrays, submitted through submitit.

    <results>/.slurm/<name>/array.json   the cells of an array; written once, before sbatch
    <results>/.slurm/<name>/             submitit's script and pickles, logs of the tasks

An array is told in the queue by its job name, which is that of its directory, so what was submitted
is found again whatever became of the process that submitted it.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from harness.records import provenance
from harness.records.store import Store, disk_errors
from harness.system.files import write_atomically
from launch.engines.order import Order
from launch.engines.slurm import queue
from launch.engines.slurm.queue import JobState, Partition
from launch.engines.slurm.task import NOTICE_SECONDS, CellTask
from launch.planning.plan import Job
from matrices.cell import Cell
from matrices.errors import UserError

# submitit's own count is of no use here: only the task knows which signal was a time-out.
ANY_NUMBER = 1_000_000


@dataclass(frozen=True)
class Resources:
    """What is asked of SLURM, as sbatch's options of the same names; the rest follows from the
    cells. `time` is in SLURM's notation. `requeues`: how often a cell that reaches the time limit
    starts anew before that is its result."""

    partition: str | None = None
    time: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gres: str | None = None
    cpus_per_task: int | None = None
    mem: str | None = None
    exclusive: bool = False
    requeues: int = 1


@dataclass(frozen=True)
class Array:
    """A submitted job array: the cell_id of each of its tasks, in order, and their short names."""

    name: str
    cells: tuple[str, ...]
    labels: tuple[str, ...]


def on_gpu(on: Partition) -> bool:
    """Whether cells of this partition compute on GPUs: a CPU-only build of torch cannot."""
    return on.has_gpus and not provenance.stack().packages.get("torch", "").endswith("+cpu")


def check_fits(jobs: Sequence[Job], on: Partition, asked: Resources) -> None:
    """Raises UserError for the first cell that no node of the partition could ever hold."""
    limit(on, asked)
    for job in jobs:
        cell = job.cell
        if cell.nodes > len(on.nodes):
            raise UserError(
                f"{job.label} runs on {cell.nodes} nodes and partition {on.name} has "
                f"{len(on.nodes)}",
                key="nodes",
            )
        each = cell.devices // cell.nodes
        what, most = ("GPUs", max(node.gpus for node in on.nodes))
        if not on.has_gpus:
            what, most = "CPUs", max(node.cpus for node in on.nodes)
        if each > most:
            raise UserError(
                f"{job.label} needs {each} {what} on a node and the largest of partition "
                f"{on.name} has {most}",
                key="devices",
            )


def limit(on: Partition, asked: Resources) -> int:
    """The time limit of a task in minutes, 0 for none. Raises UserError when it is no time, or
    more than the partition allows."""
    most = on.most_minutes or 0
    if asked.time is None:
        return on.default_minutes or most
    wanted = queue.minutes(asked.time)
    if most and (wanted == 0 or wanted > most):
        raise UserError(
            f"{asked.time} is longer than partition {on.name} allows: {most} minutes",
            where="--time",
        )
    return wanted


def queued(store: Store, cells: Iterable[str]) -> dict[str, tuple[Array, JobState]]:
    """Where each of these cells stands in the queue, by cell_id, if it is there and its job has
    not ended. Raises NoAnswer."""
    wanted = set(cells)
    arrays = [array for array in known_arrays(store) if wanted & set(array.cells)]
    states = queue.queue(array.name for array in arrays)
    return {
        cell: (array, state)
        for array in arrays
        for index, cell in enumerate(array.cells)
        if cell in wanted and (state := states.get((array.name, index))) and state.unfinished
    }


def known_arrays(store: Store) -> list[Array]:
    """Every array that was ever submitted for a results directory, the oldest first."""
    found = []
    for path in sorted((store.root / ".slurm").glob("*/array.json")):
        plain = json.loads(path.read_text())
        found.append(Array(plain["name"], tuple(plain["cells"]), tuple(plain["labels"])))
    return found


def submit(
    store: Store, orders: Mapping[str, Order], on: Partition, asked: Resources
) -> dict[str, Array]:
    """Submit one array for every kind of request (devices and nodes) among the cells, by cell_id;
    gives the arrays by SLURM's id. Raises UserError when sbatch refuses."""
    kinds: dict[tuple[int, int], list[Order]] = {}
    for order in orders.values():
        cell = Cell.model_validate_json(order.cell)
        kinds.setdefault((cell.devices, cell.nodes), []).append(order)
    most = max(1, queue.max_array_size() - 1)
    arrays: dict[str, Array] = {}
    for group in kinds.values():
        cell = Cell.model_validate_json(group[0].cell)
        parameters = sbatch_parameters(cell, on, asked)
        for begin in range(0, len(group), most):
            arrays |= _submit(store, group[begin : begin + most], parameters, asked.requeues)
    return arrays


def sbatch_parameters(cell: Cell, on: Partition, asked: Resources) -> dict[str, Any]:
    """submitit's parameters for tasks like this cell; one that is none is left out of sbatch."""
    time = limit(on, asked)
    each = cell.devices // cell.nodes
    cpus, gres = asked.cpus_per_task, None
    if on.has_gpus or asked.gres:
        gres = f"{asked.gres or 'gpu'}:{each}"
    elif cpus is None:
        # As a local run does: all of the machine for the cell.
        cpus = min(node.cpus for node in on.nodes if node.cpus >= each)
    notice = min(NOTICE_SECONDS, time * 30) if time else NOTICE_SECONDS
    return {
        "partition": on.name,
        "time": time,
        "nodes": cell.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": cpus,
        # From 22.05 on srun does not take over what sbatch was asked for (SLURM's release notes).
        "srun_args": [f"--cpus-per-task={cpus}"] if cpus else None,
        "gres": gres,
        "mem": asked.mem,
        "account": asked.account,
        "qos": asked.qos,
        "constraint": asked.constraint,
        "exclusive": asked.exclusive or None,
        "signal_delay_s": notice,
        "wckey": None,
        # A `harness.py` in the directory of the submission must not be imported.
        "setup": ["export PYTHONSAFEPATH=1"],
        # Also where the site's default is not to: a node that fails gives its cells back.
        "additional_parameters": {"requeue": True},
    }


def _submit(
    store: Store, orders: Sequence[Order], parameters: Mapping[str, Any], requeues: int
) -> dict[str, Array]:
    import submitit

    array = Array(
        name=f"tunebench-{secrets.token_hex(4)}",
        cells=tuple(Cell.model_validate_json(order.cell).cell_id for order in orders),
        labels=tuple(order.label for order in orders),
    )
    folder = store.root / ".slurm" / array.name
    with disk_errors(store.root):
        folder.mkdir(parents=True)
        content = dataclasses.asdict(array) | {"submitted": provenance.now()}
        write_atomically(folder / "array.json", json.dumps(content, indent=1) + "\n")
    executor = submitit.SlurmExecutor(folder, max_num_timeout=ANY_NUMBER)
    executor.update_parameters(
        job_name=array.name, array_parallelism=len(orders), **dict(parameters)
    )
    try:
        tasks = executor.submit_array(
            [CellTask(json.dumps(dataclasses.asdict(order)), requeues) for order in orders]
        )
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        lines = [line.strip() for line in str(error).splitlines() if "error:" in line]
        said = "; ".join(lines) or str(error).strip().splitlines()[-1]
        raise UserError(f"sbatch refused: {said.replace('sbatch: error: ', '')}") from error
    return {tasks[0].job_id.split("_")[0]: array}


def submitting(store: Store) -> FileLock:
    """Held while looking what is in the queue and adding to it, so that two do not submit the same
    cells."""
    with disk_errors(store.root):
        (store.root / ".slurm").mkdir(parents=True, exist_ok=True)
    return FileLock(store.root / ".slurm" / "submitting.lock")


def logs(store: Store, array: Array, index: int) -> list[Path]:
    """The log files of a task, its errors first. submitit names them by the job's id."""
    found = sorted((store.root / ".slurm" / array.name).glob(f"*_{index}_0_log.err"))
    if not found and len(array.cells) == 1:
        found = sorted((store.root / ".slurm" / array.name).glob("*_0_log.err"))
    return found
