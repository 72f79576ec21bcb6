"""An engine without machines: each poll runs one order in this process.

For tests of the loop, and for a debugger: `tunebench run --on debug`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from harness.records import provenance
from launch.cells import start
from launch.engines.engine import OrderState
from launch.engines.order import Order, Report, run_cell
from launch.planning.plan import Job
from matrices.errors import UserError


class MachineDied(Exception):
    """A test's `run` raises this: the machine of the cell is gone."""


class DebugEngine:
    """Runs orders with `run`, by default the function that runs them on a node."""

    name: start.EngineName = "local"
    title = "debug"
    poll_seconds = 0.0

    def __init__(self, run: Callable[[Order], Report] = run_cell) -> None:
        self.run = run
        self.orders: dict[str, Order] = {}
        self.states: dict[str, OrderState] = {}

    @property
    def gpus(self) -> bool:
        return provenance.uses_gpu_here()

    def check(self, jobs: Sequence[Job]) -> None:
        """Does nothing: the rules are checked when the order runs."""

    def queued(self, cells: Sequence[str]) -> dict[str, OrderState]:
        return {}

    def submission_lock(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def submit(self, orders: Mapping[str, Order]) -> dict[str, OrderState]:
        self.orders |= orders
        self.states |= {cell: OrderState("waiting") for cell in orders}
        return {cell: self.states[cell] for cell in orders}

    def poll(self) -> Mapping[str, OrderState]:
        waiting = [cell for cell, state in self.states.items() if not state.over]
        for cell in waiting[:1]:
            self.states[cell] = self._run(self.orders[cell])
        return self.states

    def _run(self, order: Order) -> OrderState:
        try:
            report = self.run(order)
        except MachineDied as died:
            return OrderState("died", why=str(died))
        except UserError as error:
            return OrderState("ended", error=error)
        if report.stopped_by is not None:
            # The order has caught the signal in place of the loop.
            os.kill(os.getpid(), report.stopped_by)
        if report.directory is None:
            return OrderState("cancelled")
        return OrderState("ended", record=Path(report.directory).name)

    def cancel(self, cells: Sequence[str]) -> str:
        for cell in cells:
            if not self.states[cell].over:
                self.states[cell] = OrderState("cancelled")
        return ""

    def ending(self, cell: str) -> tuple[str, str]:
        why = self.states[cell].why or "it left no finished record"
        return f"debug: {why}", why
