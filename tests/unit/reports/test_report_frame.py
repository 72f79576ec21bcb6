"""Records to a frame and back."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd
import pytest
import synthetic_results as made

from matrices.errors import SetAside, UserError
from reports.records.frame import frame, load_records, read_csv
from reports.records.load import Result, index


def test_one_row_per_record_and_working_directories_are_skipped(results: list[Result]) -> None:
    table = frame(results)
    assert len(table) == len(made.sweep()) == len(results)
    assert table["record"].is_unique
    assert not table["record"].str.contains(".running", regex=False).any()


def test_superseded_is_the_interrupted_attempt_that_was_repeated(results: list[Result]) -> None:
    table = frame(results)
    old = table[table["superseded"]]
    assert old["status"].tolist() == ["interrupted"]
    assert old["attempt"].tolist() == [1]


def test_an_interrupted_repeat_does_not_hide_what_was_measured(tmp_path: Path) -> None:
    cell = made.trained("lora")
    made.write(tmp_path, made.record(cell))
    made.write(tmp_path, made.record(cell, "interrupted", attempt=2))
    [result] = index(load_records(tmp_path)).values()
    assert result.record.status == "ok"


def test_not_measured_is_na_never_zero(results: list[Result]) -> None:
    row = frame(results).set_index("status").loc["oom"]
    for name in ("memory.peak_bytes", "speed.step_seconds_median", "artifacts.adapter_bytes"):
        assert row[name] is pd.NA
    assert row["requested_bytes"] == 2 * 2**30


def test_difference_to_the_base_is_paired(results: list[Result]) -> None:
    table = frame(results).set_index("cell_id")
    cell = made.trained("qlora", 0, rank=8)
    row = table.loc[cell.cell_id]
    name = "quality.python_reference_bpb.bits_per_byte"
    base = table[(table["method"] == "base") & table["quantization.quant_type"].isna()].iloc[0]
    assert row[f"{name}.minus_untouched"] == pytest.approx(row[name] - base[name])
    width = row[f"{name}.minus_untouched_high"] - row[f"{name}.minus_untouched_low"]
    # Documents differ far more from each other (0.15) than the models do on one (0.014).
    assert 0 < width < 0.02
    assert row[f"{name}.minus_quantized"] < row[f"{name}.minus_untouched"]


def test_parquet_and_csv_round_trip(results: list[Result], tmp_path: Path) -> None:
    table = frame(results)
    table.to_parquet(tmp_path / "t.parquet", index=False)
    table.to_csv(tmp_path / "t.csv", index=False)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "t.parquet"), table)
    pd.testing.assert_frame_equal(read_csv(tmp_path / "t.csv"), table)


def test_csv_keeps_awkward_texts_and_floats(tmp_path: Path) -> None:
    reason = 'None, "NA"\nline two | <b> ü'
    item = made.record(made.trained("full"), "failed", reason=reason)
    item.speed.load_seconds = 0.1 + 0.2
    made.write(tmp_path, item)
    frame(load_records(tmp_path)).to_csv(tmp_path / "t.csv", index=False)
    [row] = read_csv(tmp_path / "t.csv").to_dict("records")
    assert row["reason"] == reason
    assert row["speed.load_seconds"] == 0.1 + 0.2
    assert math.isclose(row["train.learning_rate"], 2e-4, rel_tol=0)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("half a reco", "not a readable record"),
        ("{}", "no schema_version"),
        (json.dumps({"schema_version": 99}), "newer tunebench"),
        (json.dumps({"schema_version": 1}), "cell_id"),
    ],
)
def test_a_bad_record_is_set_aside(tmp_path: Path, text: str, told: str) -> None:
    made.write(tmp_path, made.record(made.trained("full")))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "record.json").write_text(text)
    with pytest.warns(SetAside, match=told) as said:
        assert len(load_records(tmp_path)) == 1
    assert str(said[0].message).startswith(str(tmp_path / "bad" / "record.json"))


def test_nothing_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such results directory"):
        load_records(tmp_path / "absent")
    with pytest.raises(UserError, match="no record"):
        load_records(tmp_path)


def test_broken_samples_are_set_aside(tmp_path: Path) -> None:
    path = made.write(tmp_path, made.record(made.trained("full")))
    path.with_name("samples.parquet").write_text("not parquet")
    with pytest.warns(SetAside, match=r"samples\.parquet: not a readable table"):
        assert load_records(tmp_path)[0].read_samples() is None
