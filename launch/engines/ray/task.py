"""The Ray task: it runs one cell at a time, in a child process of Ray's worker.

Ray's worker has threads, signal handlers and a main module of its own, so it cannot fork workers.
The child process lives as long as the worker, and imports the stack once for all cells. The two
exchange lines of JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.records import provenance
from launch.engines.order import Order, Report, run_cell
from launch.processes.stop_signals import STOP_SIGNALS, Signals, Stopped, stop_signals
from matrices.cell import Cell
from matrices.errors import UserError

POLL_SECONDS = 0.2
# This line stops the running cell, as Ctrl-C does in `tunebench run`.
STOP = {"stop": True}


@dataclasses.dataclass(frozen=True)
class RayOrder:
    """An order as sent to a Ray worker.

    `variables` are set in the environment of the cell, or removed where none. `amount` is the
    order's amount of the resource that counts devices, and `whole` a node's, by the node's id.
    """

    order: Order
    variables: Mapping[str, str | None]
    amount: float
    whole: Mapping[str, float]


class ProcessDied(Exception):
    """The child process of Ray's worker has ended; its cell can start again."""


class CellProcess:
    """The process that runs the cells of this Ray worker."""

    def __init__(self) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "launch.engines.ray.task"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env=os.environ | {"PYTHONSAFEPATH": "1"},
            bufsize=0,
        )

    def ask(self, question: Mapping[str, Any], cancelled: Signals) -> dict[str, Any]:
        """The answer to a question. After `cancelled` received a signal, the process stops its cell
        and answers with the report. Raises ProcessDied."""
        assert self.popen.stdout is not None
        self._send(question)
        received, stopping = b"", False
        while not received.endswith(b"\n"):
            if cancelled.received and not stopping:
                self._send(STOP)
                stopping = True
            # Short, because a signal does not end a system call.
            if not select.select([self.popen.stdout], [], [], POLL_SECONDS)[0]:
                continue
            chunk = self.popen.stdout.read(65536)
            if not chunk:
                raise self._died()
            received += chunk
        plain: dict[str, Any] = json.loads(received)
        return plain

    def _send(self, line: Mapping[str, Any]) -> None:
        assert self.popen.stdin is not None
        try:
            self.popen.stdin.write(json.dumps(line).encode() + b"\n")
        except BrokenPipeError as error:
            raise self._died() from error

    def close(self) -> None:
        """The process ends when its input ends."""
        assert self.popen.stdin is not None
        self.popen.stdin.close()

    def _died(self) -> ProcessDied:
        return ProcessDied(f"the process that ran the cell ended with code {self.popen.wait()}")


_processes: list[CellProcess] = []


def run_order(sent: RayOrder) -> dict[str, Any]:
    """The Ray task: gives `report`, or the user's `error`, or the traceback of what is `broken`.
    Ray's cancel stops the cell, which still gives its report. Raises ProcessDied."""
    import ray

    context = ray.get_runtime_context()
    order = dataclasses.replace(
        sent.order,
        job=context.get_task_id(),
        exclusive=sent.whole.get(context.get_node_id()) == sent.amount,
    )
    # Ray gives this worker other devices with each task.
    devices = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES")}
    question = {
        "order": dataclasses.asdict(order),
        "variables": {**sent.variables, **devices},
    }
    # Ray cancels a task with SIGINT, by default a KeyboardInterrupt anywhere. In this block the
    # signal is only noted; before it nothing was ordered.
    with stop_signals((signal.SIGINT,), raising=False) as cancelled:
        if not _processes:
            _processes.append(CellProcess())
        process, answer = _processes[0], None
        try:
            answer = process.ask(question, cancelled)
        finally:
            if answer is None or cancelled.received:
                _processes.clear()
                process.close()
    return answer


@dataclasses.dataclass(frozen=True)
class NodeSoftware:
    """The software of a node. `token` is the content of the file that it was to read."""

    token: str | None
    python: str
    packages: Mapping[str, str]


def inspect_node(path: str) -> NodeSoftware:
    """The Ray task that reads a file and the versions of a node's software."""
    stack = provenance.stack()
    try:
        token = Path(path).read_text()
    except OSError:
        token = None
    packages = {
        name: stack.packages[name]
        for name in provenance.MEASURED_PACKAGES
        if name in stack.packages
    }
    return NodeSoftware(token, stack.python, packages)


def main() -> None:
    """Read orders from standard input until it ends, and write an answer to standard output."""
    # Ray starts its processes with Ctrl-C blocked.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    # Libraries print to the log.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    questions: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    with stop_signals(raising=False) as signals:
        threading.Thread(target=_listen, args=(questions,), daemon=True).start()
        while (question := questions.get()) is not None:
            answer = _answer(question, signals)
            try:
                answers.write(json.dumps(answer) + "\n")
                answers.flush()
            except BrokenPipeError:
                return


def _listen(questions: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    for line in sys.stdin:
        question = json.loads(line)
        if question == STOP:
            os.kill(os.getpid(), signal.SIGINT)
        else:
            questions.put(question)
    # Ray's worker has ended: stop the cell, which writes its record.
    questions.put(None)
    os.kill(os.getpid(), signal.SIGTERM)


def _answer(question: Mapping[str, Any], signals: Signals) -> dict[str, Any]:
    order = Order(**question["order"])
    for name, value in question["variables"].items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    try:
        signals.raising = True
        if signals.received:
            raise Stopped(signals.received[0])
        return {"report": run_cell(order).as_json()}
    except Stopped as stopped:
        cell = Cell.model_validate_json(order.cell)
        report = Report(cell.cell_id, socket.gethostname(), stopped_by=stopped.number)
        return {"report": report.as_json()}
    except UserError as error:
        return {"error": f"{socket.gethostname()}: {error}"}
    except Exception:
        return {"broken": traceback.format_exc()}
    finally:
        signals.raising = False


if __name__ == "__main__":
    main()
