"""`tunebench rerun`: one recorded cell, once more."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness.system.platforms import need_linux
from launch.commands.options import NoPredictOption, PhaseTimeoutOption, TimeoutOption


def rerun(
    record: Annotated[Path, typer.Argument(help="A record's directory or its record.json.")],
    timeout: TimeoutOption = None,
    phase_timeout: PhaseTimeoutOption = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="Let the cell run code that comes with its model or its evaluation tasks.",
        ),
    ] = False,
    no_predict: NoPredictOption = False,
) -> None:
    """Repeat one recorded cell by `accelerate launch`, as by hand.

    The command is made from the record's cell. The new record is the next attempt beside the old
    one, which stays as it is. Its path is printed.

    \b
    tunebench rerun results/quickstart/4f0c22d9a1b3-494adca8
    """
    from functools import partial

    need_linux("rerun")
    from launch.cells.rerun import RerunOptions
    from launch.cells.rerun import rerun as repeat
    from launch.commands.run import exit_code
    from launch.commands.show import record_path
    from launch.display.progress import display_for_stderr
    from launch.predict.run_predictions import predict_run

    display = display_for_stderr()
    predicting = None if no_predict else partial(predict_run, display=display)
    try:
        options = RerunOptions(timeout, phase_timeout, predicting, trust_remote_code)
        entry, stopped_by = repeat(record_path(record), display, options)
    finally:
        display.close()
    print(entry.directory / "record.json")
    raise typer.Exit(exit_code({"": entry}, stopped_by))
