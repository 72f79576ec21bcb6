"""Tables: who is compared with whom, what is averaged, and what is a dash."""

from __future__ import annotations

from pathlib import Path

import pytest
import synthetic_results as made

from harness.records.record import Record
from harness.records.stack import Hardware
from matrices.errors import UserError
from reports.records.load import Result, load_records
from reports.statistics.intervals import Estimate
from reports.tables.build import TABLES, build, build_all
from reports.tables.model import Row, Table, TableColumn

BPB = "python_reference_bpb.bits_per_byte"


def column(table: Table, name: str) -> TableColumn:
    [found] = [one for one in table.columns if one.name == name]
    return found


def place(table: Table, name: str) -> int:
    """The place of the only row of this name."""
    [found] = [n for n, row in enumerate(table.rows) if row.group.name == name]
    return found


def at(table: Table, row: str, name: str) -> object:
    return column(table, name).values[place(table, row)]


def written(root: Path, *records: Record) -> list[Result]:
    for record in records:
        made.write(root, record)
    return load_records(root)


@pytest.fixture
def methods(results: list[Result]) -> Table:
    [table] = build(results, "methods")
    return table


def test_only_seeds_are_averaged(methods: Table, results: list[Result]) -> None:
    seeds = {
        r.record.cell.seed: r.record
        for r in results
        if r.record.cell.model_copy(update={"seed": 0}) == made.trained("qlora", 0, rank=8)
    }
    medians = [seeds[seed].speed.step_seconds_median for seed in (0, 1, 2)]
    found = at(methods, "qlora nf4 r8 attention", "step_seconds")
    assert isinstance(found, Estimate)
    assert found.value == pytest.approx(sum(medians) / 3)  # type: ignore[arg-type]
    assert (found.n, found.over) == (3, "processes")


def test_one_seed_says_what_its_interval_is_over(methods: Table) -> None:
    step = at(methods, "lora r64 all-linear", "step_seconds")
    score = at(methods, "lora r64 all-linear", BPB)
    assert isinstance(step, Estimate)
    assert isinstance(score, Estimate)
    assert (step.n, step.over) == (36, "steps")
    assert (score.n, score.over) == (60, "documents")


def test_memory_change_by_hand(tmp_path: Path) -> None:
    full, lora = (made.record(made.trained(method)) for method in ("full", "lora"))
    full.memory.peak_bytes, lora.memory.peak_bytes = 800 * 2**20, 600 * 2**20
    [table] = build(written(tmp_path, full, lora), "methods")
    found = at(table, "lora r16 attention", "peak_change")
    assert found == Estimate(-0.25, None, None, 1, "runs")
    assert column(table, "peak_change").texts()[1] == "−25.0 %"
    assert column(table, "peak_bytes").texts() == ["800.0", "600.0"]
    assert column(table, "peak_bytes").heading_lines[1:] == ["MiB", "n = 1 run"]


def test_different_meters_are_not_compared(tmp_path: Path) -> None:
    full, lora = (made.record(made.trained(method)) for method in ("full", "lora"))
    lora.memory.headline = "cuda_allocated"
    [table] = build(written(tmp_path, full, lora), "methods")
    assert at(table, "lora r16 attention", "peak_bytes") is not None
    assert all(c.name != "peak_change" or c.values[1] is None for c in table.columns)
    assert any("different meters" in note for note in table.notes)


def test_failures_keep_their_row_with_status_reason_and_dashes(methods: Table) -> None:
    row = place(methods, "lora r4096 attention")
    assert column(methods, "status").values[row] == "invalid"
    for name in ("peak_bytes", "step_seconds", "tokens_per_second", BPB, "peak_change"):
        assert column(methods, name).texts()[row] == "–"
    assert any("rank 4096 is above" in note for note in methods.notes)
    partly = place(methods, "lora r64 all-linear")
    assert column(methods, "status").texts()[partly] == "1 ok, 1 oom¹"
    assert "oom in backward, 2.00 GiB asked for" in methods.notes[0]


def test_a_baseline_differs_in_the_axes_only(methods: Table) -> None:
    gap = column(methods, f"{BPB}.vs baseline")
    fulls = [n for n, row in enumerate(methods.rows) if row.group.cell.method == "full"]
    assert [gap.values[n] for n in fulls] == ["baseline", "baseline"]
    plain, checkpointed = (methods.rows[n].group for n in fulls)
    assert plain.cell.train is not None
    assert not plain.cell.train.gradient_checkpointing
    lora = at(methods, "lora r8 qv", BPB)
    mine, other = lora, column(methods, BPB).values[fulls[0]]
    assert isinstance(mine, Estimate)
    assert isinstance(other, Estimate)
    difference = gap.values[place(methods, "lora r8 qv")]
    assert isinstance(difference, Estimate)
    assert difference.value == pytest.approx(mine.value - other.value)
    assert checkpointed.name == plain.name


