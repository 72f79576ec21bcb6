"""Cells as tasks of SLURM job arrays, submitted through submitit.

    <results>/.slurm/<name>/array.json   the cells of an array; written once, before sbatch
    <results>/.slurm/<name>/             submitit's script and pickles, logs of the tasks

The job name of an array in the queue is the name of its directory. So a later command finds what
was submitted, even after the process that submitted it has died.
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

# submitit must not count time-outs: only the task knows which signal was one.
ANY_NUMBER = 1_000_000


@dataclass(frozen=True)
class JobResources:
    """Options of sbatch, by its own names; the others follow from the cells. `time` is in SLURM's
    notation. `requeues`: how often a cell that reaches the time limit starts again."""

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
    """A submitted job array: the cell_ids of its tasks, in order, and their labels."""

    name: str
    cells: tuple[str, ...]
    labels: tuple[str, ...]


def on_gpu(partition: Partition) -> bool:
    """Whether cells of this partition compute on GPUs. A CPU-only build of torch cannot."""
    return partition.has_gpus and not provenance.stack().packages.get("torch", "").endswith("+cpu")


def check_fits(jobs: Sequence[Job], partition: Partition, resources: JobResources) -> None:
    """Raises UserError for the first cell that does not fit on the partition's nodes."""
    limit(partition, resources)
    for job in jobs:
        cell = job.cell
        if cell.nodes > len(partition.nodes):
            raise UserError(
                f"{job.label} runs on {cell.nodes} nodes and partition {partition.name} has "
                f"{len(partition.nodes)}",
                key="nodes",
            )
        needed = cell.devices_per_node
        what, most = ("GPUs", max(node.gpus for node in partition.nodes))
        if not partition.has_gpus:
            what, most = "CPUs", max(node.cpus for node in partition.nodes)
        if needed > most:
            raise UserError(
                f"{job.label} needs {needed} {what} on a node and the largest of partition "
                f"{partition.name} has {most}",
                key="devices",
            )


def limit(partition: Partition, resources: JobResources) -> int:
    """The time limit of a task in minutes, 0 for none. Raises UserError when `time` is not in
    SLURM's notation or exceeds the partition's limit."""
    most = partition.most_minutes or 0
    if resources.time is None:
        return partition.default_minutes or most
    wanted = queue.minutes(resources.time)
    if most and (wanted == 0 or wanted > most):
        raise UserError(
            f"{resources.time} is longer than partition {partition.name} allows: {most} minutes",
            where="--time",
        )
    return wanted


def queued(store: Store, cells: Iterable[str]) -> dict[str, tuple[Array, JobState]]:
    """The arrays and states of those of these cells whose jobs are in the queue and have not ended,
    by cell_id. Raises NoAnswer."""
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
    """All arrays that were submitted for a results directory."""
    found = []
    for path in sorted((store.root / ".slurm").glob("*/array.json")):
        plain = json.loads(path.read_text())
        found.append(Array(plain["name"], tuple(plain["cells"]), tuple(plain["labels"])))
    return found


def submit(
    store: Store, orders: Mapping[str, Order], partition: Partition, resources: JobResources
) -> dict[str, Array]:
    """Submit an array for each number of devices and nodes among the cells; gives the arrays by
    SLURM's id. Raises UserError when sbatch refuses."""
    kinds: dict[tuple[int, int], list[Order]] = {}
    for order in orders.values():
        cell = Cell.model_validate_json(order.cell)
        kinds.setdefault((cell.devices, cell.nodes), []).append(order)
    most = max(1, queue.max_array_size() - 1)
    arrays: dict[str, Array] = {}
    for group in kinds.values():
        cell = Cell.model_validate_json(group[0].cell)
        parameters = sbatch_parameters(cell, partition, resources)
        for begin in range(0, len(group), most):
            arrays |= _submit(store, group[begin : begin + most], parameters, resources.requeues)
    return arrays


def sbatch_parameters(cell: Cell, partition: Partition, resources: JobResources) -> dict[str, Any]:
    """submitit's parameters for tasks like this cell; sbatch does not get those that are none."""
    time = limit(partition, resources)
    each = cell.devices_per_node
    cpus, gres = resources.cpus_per_task, None
    if partition.has_gpus or resources.gres:
        gres = f"{resources.gres or 'gpu'}:{each}"
    elif cpus is None:
        # As in a local run, the cell gets the whole machine.
        cpus = min(node.cpus for node in partition.nodes if node.cpus >= each)
    notice = min(NOTICE_SECONDS, time * 30) if time else NOTICE_SECONDS
    return {
        "partition": partition.name,
        "time": time,
        "nodes": cell.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": cpus,
        # From 22.05 on srun does not inherit this from sbatch (SLURM's release notes).
        "srun_args": [f"--cpus-per-task={cpus}"] if cpus else None,
        "gres": gres,
        "mem": resources.mem,
        "account": resources.account,
        "qos": resources.qos,
        "constraint": resources.constraint,
        "exclusive": resources.exclusive or None,
        "signal_delay_s": notice,
        "wckey": None,
        # Python must not import a `harness.py` of the submission's directory.
        "setup": ["export PYTHONSAFEPATH=1"],
        # Whatever the site's default: the cells of a failed node go back to the queue.
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
        text = "; ".join(lines) or str(error).strip().splitlines()[-1]
        raise UserError(f"sbatch refused: {text.replace('sbatch: error: ', '')}") from error
    return {tasks[0].job_id.split("_")[0]: array}


def submission_lock(store: Store) -> FileLock:
    """Held while a run reads the queue and submits: two runs never submit the same cells."""
    with disk_errors(store.root):
        (store.root / ".slurm").mkdir(parents=True, exist_ok=True)
    return FileLock(store.root / ".slurm" / "submitting.lock")


def logs(store: Store, array: Array, index: int) -> list[Path]:
    """The logs of standard error of a task. submitit names them by the job's id."""
    found = sorted((store.root / ".slurm" / array.name).glob(f"*_{index}_0_log.err"))
    if not found and len(array.cells) == 1:
        found = sorted((store.root / ".slurm" / array.name).glob("*_0_log.err"))
    return found
