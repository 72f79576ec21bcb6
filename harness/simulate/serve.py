"""Answer requests for predictions: import and patch the stack, then fork for each simulation."""

from __future__ import annotations

import gc
import json
import os
import selectors
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

from harness.records.prediction import Prediction, PredictionEngine, Request, Verdict
from harness.simulate import patches
from harness.simulate.device import fake_cuda
from harness.simulate.device import self_check as check
from harness.simulate.libraries import missing_packages
from harness.system import fork_safety  # noqa: F401 - every child is put right
from harness.system.child_process import fork_to_answer, signal_text
from matrices.catalogue import models
from matrices.catalogue.gpus import Gpu
from matrices.catalogue.gpus import gpu as gpu_named
from matrices.cell import Cell, canonical_json
from matrices.errors import UserError

if TYPE_CHECKING:
    from harness.simulate.run import Simulation

DEFAULT_GPU = "a100-80gb"


@dataclass
class SimulationTarget:
    """How this process simulates: the engine, the GPU torch is told of, the GPUs to give verdicts
    for, and notes from the preparation. `paged` counts managed memory."""

    engine: PredictionEngine
    gpu: Gpu | None
    judge: list[Gpu]
    notes: list[str] = field(default_factory=list)
    paged: Any = None


def serve(requests: Iterable[str], answers: IO[str]) -> None:
    """Answer every request, as lines with the index of a cell and its prediction. The first request
    decides how this process simulates. Raises UserError for a later one that wants otherwise."""
    warnings.filterwarnings("ignore")
    target = None
    for text in requests:
        request = Request.model_validate_json(text)
        if target is None:
            first, target = request, prepare(request)
            gc.collect()
            gc.freeze()
        if _settings(request) != _settings(first):
            raise UserError("one process answers requests with equal settings only")
        _answer_all(request, target, answers)


def _settings(request: Request) -> Request:
    return request.model_copy(update={"cells": [], "workers": 1})


def _answer_all(request: Request, target: SimulationTarget, answers: IO[str]) -> None:
    groups: dict[str, list[int]] = {}
    for index, cell in enumerate(request.cells):
        groups.setdefault(simulation_key(cell), []).append(index)
    for indices, made in _simulate_all(request, target, list(groups.values())):
        for index in indices:
            cell = request.cells[index]
            mine = made.model_copy(update={"cell": cell, "cell_id": cell.cell_id})
            line = {"index": index, "prediction": mine.model_dump(mode="json")}
            answers.write(json.dumps(line) + "\n")
        answers.flush()


def prepare(request: Request) -> SimulationTarget:
    """Choose the engine, import the stack, apply the patches."""
    target = _choose(request)
    on_cuda = target.engine == "fake-cuda"
    patches.before_imports(target.gpu if on_cuda else None)
    target.notes += missing_packages.replace_missing()
    import harness.simulate.run  # noqa: F401 - everything heavy, once for all children

    target.paged = patches.after_imports()
    models.architectures()
    patches.fill_conversion_cache()
    return target


def _choose(request: Request) -> SimulationTarget:
    """The fake cuda device if it works here, else fake CPU tensors. Raises UserError if the request
    insists on fake cuda."""
    gpu = request.gpu or next(iter(request.judge), None)
    if request.engine == "fake-cpu":
        return SimulationTarget("fake-cpu", gpu, request.judge)
    gpu = gpu or gpu_named(DEFAULT_GPU)
    reason = _unavailable(gpu, request.self_check)
    if reason is None:
        return SimulationTarget("fake-cuda", gpu, request.judge)
    if request.engine == "fake-cuda":
        raise UserError(f"the fake cuda device cannot be had here: {reason}")
    note = f"the fake cuda device cannot be had here ({reason}): simulated on fake CPU tensors"
    print(f"tunebench: note: {note}", file=sys.stderr)
    return SimulationTarget("fake-cpu", gpu, request.judge, [note])


def _unavailable(gpu: Gpu, self_check: bool) -> str | None:
    if self_check:
        return check.problem(gpu)
    try:
        fake_cuda.look()
    except fake_cuda.Unavailable as error:
        return str(error)
    return None


