"""Which methods fit on a GPU, at which batch and length, what takes the memory, and what would
help."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from harness.records.prediction import Prediction
from launch.fit.memory_savings import MemorySaving, memory_savings
from launch.fit.search import Search, first_verdict, fits, search_all
from launch.predict.predict import Predict
from matrices.catalogue import models
from matrices.catalogue.gpus import Gpu
from matrices.cell import Cell, Parallelism
from matrices.errors import UserError, nearest
from matrices.expand import expand
from matrices.load import load
from matrices.parallelism import STRATEGIES
from matrices.rules.adapt import spread_over

METHODS = ("full", "lora", "qlora")
SHARED: tuple[Parallelism, ...] = ("ddp", "fsdp", "zero2", "zero3")
DEFAULT_LENGTH = 2048
# For a model that does not limit its positions, or whose limit is not known.
LONGEST_LENGTH = 131_072
LARGEST_BATCH = 1024
LENGTH_UNIT = 256


@dataclass(frozen=True)
class FitRequest:
    """What `tunebench fit` searches. `longest`: also search the longest sequence at micro batch 1;
    None means only with one GPU."""

    model: str
    gpu: Gpu
    count: int = 1
    max_length: int | None = None
    methods: tuple[str, ...] = METHODS
    parallelism: tuple[Parallelism, ...] = ()
    overrides: tuple[str, ...] = ()
    longest: bool | None = None


@dataclass(frozen=True)
class FitRow:
    """The result for one method and one kind of parallelism. `shown` is the prediction of the
    figures: of the largest cell that fits, or of the smallest when none fits."""

    cell: Cell
    micro_batch: int | None
    longest: int | None
    shown: Prediction
    batch_capped: bool = False
    length_capped: bool = False
    lengths_tried: bool = False

    @property
    def possible(self) -> bool:
        return self.shown.status == "predicted"

    @property
    def binds(self) -> tuple[str, str] | None:
        """The largest category at the peak, and the phase of the peak."""
        memory = self.shown.memory
        if not memory.by_category or memory.peak_phase is None:
            return None
        return max(memory.by_category, key=lambda name: memory.by_category[name]), memory.peak_phase


@dataclass(frozen=True)
class FitResult:
    request: FitRequest
    max_length: int
    rows: list[FitRow]
    savings: list[MemorySaving] = field(default_factory=list)

    @property
    def predictions(self) -> list[Prediction]:
        return [row.shown for row in self.rows]


def fit(request: FitRequest, predict: Predict) -> FitResult:
    """Search for every method and kind of parallelism. Raises UserError for an unknown model and
    for settings that contradict each other."""
    settings = model_settings(request.model)
    limit = positions(settings)
    length = request.max_length or min(DEFAULT_LENGTH, limit or DEFAULT_LENGTH)
    cells = templates(settings, length, request.overrides)
    spread = spread_cells(cells, request)
    batches = [_batch_search(cell) for cell in spread]
    longest = request.longest if request.longest is not None else request.count == 1
    lengths = [_length_search(cell, length, limit) for cell in spread] if longest else []
    search_all([*batches, *lengths], predict)
    rows = [
        _row(cell, batch, lengths[place] if lengths else None)
        for place, (cell, batch) in enumerate(zip(spread, batches, strict=True))
    ]
    _refuse_unknown(rows, request.model)
    if any(row.micro_batch for row in rows) or not any(row.possible for row in rows):
        return FitResult(request, length, rows)
    start = cells["lora" if "lora" in request.methods else request.methods[0]]
    savings = memory_savings(start, cells["qlora"], request.count, predict)
    return FitResult(request, length, rows, savings)


def checked_methods(names: Sequence[str]) -> tuple[str, ...]:
    """The methods of repeated or comma-separated options; all methods without an option. Raises
    UserError."""
    wanted = [part.strip() for name in names for part in name.split(",") if part.strip()]
    for name in wanted:
        if name not in METHODS:
            raise UserError(
                f"no such method{nearest(name, METHODS)}; there are {', '.join(METHODS)}",
                where=f"--method {name}",
            )
    return tuple(dict.fromkeys(wanted)) or METHODS


def checked_parallelism(names: Sequence[str], count: int) -> tuple[Parallelism, ...]:
    """Kinds of parallelism, of repeated or comma-separated options. Raises UserError."""
    known = [name for name, each in STRATEGIES.items() if each.several_devices == (count > 1)]
    wanted = [part.strip() for name in names for part in name.split(",") if part.strip()]
    for name in wanted:
        if name not in known:
            raise UserError(
                f"is no way to spread a cell over {count} GPU{'s' if count > 1 else ''}"
                f"{nearest(name, known)}; there are {', '.join(known)}",
                where=f"--parallelism {name}",
            )
    return tuple(dict.fromkeys(wanted))  # type: ignore[arg-type]


def model_settings(name: str) -> dict[str, str]:
    """The settings of section `model` for a name, a hub id or the path of a config.json.

    Raises UserError for anything else.
    """
    path = Path(name).expanduser()
    if path.is_dir() and (path / "config.json").is_file():
        path = path / "config.json"
    if path.is_file():
        models.read_config(path)
        return {"config": str(path.resolve())}
    if models.architecture(name) is not None:
        return {"name": name}
    if path.suffix == ".json" or name.startswith((".", "/", "~")):
        raise UserError("no such file", where=f"--model {name}")
    if name.count("/") != 1:
        known = f"; known are {', '.join(models.architecture_names())}"
        raise UserError(
            f"no model is called {name!r}{models.near_architectures(name) or known}; a hub id "
            "(organisation/name) or the path of a config.json will do too",
            where=f"--model {name}",
        )
    return {"name": name}


def positions(settings: Mapping[str, str]) -> int | None:
    """The number of positions of the model; None when its config is not at hand or sets no
    limit."""
    path = Path(settings["config"]) if "config" in settings else None
    path = path or models.architecture_path(settings["name"])
    if path is None:
        return None
    config = models.read_config(path)
    key = models.positions_key(config)
    return int(config[key]) if key else None


def templates(
    settings: Mapping[str, str], length: int, overrides: Sequence[str]
) -> dict[str, Cell]:
    """A cell for each method: the defaults of a matrix with checkpointing, NF4 and double
    quantization, changed by `--set`."""
    written: dict[str, Any] = {
        "name": "fit",
        "model": dict(settings),
        "data": {"max_length": length},
        "gradient_checkpointing": True,
        "double_quant": True,
        "evaluate": {"tasks": [], "sample_prompts": []},
        "axes": {"method": list(METHODS)},
    }
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "fit.yaml"
        path.write_text(json.dumps(written))
        cells = expand(load(path, list(overrides))).cells
    found = {cell.method: cell for cell in cells}
    if len(cells) != len(METHODS) or len(found) != len(METHODS):
        raise UserError(
            "fit searches methods, batch and length itself; --set takes single values of the other "
            "settings, e.g. --set rank=64",
            where=f"--set {' --set '.join(overrides)}",
        )
    return {str(method): cell for method, cell in found.items()}


def spread_cells(cells: Mapping[str, Cell], request: FitRequest) -> list[Cell]:
    """Every method under every kind of parallelism of the request."""
    kinds = request.parallelism or (("single",) if request.count == 1 else SHARED)
    return [
        spread_over(cells[method], kind, request.count)
        for method in request.methods
        for kind in kinds
    ]


def at(cell: Cell, micro_batch: int | None = None, length: int | None = None) -> Cell:
    """The cell at another micro batch or sequence length."""
    assert cell.train is not None
    assert cell.data is not None
    train, data = cell.train, cell.data
    if micro_batch is not None:
        train = train.model_copy(update={"micro_batch_size": micro_batch})
    if length is not None:
        data = data.model_copy(update={"max_length": length})
    return cell.model_copy(update={"train": train, "data": data})


def _batch_search(cell: Cell) -> Search:
    return Search(partial(at, cell), 1, 1, LARGEST_BATCH)


def _length_search(cell: Cell, length: int, limit: int | None) -> Search:
    cap = max(limit or LONGEST_LENGTH, length)
    unit = min(LENGTH_UNIT, cap)
    first = max(unit, length // unit * unit)
    return Search(lambda value: at(cell, 1, value), unit, first, cap // unit * unit)


def _row(cell: Cell, batch: Search, lengths: Search | None) -> FitRow:
    if batch.failure is not None:
        return FitRow(cell, None, None, batch.failure)
    largest = batch.largest
    longest = lengths.largest if lengths and lengths.failure is None else None
    if largest is not None:
        shown = batch.known[largest]
    elif lengths is not None and longest is not None:
        shown = lengths.known[longest]
    else:
        shown = batch.known[min(batch.known)]
    capped = lengths is not None and longest == lengths.cap
    return FitRow(cell, largest, longest, shown, largest == batch.cap, capped, lengths is not None)


def _refuse_unknown(rows: Sequence[FitRow], model: str) -> None:
    """Raises UserError when every row is refused for the same reason: then the request is wrong."""
    reasons = {row.shown.reason for row in rows}
    if all(row.shown.status == "invalid" for row in rows) and len(reasons) == 1:
        raise UserError(reasons.pop() or "cannot be predicted", where=f"--model {model}")


def fit_json(found: FitResult) -> dict[str, Any]:
    """The result for machines. Bytes, tokens, US dollars per hour of one GPU."""
    gpu = found.request.gpu
    first = next((p for p in found.predictions if p.status == "predicted"), None)
    return {
        "model": found.request.model,
        "gpu": gpu.name,
        "count": found.request.count,
        "capacity_bytes": gpu.capacity_bytes,
        "price_usd_per_hour": gpu.price_usd_per_hour,
        "price_date": gpu.price_date,
        "max_length": found.max_length,
        "stack": first.stack if first else {},
        "engine": first.engine if first else None,
        "margin": first.margin if first else None,
        "assumptions": first.assumptions if first else [],
        "rows": [_row_json(row) for row in found.rows],
        "ladder": [saving.as_json() for saving in found.savings],
    }


def _row_json(row: FitRow) -> dict[str, Any]:
    verdict, memory = first_verdict(row.shown), row.shown.memory
    category, phase = row.binds or (None, None)
    return {
        "method": row.cell.method,
        "quantization": row.cell.quantization.model_dump() if row.cell.quantization else None,
        "parallelism": row.cell.parallelism,
        "devices": row.cell.devices,
        "status": row.shown.status,
        "reason": row.shown.reason,
        "fits": fits(row.shown) and row.micro_batch is not None,
        "largest_micro_batch": row.micro_batch,
        "largest_micro_batch_is_limit": row.batch_capped,
        "longest_sequence": row.longest,
        "longest_sequence_is_limit": row.length_capped,
        "outcome": verdict.outcome if verdict else None,
        "retries": verdict.retries if verdict else None,
        "peak_allocated_bytes": memory.peak_allocated_bytes,
        "peak_reserved_bytes": memory.peak_reserved_bytes,
        "binds": {"category": category, "phase": phase} if category else None,
        "shown_cell_id": row.shown.cell_id,
        "shown_cell": row.shown.cell.model_dump(mode="json"),
    }
