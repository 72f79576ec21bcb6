"""Answer a request: prepare the process once, fork a child per distinct simulation."""

from __future__ import annotations

import gc
import json
import os
import selectors
import sys
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from harness.records.prediction import Engine, Prediction, Request, Verdict
from harness.simulate import patches
from harness.simulate.device import fake_cuda
from harness.simulate.device import self_check as check
from harness.simulate.libraries import missing_packages
from harness.system import fork_safety  # noqa: F401 - every child is put right
from harness.system.child_process import fork_to_answer, signal_text
from matrices.catalogue.gpus import Gpu
from matrices.catalogue.gpus import gpu as gpu_named
from matrices.cell import Cell, canonical_json
from matrices.errors import UserError

if TYPE_CHECKING:
    from harness.simulate.run import Simulated

DEFAULT_GPU = "a100-80gb"


@dataclass
class Setting:
    """What this process pretends to be, and what was noticed while preparing it."""

    engine: Engine
    gpu: Gpu | None
    judge: list[Gpu]
    notes: list[str] = field(default_factory=list)
    paged: Any = None


def serve(request_path: str, answers: IO[str]) -> None:
    warnings.filterwarnings("ignore")
    request = Request.model_validate_json(Path(request_path).read_text())
    setting = prepare(request)
    gc.collect()
    gc.freeze()
    groups: dict[str, list[int]] = {}
    for index, cell in enumerate(request.cells):
        groups.setdefault(simulation_key(cell), []).append(index)
    for indices, made in _simulate_all(request, setting, list(groups.values())):
        for index in indices:
            cell = request.cells[index]
            mine = made.model_copy(update={"cell": cell, "cell_id": cell.cell_id})
            line = {"index": index, "prediction": mine.model_dump(mode="json")}
            answers.write(json.dumps(line) + "\n")
        answers.flush()


def prepare(request: Request) -> Setting:
    """Choose the engine, import the stack, switch the patches on."""
    setting = _choose(request)
    on_cuda = setting.engine == "fake-cuda"
    patches.before_imports(setting.gpu if on_cuda else None)
    setting.notes += missing_packages.settle()
    import harness.simulate.run  # noqa: F401 - everything heavy, once for all children

    setting.paged = patches.after_imports()
    return setting


def _choose(request: Request) -> Setting:
    """Fake cuda if it can be had. Raises UserError when it was asked for and cannot."""
    gpu = request.gpu or next(iter(request.judge), None)
    if request.engine == "fake-cpu":
        return Setting("fake-cpu", gpu, request.judge)
    gpu = gpu or gpu_named(DEFAULT_GPU)
    reason = _unavailable(gpu, request.self_check)
    if reason is None:
        return Setting("fake-cuda", gpu, request.judge)
    if request.engine == "fake-cuda":
        raise UserError(f"the fake cuda device cannot be had here: {reason}")
    note = f"the fake cuda device cannot be had here ({reason}): simulated on fake CPU tensors"
    print(f"tunebench: note: {note}", file=sys.stderr)
    return Setting("fake-cpu", gpu, request.judge, [note])


def _unavailable(gpu: Gpu, self_check: bool) -> str | None:
    if self_check:
        return check.problem(gpu)
    try:
        fake_cuda.look()
    except fake_cuda.Unavailable as error:
        return str(error)
    return None


def simulation_key(cell: Cell) -> str:
    """Cells with equal keys allocate alike: what only changes values or scores is put aside."""
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
    request: Request, setting: Setting, groups: list[list[int]]
) -> Iterator[tuple[list[int], Prediction]]:
    """One fork per group, `request.workers` at a time; answers as they come."""
    waiting = list(reversed(groups))
    with selectors.DefaultSelector() as running:
        active: dict[int, _Child] = {}
        while waiting or active:
            while waiting and len(active) < max(1, request.workers):
                child = _Child.start(request.cells[waiting[-1][0]], setting, waiting.pop())
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
    """A forked simulation and what it has written so far."""

    pid: int
    pipe: int
    indices: list[int]
    said: bytes = b""

    @classmethod
    def start(cls, cell: Cell, setting: Setting, indices: list[int]) -> _Child:
        def answer() -> str:
            # Trainers print their last metrics, which are no figures here.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return _answer(cell, setting).model_dump_json()

        return cls(*fork_to_answer(answer), indices)

    def read(self) -> bool:
        """Take what is there; False at the end."""
        part = os.read(self.pipe, 1 << 20)
        self.said += part
        return bool(part)

    def answer(self, cell: Cell) -> Prediction:
        from harness.simulate.make_prediction import refused

        os.close(self.pipe)
        _, status = os.waitpid(self.pid, 0)
        if os.WIFSIGNALED(status):
            how = signal_text(os.WTERMSIG(status))
            return refused(cell, "failed", f"the simulating process died of {how}")
        if not self.said:
            return refused(cell, "failed", "the simulating process ended without an answer")
        return Prediction.model_validate_json(self.said)


def _verdicts(cell: Cell, setting: Setting, found: Simulated) -> list[Verdict]:
    """Of every GPU asked about. One with other kernels or workspaces than the simulated GPU's is
    simulated too; the rest differ in room alone."""
    from harness.simulate import make_prediction, run

    simulated = {run.kind(setting.gpu): found} if setting.gpu is not None else {}
    made = []
    for gpu in setting.judge:
        if run.kind(gpu) not in simulated:
            on_cuda = setting.engine == "fake-cuda"
            if on_cuda:
                patches.become(gpu)
            simulated[run.kind(gpu)] = run.simulate(cell, gpu, on_cuda, setting.paged)
        made.append(make_prediction.verdict(simulated[run.kind(gpu)], gpu))
    return made


def _answer(cell: Cell, setting: Setting) -> Prediction:
    """Simulate in this (forked) process. Mistakes of the user's and failures become answers."""
    from harness.simulate import make_prediction
    from harness.simulate.run import simulate

    on_cuda = setting.engine == "fake-cuda"
    try:
        found = simulate(cell, setting.gpu, on_cuda, setting.paged)
        made = make_prediction.prediction(
            cell, found, setting.engine, setting.gpu, missing_packages.versions()
        )
        made.verdicts = _verdicts(cell, setting, found)
    except UserError as error:
        return make_prediction.refused(cell, "invalid", str(error), missing_packages.versions())
    except Exception as error:
        # A library that cannot do it on fake tensors: the answer says so, the log has the rest.
        traceback.print_exc()
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return make_prediction.refused(cell, "failed", reason, missing_packages.versions())
    made.assumptions += setting.notes
    return made
