"""`tunebench fit`: which methods fit on a GPU, at which batch and length."""

from __future__ import annotations

import typer

from launch.commands.console import EXIT_INCOMPLETE, print_json
from launch.commands.options import (
    CountOption,
    GpusFileOption,
    JsonOption,
    LongestOption,
    MaxLengthOption,
    MethodOption,
    ModelOption,
    NoSelfCheckOption,
    OneGpuOption,
    ParallelismOption,
    SetOption,
    StackOption,
    WorkersOption,
)
from launch.commands.predict import prediction_options


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

    from launch.display.progress import display_for_stderr
    from launch.fit import fit as fitting
    from launch.fit.text import fit_text
    from launch.predict.predict import predictor

    methods = fitting.checked_methods(method or [])
    kinds = fitting.checked_parallelism(parallelism or [], count)
    options = prediction_options([gpu], gpus_file, stack, no_self_check, None, workers)
    # A search simulates the same cells again and again, so the cache is used.
    options = dataclasses.replace(options, fresh=False)
    request = fitting.FitRequest(
        model, options.judge[0], count, max_length, methods, kinds, tuple(set_ or ()), longest
    )
    with predictor(options, display_for_stderr()) as predict:
        found = fitting.fit(request, predict)
    if as_json:
        print_json(fitting.fit_json(found))
    else:
        print(fit_text(found))
    if any(prediction.status == "failed" for prediction in found.predictions):
        raise typer.Exit(EXIT_INCOMPLETE)
