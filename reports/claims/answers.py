"""From predictions and records to the answers of a claims file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from harness.records.prediction import Prediction
from matrices.cell import Adapter, Cell, TargetSet
from reports.claims.language import Answer, Claim, Reading, decided, not_testable, priced
from reports.claims.measured import measured
from reports.claims.predicted import GB, TARGETS, Case, cases, counted
from reports.records.load import Result

SIMULATED = ("count", "predict")
GIB = 2**30
Predictions = Mapping[str, Prediction]


def cells_for(claims: Sequence[Claim]) -> list[Cell]:
    """Every cell to predict, each once."""
    found = [
        cell
        for claim in claims
        if claim.kind in SIMULATED
        for case in cases(claim)
        for cell in case.cells
    ]
    return _distinct(found)


def more_cells_for(claims: Sequence[Claim], predictions: Predictions) -> list[Cell]:
    """Where a list of target modules was refused: each name by itself, and the named set, to tell
    what PEFT would have trained and what was meant."""
    found = []
    for claim in claims:
        if claim.kind in SIMULATED and not isinstance(claim.target_modules, str | None):
            refused = [
                cell
                for case in cases(claim)
                for cell in case.cells
                if predictions[cell.cell_id].status == "invalid"
            ]
            for cell in refused[:1]:
                found += [*_one_by_one(claim, cell), _with_targets(cell, TARGETS)]
    return _distinct(found)


def _distinct(cells: Sequence[Cell]) -> list[Cell]:
    return list({cell.cell_id: cell for cell in cells}.values())


def _with_targets(cell: Cell, targets: TargetSet | tuple[str, ...]) -> Cell:
    assert cell.adapter is not None
    adapter = Adapter(rank=cell.adapter.rank, target_modules=targets)
    return cell.model_copy(update={"adapter": adapter})


def _one_by_one(claim: Claim, cell: Cell) -> list[Cell]:
    return [_with_targets(cell, (name,)) for name in claim.target_modules or ()]


def answer(
    claim: Claim, predictions: Predictions, results: Sequence[Result] | None = None
) -> Answer:
    """The answer to one claim. `results` are the records to look for a `measure` claim's cells
    in; none when no results directory was given."""
    if claim.kind == "price":
        return priced(claim)
    if claim.kind == "measure":
        return measured(claim, results)
    return _simulated(claim, predictions)


def _simulated(claim: Claim, predictions: Predictions) -> Answer:
    todo = cases(claim)
    first = [predictions[cell.cell_id] for cell in todo[0].cells]
    lacking = next((found for found in first if found.status != "predicted"), None)
    if lacking is not None:
        if claim.quantity == "trainable_parameters" and _targets_refused(lacking):
            return _refused_targets(claim, lacking, predictions)
        return not_testable(claim, lacking.reason or lacking.status, "a cell that can be simulated")
    readings = [reading for case in todo if (reading := _reading(claim, case, predictions))]
    return decided(claim, readings, _remarks(claim, readings, first[0]))


def _reading(claim: Claim, case: Case, predictions: Predictions) -> Reading | None:
    found = [predictions[cell.cell_id] for cell in case.cells]
    if any(prediction.status != "predicted" for prediction in found):
        return None
    value = case.figure(found)
    return Reading(assuming=case.assuming, value=value, agrees=claim.accepts(value))


def _targets_refused(prediction: Prediction) -> bool:
    return prediction.status == "invalid" and "adapter.target_modules" in (prediction.reason or "")


def _refused_targets(claim: Claim, refused: Prediction, predictions: Predictions) -> Answer:
    """What PEFT makes of the list: it passes over a name that matches nothing while another
    matches, and adapters on different modules add up."""
    single = {
        cell.adapter.target_modules[0]: predictions[cell.cell_id]
        for cell in _one_by_one(claim, refused.cell)
        if cell.adapter is not None
    }
    matching = {
        name: counted(claim, found)[0]
        for name, found in single.items()
        if found.status == "predicted"
    }
    absent = [name for name in single if name not in matching]
    trained = sum(matching.values())
    readings = [
        Reading(
            assuming=f"only {', '.join(matching)}: {', '.join(absent)} matches nothing",
            value=trained,
            agrees=claim.accepts(trained),
        )
    ]
    meant = predictions[_with_targets(refused.cell, TARGETS).cell_id]
    if meant.status == "predicted":
        count = counted(claim, meant)[0]
        readings.append(
            Reading(
                assuming=f"all {TARGETS} projections under this architecture's names",
                value=count,
                agrees=claim.accepts(count),
            )
        )
    return decided(claim, readings, [refused.reason or ""])


def _remarks(claim: Claim, readings: Sequence[Reading], prediction: Prediction) -> list[str]:
    """What would have made a refuted claim true, and what a figure leaves out."""
    notes = []
    first = readings[0]
    if claim.unit == "GB" and not first.agrees:
        notes += _in_gib(claim, readings) + _nominal(claim, readings, prediction)
    if claim.quantity == "peak_gb":
        notes.append("peak of allocated tensors: the allocator's reserve and the CUDA context come "
                     "on top")  # fmt: skip
    if claim.quantity == "adapter_file_mb":
        notes.append("tensor data; the safetensors header adds about 150 bytes a tensor")
    return notes


def _in_gib(claim: Claim, readings: Sequence[Reading]) -> list[str]:
    return [
        f"holds if its GB are GiB: {reading.value * GB / GIB:.2f} GiB ({reading.assuming})"
        for reading in readings
        if not reading.agrees and claim.accepts(reading.value * GB / GIB)
    ]


def _nominal(claim: Claim, readings: Sequence[Reading], prediction: Prediction) -> list[str]:
    """Texts often multiply by the number in the model's name."""
    named = re.search(r"(\d+(?:\.\d+)?)b\b", (claim.model or "").lower())
    total, trainable = prediction.total_parameters, prediction.trainable_parameters or 0
    if named is None or not total:
        return []
    base = total if claim.method == "full" else total - trainable
    nominal = float(named[1]) * 10**9
    return [
        f"holds for exactly {named[1]} billion parameters; the model has {base:,} "
        f"({reading.assuming})"
        for reading in readings
        if claim.quantity != "peak_gb"
        and not reading.agrees
        and claim.accepts(reading.value * nominal / base)
    ]
