"""The command line. Every heavy import is inside the command that needs it."""

from __future__ import annotations

import importlib.metadata
from typing import Annotated

import typer

from launch.commands.calibration import calibration
from launch.commands.claims import claims
from launch.commands.console import show_set_aside
from launch.commands.doctor import doctor
from launch.commands.fit import fit
from launch.commands.matrices import matrices
from launch.commands.plan import plan
from launch.commands.predict import predict
from launch.commands.profiles import profiles
from launch.commands.report import report
from launch.commands.rerun import rerun
from launch.commands.run import run
from launch.commands.show import show
from launch.commands.status import status

COMMANDS = (
    *(plan, rerun, doctor, matrices, run, status, predict),
    *(fit, report, show, calibration, claims, profiles),
)

app = typer.Typer(
    name="tunebench",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,  # rich would double the time to the first line of help
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tunebench {importlib.metadata.version('tunebench')}")
        raise typer.Exit


@app.callback()
def tunebench(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Measure what fine-tuning configurations cost and what they buy.

    A matrix (YAML) names models, data and settings; its lists are axes. Every combination is a
    cell, run in a process of its own: memory, speed, and lm-eval scores against the base model.

    \b
    tunebench doctor                    what can run on this machine
    tunebench predict quickstart        the memory each cell needs, on any GPU, without one
    tunebench plan quickstart           what would run, and why
    tunebench run quickstart            run it; Ctrl-C any time, run again to go on
    tunebench status results/quickstart what runs, waits and has ended, on whatever machine
    tunebench report results/quickstart tables

    Exit codes: 0 all is well; 1 a bug (with its traceback); 2 something to put right (one line
    says what); 3 a run ended with failed cells; 130 and 143 stopped by Ctrl-C and SIGTERM.
    """
    show_set_aside()


for command in COMMANDS:
    app.command()(command)
