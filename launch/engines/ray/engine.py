"""A Ray cluster as an engine: an order is a Ray task.

Ray never repeats a task: the end of a cell is a result, and the engine reports the death of a node
(`died`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.records.store import Store
from launch.cells import start
from launch.engines.engine import OrderState
from launch.engines.order import Order, Report
from launch.engines.ray.cluster import (
    RayNode,
    TaskRequest,
    check_nodes,
    connected,
    has_gpus,
    living_nodes,
    task_request,
)
from launch.engines.ray.task import ProcessDied, RayOrder, run_order
from launch.planning.plan import Job
from launch.processes.stop_signals import stop_signals
from matrices.cell import Cell
from matrices.errors import UserError


class RayEngine:
    """The cluster that this process is connected to. `tasks` are the references of the tasks that
    are not over, `states` the states of all tasks, by cell."""

    name: start.EngineName = "ray"
    title = "Ray"
    poll_seconds = 0.2

    def __init__(
        self, store: Store, nodes: Sequence[RayNode], per_device: Mapping[str, float]
    ) -> None:
        self.store, self.nodes, self.per_device = store, nodes, per_device
        self.tasks: dict[str, Any] = {}
        self.states: dict[str, OrderState] = {}

    @property
    def gpus(self) -> bool:
        return has_gpus(self.nodes)

    def check(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._request(job.cell)
        if jobs:
            check_nodes(self.nodes, self.store)

    def _request(self, cell: Cell) -> TaskRequest:
        return task_request(cell, self.nodes, self.per_device)

    def queued(self, cells: Sequence[str]) -> dict[str, OrderState]:
        return {}  # Ray ends the tasks of a run with the run

    def submission_lock(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def submit(self, orders: Mapping[str, Order]) -> dict[str, OrderState]:
        import ray

        own_threads = os.environ.get("OMP_NUM_THREADS")
        for cell, order in orders.items():
            request = self._request(Cell.model_validate_json(order.cell))
            device, cores = request.device, int(request.resources.get("CPU", 0))
            cpus = cores if cores and device == "CPU" and not own_threads else None
            sent = RayOrder(
                order=dataclasses.replace(order, cpus=cpus),
                variables={"OMP_NUM_THREADS": own_threads},
                amount=request.resources[device],
                whole={node.node_id: node.resources.get(device, 0) for node in self.nodes},
            )
            remote = ray.remote(run_order).options(
                **request.options(), max_retries=0, name=f"tunebench {order.label}"
            )
            self.tasks[cell] = remote.remote(sent)
            self.states[cell] = OrderState("waiting", self.tasks[cell].task_id().hex())
        return {cell: self.states[cell] for cell in orders}

    def poll(self) -> Mapping[str, OrderState]:
        import ray

        cells = {reference: cell for cell, reference in self.tasks.items()}
        over, _ = ray.wait(list(cells), num_returns=len(cells), timeout=0) if cells else ([], [])
        for reference in over:
            cell = cells[reference]
            del self.tasks[cell]
            self.states[cell] = _over(reference, cell, self.states[cell].job)
        return self.states

    def cancel(self, cells: Sequence[str]) -> str:
        import ray

        for cell in cells:
            if cell in self.tasks:
                ray.cancel(self.tasks[cell], force=False)
        return ""

    def ending(self, cell: str) -> tuple[str, str]:
        why = self.states[cell].why or "its task left no finished record"
        return f"Ray: {why}", why


@contextlib.contextmanager
def ray_engine(
    results: Path, address: str | None, per_device: Mapping[str, float]
) -> Iterator[RayEngine]:
    """Connect to the cluster with its head node at an address (none: RAY_ADDRESS, else one on this
    machine). `per_device` are Ray's resources for a device that is no GPU. Raises UserError when it
    cannot connect."""
    with stop_signals(), connected(address):
        yield RayEngine(Store(results), living_nodes(), per_device)


def _over(reference: Any, cell: str, job: str) -> OrderState:
    """The state of a task that is over."""
    import ray

    try:
        answer = ray.get(reference)
    except ray.exceptions.TaskCancelledError:
        return OrderState("cancelled", job)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ProcessDied):
            return OrderState("died", job, why=_why(error.cause))
        return OrderState("ended", job, error=_broken(cell, error))
    except ray.exceptions.RayError as error:
        return OrderState("died", job, why=_why(error))
    if "error" in answer:
        return OrderState("ended", job, error=UserError(answer["error"]))
    if "broken" in answer:
        return OrderState("ended", job, error=_broken(cell, answer["broken"]))
    report = Report(**answer["report"])
    if report.directory is None:  # stopped before it began
        return OrderState("cancelled", job)
    return OrderState("ended", job, record=Path(report.directory).name)


def _broken(cell: str, cause: object) -> RuntimeError:
    return RuntimeError(f"{cell[:12]} broke on its node:\n{cause}")


def _why(error: Exception) -> str:
    """What died, in short."""
    from ray import exceptions

    if isinstance(error, exceptions.NodeDiedError):
        return "its node died"
    if isinstance(error, exceptions.OutOfMemoryError):
        return "Ray killed it as the node's memory ran out"
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"its process died ({lines[-1].strip() if lines else type(error).__name__})"
