"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MatrixArgument = Annotated[
    str, typer.Argument(metavar="MATRIX", help="A YAML file, or the name of a shipped matrix.")
]
ResultsOption = Annotated[
    Path | None,
    typer.Option("--results", help="Results directory.  [default: results/<matrix name>]"),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Replace a setting or an axis; a list makes an axis. Repeatable.",
    ),
]
SeedsOption = Annotated[int | None, typer.Option("--seeds", help="Run seeds 0 to N-1.", min=1)]
RetryOption = Annotated[
    str | None,
    typer.Option(
        "--retry",
        metavar="STATUS,...",
        help="Also run cells again that ended like this, e.g. oom,timeout. Failed and interrupted "
        "ones always are.",
    ),
]
TimeoutOption = Annotated[
    float | None,
    typer.Option(
        "--timeout",
        metavar="SECONDS",
        min=1,
        help="Longest time for one cell.  [default: the matrix's timeout_seconds]",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
