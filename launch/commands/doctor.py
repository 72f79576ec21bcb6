"""`tunebench doctor`: what this machine can run, and why not the rest."""

from __future__ import annotations

from typing import Annotated

import typer

from launch.commands.console import print_json
from launch.commands.options import JsonOption


def doctor(
    network: Annotated[
        bool, typer.Option("--network", help="Also ask whether the model hub answers.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what this machine can run, and why not the rest.

    \b
    tunebench doctor
    tunebench doctor --json | jq '.[] | select(.state == "no")'
    """
    from launch.cells.devices import local_devices
    from launch.planning.machine_findings import findings, findings_text

    found = findings(len(local_devices()), network)
    if as_json:
        print_json([finding.as_json() for finding in found])
    else:
        print(findings_text(found))
