"""`tunebench calibration`: how far predictions were from what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.commands.console import print_json
from launch.commands.options import JsonOption


def calibration(
    results: Annotated[Path, typer.Argument(help="A results directory.")],
    as_json: JsonOption = False,
) -> None:
    """Say how far predictions were from what was measured, family by family.

    A family is a kind of model, method, 4-bit format, optimizer and way to spread, on one device.
    The error is predicted / measured - 1.

    \b
    tunebench calibration results/
    tunebench calibration results/my-sweep --json | jq '.[].memory.worst'
    """
    from reports.predictions.errors import calibration_text, families
    from reports.records.load import load_records

    found = families(load_records(results))
    if as_json:
        print_json([family.as_json() for family in found])
    else:
        print(calibration_text(found))
