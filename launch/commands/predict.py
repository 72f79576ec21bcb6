"""The commands that answer before anything runs, and how right they were afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from harness.system.platforms import no_prediction
from launch.commands.console import print_json, print_note, stopping
from launch.commands.options import (
    CountOption,
    EngineOption,
    ExplainOption,
    GpuOption,
    GpusFileOption,
    JsonOption,
    LongestOption,
    MatrixArgument,
    MaxLengthOption,
    MethodOption,
    ModelOption,
    NoSelfCheckOption,
    OneGpuOption,
    ParallelismOption,
    RecordsOption,
    SeedsOption,
    SetOption,
    StackOption,
    WorkersOption,
)
from matrices.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from harness.records.prediction import Prediction
    from harness.records.record import Record
    from launch.planning.plan import Job
    from launch.predict.predict import Options

EXIT_INCOMPLETE = 3


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
    from launch.commands.matrix_file import load
    from launch.display.prediction_progress import show_for_stderr
    from launch.display.predictions import explanation, predictions_text
    from launch.planning.plan import labels
    from launch.predict.before_run import timed
    from launch.predict.predict import predict as predict_cells
    from matrices.expand import expand
    from matrices.rules.passed_through import merged

    expansion = merged(expand(load(matrix, set_ or [], seeds)))
    for note in expansion.notes:
        print_note(note)
    past = _past(records) if records is not None else []
    show = show_for_stderr()
    options = prediction_options(gpu, gpus_file, stack, no_self_check, engine, workers)
    with stopping():
        found = predict_cells(expansion.cells, options, show)
    if records is not None:
        found = timed(found, past)
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
        # There is something to put right, and nothing else.
        raise typer.Exit(2)


def prediction_options(
    gpu: Sequence[str] | None,
    gpus_file: Path | None,
    stack: str | None,
    no_self_check: bool = False,
    engine: str | None = None,
    workers: int | None = None,
) -> Options:
    """Checked options of a prediction. Raises UserError, also where none can be made."""
    if reason := no_prediction():
        raise UserError(reason)
    from launch.display.prediction_progress import show_for_stderr
    from launch.predict.gpu_choice import chosen
    from launch.predict.overlays import overlay
    from launch.predict.predict import Options, checked_engine

    judge = chosen(gpu or [], gpus_file)
    found = overlay(stack, show_for_stderr().message)
    for line in found.unmet():
        print_note(line)
    return Options(
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


def fit(
    model: ModelOption,
    gpu: OneGpuOption,
    count: CountOption = 1,
    max_length: MaxLengthOption = None,
    method: MethodOption = None,
    parallelism: ParallelismOption = None,
    longest: LongestOption = None,
    set_: SetOption = None,
    gpus_file: GpusFileOption = None,
    stack: StackOption = None,
    no_self_check: NoSelfCheckOption = False,
    workers: WorkersOption = None,
    as_json: JsonOption = False,
) -> None:
    """Which methods fit on a GPU, how large a batch, how long a sequence, and what binds.

    Searched by simulating every candidate, with gradient checkpointing unless --set says
    otherwise. When nothing fits, what to change is shown rung by rung, with what each saves.

    \b
    tunebench fit --model llama-3.1-8b --gpu rtx-4090
    tunebench fit --model llama-3.1-8b --gpu rtx-4090 --count 2 --method qlora
    tunebench fit --model my-model/config.json --gpu a100-80gb --max-length 8192
    tunebench fit --model mistral-7b-v0.1 --gpu t4 --set rank=64 --set optimizer=paged_adamw_8bit
    """
    import dataclasses

    from launch.display.prediction_progress import show_for_stderr
    from launch.fit import answer
    from launch.fit.text import answer_text

    methods = answer.checked_methods(method or [])
    ways = answer.checked_parallelism(parallelism or [], count)
    options = prediction_options([gpu], gpus_file, stack, no_self_check, None, workers)
    # What was simulated before is true still; a search asks again and again.
    options = dataclasses.replace(options, fresh=False)
    question = answer.Question(
        model, options.judge[0], count, max_length, methods, ways, tuple(set_ or ()), longest
    )
    with stopping():
        found = answer.answer(question, options, show_for_stderr())
    if as_json:
        print_json(answer.answer_json(found))
    else:
        print(answer_text(found))
    if any(prediction.status == "failed" for prediction in found.predictions):
        raise typer.Exit(EXIT_INCOMPLETE)


def predictions_of(
    jobs: Sequence[Job], gpu: Sequence[str] | None, gpus_file: Path | None
) -> dict[str, Prediction]:
    """Predictions for the trained cells of a plan by cell id, those made before as they are.

    For the GPUs that are named, else for this machine and what can run on it; where nothing can
    (an architecture without weights, say), for the GPU that 'predict' takes.
    """
    import dataclasses

    from launch.display.prediction_progress import failures, show_for_stderr
    from launch.predict.before_run import foretell, options_here
    from launch.predict.gpu_choice import chosen
    from launch.predict.predict import Options

    judge = chosen(gpu or [], gpus_file)
    options = options_here(judge[0] if judge else None)
    if judge:
        options = dataclasses.replace(options, judge=judge)
    possible = [job.cell for job in jobs if job.action != "invalid"]
    cells = possible if possible and not judge else [job.cell for job in jobs]
    if not possible and not judge:
        options = Options()
    with stopping():
        found = foretell(cells, show_for_stderr(), options=options).predictions
    for reason in failures(list(found.values())):
        print_note(f"not predicted: {reason}")
    return dict(found)