def test_more_than_the_axis_is_refused_and_named(tmp_path: Path) -> None:
    full = made.record(made.trained("full", learning_rate=2e-5))
    lora = made.record(made.trained("lora"))
    [table] = build(written(tmp_path, full, lora), "methods")
    assert at(table, "lora r16 attention", "peak_bytes") is not None
    assert table.notes == ["Not compared: the baseline differs in learning rate too."]
    assert column(table, "train.learning_rate").texts() == ["2e-05", "0.0002"]


def test_different_task_hashes_are_refused(tmp_path: Path) -> None:
    full, lora = (made.record(made.trained(method)) for method in ("full", "lora"))
    base = made.record(made.base_cells(lora.cell)["untouched"])
    lora.quality.tasks["python_reference_bpb"].hash = "another"
    [table] = build(written(tmp_path, base, full, lora), "methods")
    row = place(table, "lora r16 attention")
    assert column(table, f"{BPB}.vs untouched base").values[row] is None
    assert column(table, f"{BPB}.vs baseline").values[row] is None
    assert any("hashes of python_reference_bpb differ" in note for note in table.notes)
    topic = column(table, "python_reference_topic.acc.vs baseline")
    assert isinstance(topic.values[row], Estimate)


def test_quantization_is_judged_against_lora_of_the_same_rank(results: list[Result]) -> None:
    [table] = build(results, "quantization")
    assert {row.group.cell.method for row in table.rows} == {"base", "lora", "qlora"}
    found = at(table, "qlora nf4+dq r8 attention", f"{BPB}.vs quantized base")
    assert isinstance(found, Estimate)
    assert found.value < 0
    [lora] = [
        row.group for row in table.rows if row.group.name == "lora r8 attention" and row.baseline
    ]
    ours = at(table, "qlora nf4 r8 attention", "peak_bytes")
    change = at(table, "qlora nf4 r8 attention", "peak_change")
    theirs = lora.results[0].record.memory.peak_bytes
    assert isinstance(ours, Estimate)
    assert isinstance(change, Estimate)
    assert change.value == pytest.approx(ours.value / theirs - 1)  # type: ignore[operator]


def test_rank_targets_baseline_is_the_smallest_measured(results: list[Result]) -> None:
    [table] = build(results, "rank-targets")
    baselines = [row.group.name for row in table.rows if row.baseline]
    assert baselines == [
        "lora r8 qv",
        "qlora fp4 r8 attention",
        "qlora nf4 r8 attention",
        "qlora nf4+dq r8 attention",
    ]


def test_base_models_are_reference_rows_without_costs(methods: Table) -> None:
    references = [n for n, row in enumerate(methods.rows) if row.reference]
    assert [column(methods, "method").values[n] for n in references] == [
        "base, untouched", "base, fp4", "base, nf4", "base, nf4+dq",
    ]  # fmt: skip
    assert all(isinstance(column(methods, BPB).values[n], Estimate) for n in references)
    cost, quality = methods.panels()
    assert not set(cost.rows) & set(references)
    assert set(references) <= set(quality.rows)


def test_named_baseline_selects_one_row(results: list[Result]) -> None:
    [table] = build(results, "rank-targets", "method=lora,rank=64,target_modules=all-linear")
    assert [row.group.name for row in table.rows if row.baseline] == ["lora r64 all-linear"]
    # Seed 0 is the only one that both have.
    found = at(table, "lora r8 qv", f"{BPB}.vs baseline")
    assert isinstance(found, Estimate)
    assert (found.n, found.over) == (60, "documents")


