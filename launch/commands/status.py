"""`tunebench status`: the states of the cells of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness.system.platforms import need_linux
from launch.commands.console import load_matrix, print_json, print_note
from launch.commands.options import JsonOption, ResultsOption, SeedsOption, SetOption
from matrices.errors import UserError

TargetArgument = Annotated[
    str,
    typer.Argument(
        metavar="RESULTS|MATRIX",
        help="A results directory; or a matrix, and then cells that were never started are listed "
        "too.",
    ),
]


def status(
    target: TargetArgument,
    results: ResultsOption = None,
    set_: SetOption = None,
    seeds: SeedsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what runs, what waits, what has ended and how, wherever the cells run.

    Reads the results directory, and asks SLURM's queue where jobs of it are. Starts and changes
    nothing, and may be called from any machine that sees the directory.

    \b
    tunebench status results/my-sweep
    tunebench status my-sweep.yaml --seeds 3
    tunebench status results/my-sweep --json | jq '.[] | select(.state == "waiting")'
    """
    need_linux("status")
    from launch.engines.status import read_state, status_text, statuses
    from launch.planning.plan import plan_jobs
    from matrices.expand import expand

    cells = []
    if Path(target).is_dir() and not (set_ or seeds):
        if results is not None:
            raise UserError("name a results directory, or a matrix and its --results", where=target)
        directory = Path(target)
    else:
        matrix = load_matrix(target, set_ or [], seeds)
        directory = results or Path("results") / matrix.name
        jobs = plan_jobs(expand(matrix).cells, {}, score_base=matrix.score_base)
        cells = [job.cell for job in jobs]
    state = read_state(directory)
    if state.note:
        print_note(state.note)
    found = statuses(state, cells)
    if as_json:
        print_json([each.as_json() for each in found])
    else:
        print(status_text(found, directory))
