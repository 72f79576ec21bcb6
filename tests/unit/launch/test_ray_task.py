"""Ray cancels a task by a KeyboardInterrupt at any moment: the process beside its worker, which is
a real one here, is told to stop whenever that is, and never left to measure alone."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.records.reading import read_record
from launch.engines.order import Order
from launch.engines.ray import task
from launch.engines.ray.task import CellProcess, RayOrder, run_order
from matrices.cell import Cell

DEADLINE_SECONDS = 60.0
started: list[CellProcess] = []


class Recorded(CellProcess):
    def __init__(self) -> None:
        super().__init__()
        started.append(self)


class InterruptedAtStart(Recorded):
    def __init__(self) -> None:
        super().__init__()
        signal.raise_signal(signal.SIGINT)


class InterruptedAtOrder(Recorded):
    def _send(self, line: Mapping[str, Any]) -> None:
        super()._send(line)
        if line != task.STOP:
            signal.raise_signal(signal.SIGINT)


class InterruptedLater(Recorded):
    def _send(self, line: Mapping[str, Any]) -> None:
        super()._send(line)
        if line != task.STOP:
            # The process has by then begun to import, or to take up the order.
            threading.Timer(1.0, signal.raise_signal, [signal.SIGINT]).start()


@pytest.fixture(autouse=True)
def worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process as Ray's worker."""
    context = SimpleNamespace(get_task_id=lambda: "t1", get_node_id=lambda: "n1")
    ray = SimpleNamespace(get_runtime_context=lambda: context)
    monkeypatch.setitem(sys.modules, "ray", ray)  # type: ignore[arg-type]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    started.clear()


def ray_order(results: Path) -> RayOrder:
    order = Order(str(results), Cell(method="base").model_dump_json(), "ray", predict=False)
    return RayOrder(order, {}, 1.0, {"n1": 1.0})


@pytest.mark.parametrize("kind", [InterruptedAtStart, InterruptedAtOrder, InterruptedLater])
def test_the_process_beside_is_stopped_whenever_the_interrupt_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[CellProcess]
) -> None:
    monkeypatch.setattr(task, "CellProcess", kind)
    answer = run_order(ray_order(tmp_path))
    assert answer["report"]["stopped_by"] == signal.SIGINT
    [process] = started
    assert process.popen.wait(DEADLINE_SECONDS) == 0
    records = [read_record(path) for path in tmp_path.glob("*/record.json")]
    if kind is InterruptedLater and records:  # a quick machine has begun the cell in that second
        assert [record.status for record in records] == ["interrupted"]
    else:
        assert records == []
        assert answer["report"]["directory"] is None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_before_the_order_an_interrupt_ends_the_task_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task, "CellProcess", Recorded)
    monkeypatch.setattr(
        sys.modules["ray"], "get_runtime_context", lambda: signal.raise_signal(signal.SIGINT)
    )
    with pytest.raises(KeyboardInterrupt):
        run_order(ray_order(tmp_path))
    assert started == []
