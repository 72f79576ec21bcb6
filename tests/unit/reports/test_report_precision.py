"""Scores whose log-likelihoods were taken in different precision are marked and not compared."""

from __future__ import annotations

from pathlib import Path

import pytest
import synthetic_results as made

from harness.records.quality import Recipe
from harness.records.record import Record
from matrices.cell import Model, base_cells
from reports.records.frame import frame
from reports.records.load import Result, bases, index, load_records
from reports.records.samples import difference
from reports.show.record import show
from reports.statistics.intervals import Estimate, NotComparable
from reports.tables.build import build
from reports.tables.model import Table

TASK, METRIC = "python_reference_bpb", "bits_per_byte"
FLOAT32 = Recipe(softmax_dtype="float32", logits_dtype="bfloat16")


def now(record: Record) -> Record:
    quality = record.quality.model_copy(update={"recipe": FLOAT32})
    return record.model_copy(update={"quality": quality})


def resumed(root: Path) -> list[Result]:
    """A sweep whose full cell and base are of an older tunebench and whose lora cell is of this
    one, which has scored the base again."""
    full, lora = made.trained("full"), made.trained("lora")
    base = made.record(base_cells(full)["untouched"])
    again = now(base).model_copy(update={"attempt": 2})
    for record in (base, again, made.record(full), now(made.record(lora))):
        made.write(root, record)
    return load_records(root)


def of_row(table: Table, row: str, column: str) -> tuple[object, str]:
    """A value, and the notes at it."""
    [found] = [each for each in table.columns if each.name == column]
    [place] = [n for n, each in enumerate(table.rows) if each.group.name == row]
    marks = found.marks[place] if found.marks else ()
    return found.values[place], " ".join(table.notes[mark - 1] for mark in marks)


def test_each_is_judged_against_the_base_of_its_own_precision(tmp_path: Path) -> None:
    [table] = build(resumed(tmp_path), "methods")
    told = [column.name for column in table.columns]
    for row, precision in (("full", "bfloat16"), ("lora r16 attention", "float32")):
        value, notes = of_row(table, row, f"{TASK}.{METRIC}.vs untouched base")
        assert isinstance(value, Estimate)
        assert notes == ""
        assert of_row(table, row, "softmax_dtype")[0] == precision
    value, notes = of_row(table, "lora r16 attention", f"{TASK}.{METRIC}.vs baseline")
    assert value is None
    assert "Not compared: log-likelihoods in float32 against bfloat16" in notes
    assert "softmax_dtype" in told
    references = [row for row in table.rows if row.reference]
    assert len(references) == 2, "both bases have a row"
    assert "bfloat16 or float32 of bfloat16 logits, which are not compared" in " ".join(
        table.caption
    )


def test_a_frame_has_the_differences_and_the_precision(tmp_path: Path) -> None:
    rows = frame(resumed(tmp_path)).set_index(["method", "quality.softmax_dtype"])
    assert not rows["superseded"].any()
    assert rows.loc[("lora", "float32"), "quality.logits_dtype"] == "bfloat16"
    assert rows[f"quality.{TASK}.{METRIC}.minus_untouched"].notna().tolist() == [
        method != "base" for method in rows.index.get_level_values(0)
    ]


def test_another_precision_is_refused_where_there_is_no_other_base(tmp_path: Path) -> None:
    lora = made.trained("lora")
    made.write(tmp_path, made.record(base_cells(lora)["untouched"]))
    made.write(tmp_path, now(made.record(lora)))
    records = load_records(tmp_path)
    [result] = [each for each in records if each.record.cell.method == "lora"]
    base = bases(result, index(records))["untouched"]
    with pytest.raises(NotComparable, match="float32 against bfloat16"):
        difference([(result, base)], TASK, METRIC)
    text = show(result, {"untouched": base})
    assert "log-likelihoods in float32 of bfloat16 logits" in text
    assert "float32 against bfloat16" in text


def test_seeds_of_several_precisions_have_no_mean(tmp_path: Path) -> None:
    for seed in (0, 1):
        record = made.record(made.trained("lora", seed))
        made.write(tmp_path, now(record) if seed else record)
    [table] = build(load_records(tmp_path), "methods")
    assert isinstance(of_row(table, "lora r16 attention", "peak_bytes")[0], Estimate)
    value, notes = of_row(table, "lora r16 attention", f"{TASK}.{METRIC}")
    assert value is None
    assert "seeds with log-likelihoods in bfloat16 and float32" in notes


def test_fp32_weights_were_always_scored_in_float32(tmp_path: Path) -> None:
    single = Model(weight_dtype="fp32", compute_dtype="fp32")
    old, new = (made.trained(method).model_copy(update={"model": single})
                for method in ("full", "lora"))  # fmt: skip
    made.write(tmp_path, made.record(old))
    made.write(tmp_path, now(made.record(new)))
    [table] = build(load_records(tmp_path), "methods")
    value, _ = of_row(table, "lora r16 attention", f"{TASK}.{METRIC}.vs baseline")
    assert isinstance(value, Estimate)
    assert "softmax_dtype" not in [column.name for column in table.columns]
