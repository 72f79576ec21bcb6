"""`tunebench claims`: published numbers, each one checked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.commands.console import print_json
from launch.commands.options import JsonOption, NoSelfCheckOption, StackOption, WorkersOption
from launch.commands.predict import prediction_options
from matrices.errors import UserError, nearest

if TYPE_CHECKING:
    from harness.records.prediction import Prediction
    from launch.predict.predict import PredictionOptions
    from reports.claims.language import Claim

FORMATS = ("text", "md")


def claims(
    file: Annotated[
        Path, typer.Argument(metavar="CLAIMS", help="A YAML file with a list of claims.")
    ],
    results: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RESULTS]", help="A results directory, for claims that take a run."
        ),
    ] = None,
    format_: Annotated[str, typer.Option("--format", help="text or md.")] = "text",
    stack: StackOption = None,
    no_self_check: NoSelfCheckOption = False,
    workers: WorkersOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check claims: reproduced, refuted (with the right number), or not testable here.

    Parameter counts and memory are answered by simulating the claimed cells, no GPU needed; what a
    claim leaves open is assumed and said. Claims about speed and quality need records of runs.

    \b
    tunebench claims claims.yaml
    tunebench claims claims.yaml results/my-sweep --format md
    tunebench claims claims.yaml --json | jq '.[] | select(.verdict == "refuted")'
    """
    from reports.claims.answers import answer
    from reports.claims.language import read_claims
    from reports.claims.text import answers_markdown, answers_text
    from reports.records.load import load_records

    if format_ not in FORMATS:
        raise UserError(
            f"{format_!r} is none of {', '.join(FORMATS)}{nearest(format_, FORMATS)}",
            key="--format",
        )
    listed = read_claims(file)
    records = None if results is None else load_records(results)
    options = prediction_options(None, None, stack, no_self_check, None, workers)
    predictions = _predicted(listed, options)
    answers = [answer(claim, predictions, records) for claim in listed]
    if as_json:
        print_json([each.model_dump(mode="json") for each in answers])
        return
    versions = next((p.stack for p in predictions.values() if p.stack), {})
    text_of = answers_text if format_ == "text" else answers_markdown
    print(text_of(answers, versions))


def _predicted(listed: list[Claim], options: PredictionOptions) -> dict[str, Prediction]:
    """The predictions of all cells of the claims by cell id. Target modules that are refused lead
    to a second round."""
    from launch.display.progress import display_for_stderr
    from launch.predict.predict import predictor
    from reports.claims.answers import cells_for, more_cells_for

    with predictor(options, display_for_stderr()) as predict:
        found = {made.cell_id: made for made in predict(cells_for(listed))}
        more = [cell for cell in more_cells_for(listed, found) if cell.cell_id not in found]
        return found | {made.cell_id: made for made in predict(more)}
