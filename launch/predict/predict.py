"""Predictions of cells: refused, read from the cache, or simulated in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import get_args

from harness.records import provenance
from harness.records.prediction import Prediction, PredictionEngine, Request
from harness.system.platforms import prediction_obstacle
from launch.display.progress import Display
from launch.predict.cache import PredictionCache
from launch.predict.overlays import Overlay
from launch.predict.simulator_process import Simulator
from matrices.catalogue.gpus import Gpu
from matrices.cell import Cell
from matrices.errors import UserError, nearest
from matrices.rules import passed_through
from matrices.rules.verdicts import prediction_refusals

SIMULATE = "harness.simulate"
TRAINS_NOTHING = "trains nothing: a base model is only loaded and scored"


@dataclass(frozen=True)
class PredictionOptions:
    """How to predict. `gpu` is the GPU that the libraries see (None: an A100-80GB), `judge` are the
    GPUs to give verdicts for. `fresh` ignores the cache."""

    gpu: Gpu | None = None
    judge: tuple[Gpu, ...] = ()
    overlay: Overlay = field(default_factory=Overlay)
    engine: PredictionEngine | None = None
    self_check: bool = True
    workers: int | None = None
    fresh: bool = False


# Gives a prediction for every cell, in their order.
Predict = Callable[[Sequence[Cell]], list[Prediction]]


def predict(
    cells: Sequence[Cell], options: PredictionOptions, display: Display
) -> list[Prediction]:
    """A prediction for every cell, in their order. One that could not be made gives the reason.

    Takes 10 s for the imports and seconds for each cell that is not in the cache. Raises nothing
    for a cell with a problem: its prediction says so.
    """
    with predictor(options, display) as predict_cells:
        return predict_cells(cells)


@contextmanager
def predictor(options: PredictionOptions, display: Display) -> Iterator[Predict]:
    """`predict` to be called several times: the simulating process is started once, at need, and
    ends with the context."""
    with Simulator(SIMULATE, options.overlay.directories) as simulator:
        yield lambda cells: _predict(cells, options, display, simulator)


def _predict(
    cells: Sequence[Cell], options: PredictionOptions, display: Display, simulator: Simulator
) -> list[Prediction]:
    refused = {cell.cell_id: reason for cell in cells if (reason := refusal(cell, options.gpu))}
    if not options.overlay.directories:
        # Other releases may have other arguments.
        refused |= {cell.cell_id: reason for cell in cells if (reason := _mistakes(cell))}
    wanted = {cell.cell_id: cell for cell in cells if cell.cell_id not in refused}
    request = _request(list(wanted.values()), options)
    cache = PredictionCache(request, options.overlay.identity())
    found: dict[str, Prediction] = {}
    if not options.fresh:
        found = {i: known for i, cell in wanted.items() if (known := cache.get(cell))}
    missing = [cell for cell_id, cell in wanted.items() if cell_id not in found]
    if missing:
        made = _simulate(_request(missing, options), simulator, display)
        for prediction in made.values():
            cache.put(prediction)
        found |= made
    for cell in cells:
        if cell.cell_id in refused:
            found[cell.cell_id] = unpredicted(cell, "invalid", refused[cell.cell_id])
    return [found[cell.cell_id] for cell in cells]


def checked_engine(name: str | None) -> PredictionEngine | None:
    """Raises UserError for an unknown engine."""
    for engine in get_args(PredictionEngine):
        if name == engine:
            return engine  # type: ignore[no-any-return]
    if name is None:
        return None
    raise UserError(
        f"no such engine{nearest(name, get_args(PredictionEngine))}; there are "
        f"{' and '.join(get_args(PredictionEngine))}",
        where=f"--engine {name}",
    )


def refusal(cell: Cell, gpu: Gpu | None) -> str:
    """Why a cell is not simulated on a GPU; empty when it is."""
    if cell.method == "base":
        return TRAINS_NOTHING
    return "; ".join(f"{each.rule}: {each.reason}" for each in prediction_refusals(cell, gpu))


def _mistakes(cell: Cell) -> str:
    """Arguments that the installed libraries refuse."""
    return "; ".join(
        str(error)
        for class_name, arguments in passed_through.given(cell)
        for error in passed_through.mistakes(class_name, arguments)
    )


def _request(cells: list[Cell], options: PredictionOptions) -> Request:
    workers = options.workers or min(provenance.usable_cpus(), max(1, len(cells)))
    return Request(
        cells=cells,
        gpu=options.gpu,
        judge=list(options.judge),
        engine=options.engine,
        self_check=options.self_check,
        workers=workers,
    )


def _simulate(request: Request, simulator: Simulator, display: Display) -> Mapping[str, Prediction]:
    if reason := prediction_obstacle():
        return {cell.cell_id: unpredicted(cell, "failed", reason) for cell in request.cells}
    found: dict[str, Prediction] = {}
    doing = "simulating" if simulator.started else "importing the stack"
    with display.predicting(len(request.cells), doing) as predicted:
        for index, prediction in simulator.answers(request):
            found[request.cells[index].cell_id] = prediction
            predicted(prediction)
    reason = simulator.ended or "the simulating process gave no answer for this cell"
    return {
        cell.cell_id: found.get(cell.cell_id) or unpredicted(cell, "failed", reason)
        for cell in request.cells
    }


def unpredicted(cell: Cell, status: str, reason: str) -> Prediction:
    """The prediction of a cell that was not simulated."""
    return Prediction.model_validate(
        {"cell_id": cell.cell_id, "cell": cell, "stack": {}, "status": status, "reason": reason}
    )
