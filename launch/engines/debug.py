"""An engine without machines: orders run in this process, one for each time that it is polled.

For tests of the loop, and for following an order with a debugger from here to its worker
(`tunebench run --on debug`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from harness.records import provenance
from launch.cells import start
from launch.engines.engine import State
from launch.engines.order import Order, Report, run_cell
from launch.planning.plan import Job
from matrices.errors import UserError


class MachineDied(Exception):
    """What `run` raises in a test to say that the machine of the cell is gone."""


class DebugEngine:
    """Runs orders with `run`, which is what runs them on a node."""

    name: start.Engine = "local"
    title = "debug"
    poll_seconds = 0.0

    def __init__(self, run: Callable[[Order], Report] = run_cell) -> None:
        self.run = run
        self.orders: dict[str, Order] = {}
        self.states: dict[str, State] = {}

    @property
    def gpus(self) -> bool:
        return provenance.uses_gpu_here()

    def check(self, jobs: Sequence[Job]) -> None:
        """This machine's rules hold on it again when it runs the order."""

    def queued(self, cells: Sequence[str]) -> dict[str, State]:
        return {}

    def adding(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def submit(self, orders: Mapping[str, Order]) -> dict[str, State]:
        self.orders |= orders
        self.states |= {cell: State("waiting") for cell in orders}
        return {cell: self.states[cell] for cell in orders}

    def poll(self) -> Mapping[str, State]:
        waiting = [cell for cell, state in self.states.items() if not state.over]
        for cell in waiting[:1]:
            self.states[cell] = self._run(self.orders[cell])
        return self.states

    def _run(self, order: Order) -> State:
        try:
            report = self.run(order)
        except MachineDied as died:
            return State("died", why=str(died))
        except UserError as error:
            return State("ended", error=error)
        if report.stopped_by is not None:
            # The order has listened to it in place of the loop.
            os.kill(os.getpid(), report.stopped_by)
        if report.directory is None:
            return State("cancelled")
        return State("ended", record=Path(report.directory).name)

    def cancel(self, cells: Sequence[str]) -> str:
        for cell in cells:
            if not self.states[cell].over:
                self.states[cell] = State("cancelled")
        return ""

    def ending(self, cell: str) -> tuple[str, str]:
        told = self.states[cell].why or "it left no finished record"
        return f"debug: {told}", told