@pytest.mark.parametrize(
    ("baseline", "told"),
    [
        ("method=lora,rank=8", r"selects 2 rows; one of: .*target_modules=qv"),
        ("method=full,gradient_checkpointing=maybe", "no row has .* there are: .*method=full"),
        ("rnak=8", "no setting 'rnak'; did you mean 'rank'"),
        ("revision=main", r"is one of model\.revision, data\.revision"),
        ("lora", "not setting=value"),
        ("rank=[8", "not a value"),
    ],
)
def test_bad_baselines(results: list[Result], baseline: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        build(results, "methods", baseline)


def test_numbers_booleans_and_lists_in_a_baseline(tmp_path: Path) -> None:
    cells = [
        made.trained("qlora", 0, target_modules=("q_proj", "v_proj"), double_quant=dq)
        for dq in (False, True)
    ]
    results = written(tmp_path, *[made.record(cell) for cell in cells])
    spec = "target_modules=[q_proj, v_proj], double_quant=true, learning_rate=2e-4"
    [table] = build(results, "quantization", spec)
    assert [row.baseline for row in table.rows] == [False, True]


def test_unknown_table_names_the_nearest(results: list[Result]) -> None:
    with pytest.raises(UserError, match="did you mean 'quantization'"):
        build(results, "quantisation")


def test_build_all_uses_a_baseline_where_there_is_one(results: list[Result]) -> None:
    tables = {table.name: table for table in build_all(results, "quant_type=fp4")}
    assert set(tables) == set(TABLES) - {"parallelism"}  # nothing ran on several devices
    assert all(one.caption[0] == "Baseline: 4-bit type = fp4." for one in tables.values())
    mixed = build_all(results, "method=full,gradient_checkpointing=true")
    assert [table.caption[0].startswith("Baseline: method = full, ") for table in mixed] == [
        True, False, False,
    ]  # fmt: skip
    with pytest.raises(UserError, match="no row has"):
        build_all(results, "rank=7")


def test_caption_holds_what_all_rows_share(methods: Table) -> None:
    caption = " ".join(methods.caption)
    for told in (
        "micro batch 2",
        "seeds 0, 1, 2",
        "torch 2.13.0",
        "AMD EPYC 7B13, 2 CPUs",
        "peak live tensor bytes by the ledger; no GPU was used",
        "23 ok, 1 oom, 1 invalid, 1 failed",
        "Older attempts, since repeated, left out: 1",
    ):
        assert told in caption
    assert "gradient checkpointing" not in caption
    assert column(methods, "train.gradient_checkpointing").values.count("yes") == 1


def test_a_partial_evaluation_says_so(tmp_path: Path) -> None:
    cell = made.trained("lora")
    limited = cell.model_copy(update={"evaluate": cell.evaluate.model_copy(update={"limit": 60})})
    [table] = build(written(tmp_path, made.record(limited)), "methods")
    assert "Scores are partial: first 60 documents of each task." in " ".join(table.caption)


def test_models_stacks_and_devices_have_tables_of_their_own(tmp_path: Path) -> None:
    cell = made.trained("lora")
    other = cell.model_copy(update={"model": cell.model.model_copy(update={"name": "tiny-llama"})})
    gpu = Hardware(
        cpu="x", cpu_count=8, host_memory_bytes=2**36, accelerator="A100", accelerator_count=1
    )
    results = written(
        tmp_path,
        made.record(cell),
        made.record(other),
        made.record(cell, stack_id="6" * 64, hardware=gpu),
    )
    titles = [table.title for table in build(results, "methods")]
    assert sorted(titles) == [
        "Method comparison: smollm2-135m on 1 × A100",
        "Method comparison: smollm2-135m on AMD EPYC 7B13",
        "Method comparison: tiny-llama on AMD EPYC 7B13",
    ]


def test_a_scale_that_is_twice_the_rank_is_the_same_setting(tmp_path: Path) -> None:
    small, large = made.trained("lora", rank=8), made.trained("lora", rank=64, alpha=128)
    [table] = build(written(tmp_path, made.record(small), made.record(large)), "rank-targets")
    assert not any("Not compared" in note for note in table.notes)
    odd = made.trained("lora", rank=32, alpha=32)
    [table] = build(written(tmp_path / "odd", *map(made.record, (small, odd))), "rank-targets")
    assert column(table, "adapter.alpha_per_rank").texts() == ["2", "1"]
    assert sum(row.baseline for row in table.rows) == 2


def test_no_rows_no_table(tmp_path: Path) -> None:
    results = written(tmp_path, made.record(made.trained("full")))
    assert build(results, "quantization") == []
    assert build(results, "rank-targets") == []
    assert len(build(results, "methods")) == 1


def test_panel_of_a_table_without_any_figure_shows_the_status(tmp_path: Path) -> None:
    record = made.record(made.trained("full"), "failed", reason="no")
    [table] = build(written(tmp_path, record), "methods")
    [panel] = table.panels()
    assert panel.rows == [0]
    assert [c.name for c in panel.columns] == ["method", "status"]
    assert isinstance(table.rows[0], Row)
