"""Predicted figures in frames, tables and records: said to be predicted, apart from measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from harness.records.record import RecordedPrediction
from reports.output.render import render
from reports.records.frame import frame
from reports.records.load import Result, load_records
from reports.show.record import show
from reports.tables.build import build

MIB = 2**20


@pytest.fixture
def results(results_directory: Path) -> list[Result]:
    """Every trained record predicted 2 % too high; the failed ones without an error."""
    found = []
    for result in load_records(results_directory):
        record = result.record.model_copy(deep=True)
        if record.cell.method != "base":
            peak = record.memory.peak_bytes
            record.prediction = RecordedPrediction(
                peak_allocated_bytes=round(1.02 * peak) if peak else 9000 * MIB,
                engine="fake-cpu",
                error=0.02 if record.status == "ok" else None,
            )
        found.append(replace(result, record=record))
    return found


def test_the_frame_has_both_columns(results: list[Result]) -> None:
    table = frame(results)
    trained = table[table["method"] != "base"]
    assert trained["predicted_peak_bytes"].notna().all()
    ok = trained[trained["status"] == "ok"]
    assert set(ok["prediction_error"]) == {0.02}
    ratio = ok["predicted_peak_bytes"] / ok["memory.peak_bytes"]
    assert ratio.sub(1.02).abs().max() < 1e-6
    assert table[table["method"] == "base"]["predicted_peak_bytes"].isna().all()


def test_tables_show_the_prediction_beside_the_measured_peak(results: list[Result]) -> None:
    [table] = build(results, "methods")
    names = [column.name for column in table.columns]
    at = names.index("peak_bytes")
    assert names[at + 1 : at + 3] == ["predicted_peak_bytes", "prediction_error"]
    told = render(table, "md").replace("\N{NO-BREAK SPACE}", " ")
    assert "Predicted peak" in told
    assert {text for text in table.columns[at + 2].texts() if text != "–"} == {"+2.00 %"}
    assert "predicted before the run, not measured" in told
    assert "on fake-cpu tensors" in told


def test_a_run_that_failed_still_shows_what_was_predicted(results: list[Result]) -> None:
    tables = [table for name in ("methods", "rank-targets") for table in build(results, name)]
    seen = 0
    for table in tables:
        columns = {column.name: column for column in table.columns}
        for place, row in enumerate(table.rows):
            if not row.reference and not row.group.measured:
                seen += 1
                predicted = columns["predicted_peak_bytes"].values[place]
                assert getattr(predicted, "value", None) == 9000 * MIB
                assert columns["prediction_error"].values[place] is None
                assert columns["peak_bytes"].values[place] is None
    assert seen


def test_without_predictions_there_is_no_such_column(results_directory: Path) -> None:
    [table] = build(load_records(results_directory), "methods")
    assert not {"predicted_peak_bytes", "prediction_error"} & {c.name for c in table.columns}
    assert not any("redicted" in line for line in table.caption)


def test_a_record_says_what_was_predicted(results: list[Result]) -> None:
    [result] = [r for r in results if r.record.cell.method == "full" and r.record.cell.seed == 0][
        :1
    ]
    told = show(result, {})
    assert "predicted     1.83 GiB, simulated on fake-cpu tensors; +2.00 % from what was" in told
