"""What runs on the nodes of a Ray cluster: one cell at a time, in a process beside Ray's worker.

Ray's worker is full of threads, handles signals in its own way and has a main module of its own, so
nothing is forked from it. The process beside it lives as long as the worker does, and the stack is
imported once for all of their cells. They speak in lines of JSON.
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
# The line that has the cell of the question before it stopped, as Ctrl-C does in `tunebench run`.
STOP = {"stop": True}


@dataclasses.dataclass(frozen=True)
class RayOrder:
    """An order as it is sent to a Ray worker.

    `variables` are set in the environment of the cell, or taken away where none. `amount` is how
    much the order is given of the resource that counts devices, and `whole` how much of it a node
    has, by the node's id.
    """

    order: Order
    variables: Mapping[str, str | None]
    amount: float
    whole: Mapping[str, float]


class ProcessDied(Exception):
    """The process beside Ray's worker is gone; whatever it was measuring can be repeated."""


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
        """The answer to a question. Once `cancelled`, the process is told to stop, and the answer
        says what became of the cell. Raises ProcessDied."""
        assert self.popen.stdout is not None
        self._send(question)
        received, told = b"", False
        while not received.endswith(b"\n"):
            if cancelled.received and not told:
                self._send(STOP)
                told = True
            # A signal does not end a system call, so none may take long.
            if not select.select([self.popen.stdout], [], [], POLL_SECONDS)[0]:
                continue
            some = self.popen.stdout.read(65536)
            if not some:
                raise self._died()
            received += some
        plain: dict[str, Any] = json.loads(received)
        return plain

    def _send(self, line: Mapping[str, Any]) -> None:
        assert self.popen.stdin is not None
        try:
            self.popen.stdin.write(json.dumps(line).encode() + b"\n")
        except BrokenPipeError as error:
            raise self._died() from error

    def close(self) -> None:
        """It ends when its input does."""
        assert self.popen.stdin is not None
        self.popen.stdin.close()

    def _died(self) -> ProcessDied:
        return ProcessDied(f"the process that ran the cell ended with code {self.popen.wait()}")


_processes: list[CellProcess] = []


def run_order(sent: RayOrder) -> dict[str, Any]:
    """The Ray task: `report`, or the `error` of a user, or what is `broken`. Ray's cancel asks the
    cell to stop, and its report tells what became of it. Raises ProcessDied."""
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
    # Ray cancels a task by a KeyboardInterrupt at any place of its main thread, which is Python's
    # handler of SIGINT. Before this block nothing has been ordered; in it the handler is another.
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
class Seen:
    """A node as a task on it sees it. `token` is what the file that was asked for holds."""

    host: str
    token: str | None
    python: str
    packages: Mapping[str, str]


def look_around(path: str) -> Seen:
    """The Ray task that says whether a node sees a file, and which software it has."""
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
    return Seen(socket.gethostname(), token, stack.python, packages)


def main() -> None:
    """Take orders from standard input until it ends, and answer each on standard output."""
    # Ray starts what belongs to it with Ctrl-C blocked.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    # What libraries print is for the log.
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
    # Ray's worker is gone: a cell that is being measured writes down what it has.
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