def simulation_key(cell: Cell) -> str:
    """Cells with equal keys allocate alike: settings that only change values or scores are left
    out."""
    plain = cell.model_copy(update={"evaluate": type(cell.evaluate)(), "seed": 0})
    if plain.train is not None:
        still = {
            name: type(plain.train).model_fields[name].get_default()
            for name in (
                "steps",
                "warmup_steps",
                "timing_warmup_steps",
                "learning_rate",
                "lr_scheduler_type",
            )
        }
        plain = plain.model_copy(update={"train": plain.train.model_copy(update=still)})
    if plain.data is not None:
        kept = ("max_length", "packing", "packing_strategy")
        data = type(plain.data)(**{name: getattr(plain.data, name) for name in kept})
        plain = plain.model_copy(update={"data": data})
    if plain.adapter is not None and plain.adapter.alpha is not None:
        plain = plain.model_copy(update={"adapter": plain.adapter.model_copy(update={"alpha": 1})})
    return canonical_json(plain)


def _simulate_all(
    request: Request, target: SimulationTarget, groups: list[list[int]]
) -> Iterator[tuple[list[int], Prediction]]:
    """Simulate each group in a fork, `request.workers` at a time; yields answers as they arrive."""
    waiting = list(reversed(groups))
    with selectors.DefaultSelector() as running:
        active: dict[int, _Child] = {}
        while waiting or active:
            while waiting and len(active) < max(1, request.workers):
                child = _Child.start(request.cells[waiting[-1][0]], target, waiting.pop())
                active[child.pipe] = child
                running.register(child.pipe, selectors.EVENT_READ)
            for key, _ in running.select():
                child = active[key.fd]
                if child.read():
                    continue
                running.unregister(key.fd)
                del active[key.fd]
                yield child.indices, child.answer(request.cells[child.indices[0]])


@dataclass
class _Child:
    """A forked simulation and its output so far."""

    pid: int
    pipe: int
    indices: list[int]
    output: bytes = b""

    @classmethod
    def start(cls, cell: Cell, target: SimulationTarget, indices: list[int]) -> _Child:
        def answer() -> str:
            # Trainers print their last metrics, which are no figures here.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return _answer(cell, target).model_dump_json()

        return cls(*fork_to_answer(answer), indices)

    def read(self) -> bool:
        """Read what is available; False at the end of the output."""
        part = os.read(self.pipe, 1 << 20)
        self.output += part
        return bool(part)

    def answer(self, cell: Cell) -> Prediction:
        from harness.simulate.make_prediction import refused

        os.close(self.pipe)
        _, status = os.waitpid(self.pid, 0)
        if os.WIFSIGNALED(status):
            how = signal_text(os.WTERMSIG(status))
            return refused(cell, "failed", f"the simulating process died of {how}")
        if not self.output:
            return refused(cell, "failed", "the simulating process ended without an answer")
        return Prediction.model_validate_json(self.output)


def _verdicts(cell: Cell, target: SimulationTarget, found: Simulation) -> list[Verdict]:
    """A verdict for every GPU of the request. A GPU with other kernels or workspaces needs a
    simulation of its own (run.kind); the others only have another capacity."""
    from harness.simulate import make_prediction, run

    simulated = {run.kind(target.gpu): found} if target.gpu is not None else {}
    made = []
    for gpu in target.judge:
        if run.kind(gpu) not in simulated:
            on_cuda = target.engine == "fake-cuda"
            if on_cuda:
                patches.switch_gpu(gpu)
            simulated[run.kind(gpu)] = run.simulate(cell, gpu, on_cuda, target.paged)
        made.append(make_prediction.verdict(simulated[run.kind(gpu)], gpu))
    return made


def _answer(cell: Cell, target: SimulationTarget) -> Prediction:
    """Simulate in this (forked) process. User errors and failures become answers too."""
    from harness.simulate import make_prediction
    from harness.simulate.run import simulate

    on_cuda = target.engine == "fake-cuda"
    try:
        found = simulate(cell, target.gpu, on_cuda, target.paged)
        made = make_prediction.prediction(
            cell, found, target.engine, target.gpu, missing_packages.versions()
        )
        made.verdicts = _verdicts(cell, target, found)
    except UserError as error:
        return make_prediction.refused(cell, "invalid", str(error), missing_packages.versions())
    except Exception as error:
        # A library fails on fake tensors: the answer has the first line, standard error the rest.
        traceback.print_exc()
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return make_prediction.refused(cell, "failed", reason, missing_packages.versions())
    made.assumptions += target.notes
    return made
