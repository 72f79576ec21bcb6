"""`tunebench profiles`: the accelerate profiles that come with tunebench."""

from __future__ import annotations

from typing import Annotated

import typer

from launch.commands.console import print_json
from launch.commands.options import JsonOption


def profiles(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="Print this one, e.g. zero2, or zero2.json."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the accelerate profiles, or print one to start your own from.

    A profile is what `accelerate launch` is told for one kind of parallelism; those of DeepSpeed
    have a JSON file too. A matrix with `profile: ./mine.yaml` uses yours instead.

    \b
    tunebench profiles
    tunebench profiles fsdp > mine.yaml
    tunebench profiles zero2 > mine.yaml; tunebench profiles zero2.json > zero2.json
    """
    from launch.cells import accelerate_profile
    from reports.text import text_table

    if name is not None:
        print(accelerate_profile.text(name), end="")
        return
    found = [
        (each, accelerate_profile.summary(each)) for each in accelerate_profile.shipped_profiles()
    ]
    if as_json:
        print_json([{"name": each, "what": what} for each, what in found])
    else:
        print("\n".join(text_table([("profile", "what it does"), *found])))
