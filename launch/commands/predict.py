"""`tunebench predict`: the memory that cells need, without running them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from harness.system.platforms import prediction_obstacle
from launch.commands.console import EXIT_INCOMPLETE, load_matrix, print_json, print_note
from launch.commands.options import (
    EngineOption,
    ExplainOption,
    GpuOption,
    GpusFileOption,
    JsonOption,
    MatrixArgument,
    NoSelfCheckOption,
    RecordsOption,
    SeedsOption,
    SetOption,
    StackOption,
    WorkersOption,
)
from matrices.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from harness.records.record import Record
    from launch.predict.predict import PredictionOptions


def predict(
    matrix: MatrixArgument,
    gpu: GpuOption = None,
    gpus_file: GpusFileOption = None,
    stack: StackOption = None,
    set_: SetOption = None,
    seeds: SeedsOption = None,
    records: RecordsOption = None,
    explain: ExplainOption = False,
    no_self_check: NoSelfCheckOption = False,
    engine: EngineOption = None,
    workers: WorkersOption = None,
    as_json: JsonOption = False,
) -> None:
    """Predict the memory of every cell without running it, on any GPU, without a GPU.

    The training code of the cell runs on the installed libraries for two steps of a full-length
    batch, at full depth, on tensors without content. No weights are needed: a model's config.json
    is enough. The versions that were executed are part of the answer.

    \b
    tunebench predict my-sweep.yaml --gpu rtx-4090 --gpu a100-80gb
    tunebench predict quickstart --set model=llama-3.1-8b --explain
    tunebench predict my-sweep.yaml --stack transformers==4.48.1,peft==0.13.2
    tunebench predict my-sweep.yaml --json | jq '.[].memory.peak_allocated_bytes'
    """
    from launch.display.predictions import explanation, predictions_text
    from launch.display.progress import display_for_stderr
    from launch.predict.predict import predict as predict_cells
    from launch.predict.run_predictions import with_step_times
    from matrices.expand import expand
    from matrices.language.labels import labels
    from matrices.rules.passed_through import merged

    expansion = merged(expand(load_matrix(matrix, set_ or [], seeds)))
    for note in expansion.notes:
        print_note(note)
    past = _past(records) if records is not None else []
    display = display_for_stderr()
    options = prediction_options(gpu, gpus_file, stack, no_self_check, engine, workers)
    found = predict_cells(expansion.cells, options, display)
    if records is not None:
        found = with_step_times(found, past)
    if as_json:
        print_json([prediction.model_dump(mode="json") for prediction in found])
    else:
        names = labels(expansion.cells)
        for prediction in found if explain else ():
            print(explanation(prediction, names[prediction.cell_id]) + "\n")
        print(predictions_text(found, names))
    if any(prediction.status == "failed" for prediction in found):
        raise typer.Exit(EXIT_INCOMPLETE)
    if all(prediction.status == "invalid" for prediction in found):
        # Every cell has to be corrected first.
        raise typer.Exit(2)


def prediction_options(
    gpu: Sequence[str] | None,
    gpus_file: Path | None,
    stack: str | None,
    no_self_check: bool = False,
    engine: str | None = None,
    workers: int | None = None,
) -> PredictionOptions:
    """Checked options of a prediction. Raises UserError, also where none can be made."""
    if reason := prediction_obstacle():
        raise UserError(reason)
    from launch.display.progress import display_for_stderr
    from launch.predict.gpu_choice import named_gpus
    from launch.predict.overlays import overlay
    from launch.predict.predict import PredictionOptions, checked_engine

    judge = named_gpus(gpu or [], gpus_file)
    found = overlay(stack, display_for_stderr().message)
    for line in found.unmet():
        print_note(line)
    return PredictionOptions(
        gpu=judge[0] if judge else None,
        judge=judge,
        overlay=found,
        engine=checked_engine(engine),
        self_check=not no_self_check,
        workers=workers,
        fresh=True,
    )


def _past(records: Path) -> list[Record]:
    from reports.records.load import index, load_records

    return [result.record for result in index(load_records(records)).values()]
