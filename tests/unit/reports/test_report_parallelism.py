"""Ranks in columns, tables and `show`; who is compared with the cell of one process; what works."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import synthetic_results as made
from compatibility import compatibility_text, losses_text, main

from harness.records.memory import Memory, PhaseMemory
from harness.records.part import Status
from harness.records.ranks import Communication, Failure, Placement, RankState
from harness.records.record import Record
from harness.records.speed import Tokens
from harness.records.verified import Verified
from matrices.cell import Cell
from matrices.errors import UserError
from reports.output.render import render
from reports.records.columns import COLUMNS
from reports.records.load import Result, load_records
from reports.show.record import show
from reports.statistics.intervals import Estimate
from reports.tables.build import build
from reports.tables.model import Table

BY_NAME = {column.name: column for column in COLUMNS}
# Rank 1 of two: more memory, and what it holds of 1000 bytes of parameters.
PEAKS = {"forward": (300, 350), "backward": (400, 500), "optimizer_step": (100, 120)}


def spread_cell(
    parallelism: str,
    devices: int,
    micro: int = 2,
    steps: int = 1,
    method: str = "lora",
    **more: Any,
) -> Cell:
    cell = made.trained(method, micro_batch_size=micro, gradient_accumulation_steps=steps, **more)
    return cell.model_copy(update={"parallelism": parallelism, "devices": devices})


def spread_record(
    cell: Cell, losses: list[float], share: float = 1.0, status: Status = "ok", **changes: Any
) -> Record:
    found = made.record(cell, status, **changes)
    found.quality = found.quality.model_copy(update={"train_loss": losses, "samples_file": None})
    found.quality.tasks = {}
    if cell.devices == 1 or status != "ok":
        return found
    phases: Any = {
        name: [PhaseMemory(ledger_peak_bytes=each) for each in peaks]
        for name, peaks in ({"load": (900, 900)} | PEAKS).items()
    }
    found.memory = Memory(headline="ledger", peak_bytes=500, peak_phase="backward", phases=phases)
    found.ranks = [
        RankState(
            rank=rank, world_size=2, host=f"host{rank}", pid=70 + rank, device="cpu", status="ok",
            exit_code=0, phase="evaluation", parameter_bytes=int(1000 * share) + rank,
            whole_parameter_bytes=1000, parameter_share=share,
            tokens=Tokens(all=100, non_padding=90 + rank, loss=80),
            communication=Communication(
                calls={"all_gather_into_tensor_": 3 + rank, "reduce_scatter_tensor_": 1},
                bytes={"all_gather_into_tensor_": 600 + rank, "reduce_scatter_tensor_": 200},
            ),
        )
        for rank in range(2)
    ]  # fmt: skip
    found.verified = Verified(world_size=2, distributed_type="MULTI_CPU")
    return found


def table_of(root: Path, *records: Record) -> Table:
    for record in records:
        made.write(root, record)
    [table] = build(load_records(root), "parallelism")
    return table


def value(table: Table, row: str, column: str) -> Any:
    [column_found] = [each for each in table.columns if each.name == column]
    [place] = [n for n, each in enumerate(table.rows) if each.group.name.endswith(row)]
    found = column_found.values[place]
    return found.value if isinstance(found, Estimate) else found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("parallelism", "zero3"),
        ("devices", 2),
        ("nodes", 1),
        ("verified.world_size", 2),
        ("memory.peak_bytes", 500),
        ("ranks.peak_min_bytes", 400),
        ("memory.rank_imbalance", 0.25),  # 500 / 400 - 1; 900 bytes at load are no training
        ("ranks.parameter_bytes", 501),
        ("ranks.parameter_share", 0.5),
        ("ranks.expected_share", 0.5),
        ("ranks.communication_bytes", 801),
        ("placement.engine", "ray"),
        ("placement.hosts", "a, b"),
        ("placement.job", "j7"),
        ("contaminated", "pid 9 (python) used 2 GiB"),
    ],
)
def test_columns_of_several_ranks(name: str, expected: object) -> None:
    record = spread_record(
        spread_cell("zero3", 2), [1.0], share=0.5,
        placement=Placement(engine="ray", hosts=["a", "b"], job="j7"),
        contaminated=["pid 9 (python) used 2 GiB"],
    )  # fmt: skip
    assert BY_NAME[name].value(record) == expected


@pytest.mark.parametrize(
    ("parallelism", "share"),
    [
        ("ddp", 1),
        ("zero1", 1),
        ("zero2", 1),
        ("device-map", 1),
        ("fsdp", 1 / 4),
        ("fsdp1", 1 / 4),
        ("zero3", 1 / 4),
        ("zero3-offload", 1 / 4),
    ],
)
def test_the_share_of_parameters_that_a_rank_should_hold(parallelism: str, share: float) -> None:
    cell = spread_cell(parallelism, 4)
    record = made.record(cell, ranks=[RankState(rank=0)])
    assert BY_NAME["ranks.expected_share"].value(record) == share


def test_one_process_has_no_figures_of_ranks() -> None:
    record = made.record(made.trained("lora"))
    for name, column in BY_NAME.items():
        if name.startswith("ranks.") and name != "ranks.peak_min_bytes":
            assert column.value(record) is None


def test_a_rank_without_a_figure_leaves_no_imbalance() -> None:
    record = spread_record(spread_cell("ddp", 2), [1.0])
    record.memory.phases["backward"][1].ledger_peak_bytes = None
    record.memory.phases["forward"][1].ledger_peak_bytes = None
    record.memory.phases["optimizer_step"][1].ledger_peak_bytes = None
    assert BY_NAME["memory.rank_imbalance"].value(record) is None


def test_loss_curves_are_compared_with_one_process_of_the_same_global_batch(
    tmp_path: Path,
) -> None:
    table = table_of(
        tmp_path,
        # Four samples in a step, in three ways; and eight.
        spread_record(spread_cell("single", 1, micro=2, steps=2), [3.0, 2.0, 1.0]),
        spread_record(spread_cell("ddp", 2, micro=2), [3.0, 2.25, 1.0]),
        spread_record(spread_cell("zero3", 2, micro=1, steps=2), [3.0, 2.0, 0.5], share=0.5),
        spread_record(spread_cell("fsdp", 2, micro=4), [9.0, 9.0, 9.0], share=0.5),
    )
    assert value(table, "ddp x2", "train_loss_gap") == "2.5e-01"
    assert value(table, "zero3 x2", "train_loss_gap") == "5.0e-01"
    assert value(table, "fsdp x2", "train_loss_gap") is None
    assert value(table, "attention", "train_loss_gap") == "baseline"
    assert value(table, "ddp x2", "train_loss_final") == 1.0
    assert any("8 samples in an optimizer step" in note for note in table.notes)
    assert value(table, "ddp x2", "parameter_share") == 1.0
    assert [row.group.cell.parallelism for row in table.rows] == ["single", "ddp", "fsdp", "zero3"]
    assert value(table, "fsdp x2", "global_batch") == "8"
    assert value(table, "zero3 x2", "global_batch") == "4"
    assert value(table, "zero3 x2", "parameter_share") == 0.5
    assert value(table, "zero3 x2", "expected_share") == 0.5
    assert value(table, "zero3 x2", "parameter_bytes") == 501
    assert value(table, "zero3 x2", "communication_bytes") == 801
    assert value(table, "zero3 x2", "rank_imbalance") == 0.25


def test_of_several_cells_of_one_process_the_one_with_the_same_micro_batch(tmp_path: Path) -> None:
    table = table_of(
        tmp_path,
        spread_record(spread_cell("single", 1, micro=4), [1.0]),
        spread_record(spread_cell("single", 1, micro=2, steps=2), [2.0]),
        spread_record(spread_cell("ddp", 2, micro=2), [2.125]),
    )
    assert value(table, "ddp x2", "train_loss_gap") == "1.2e-01"  # 0.125, not 1.125


@pytest.mark.parametrize(("losses", "told"), [([1.0, math.nan], "nan"), ([1.0, 2.0], "0.0e+00")])
def test_a_diverged_curve_is_no_equal_one(tmp_path: Path, losses: list[float], told: str) -> None:
    table = table_of(
        tmp_path,
        spread_record(spread_cell("single", 1, steps=2), [1.0, 2.0]),
        spread_record(spread_cell("ddp", 2), losses),
    )
    assert value(table, "ddp x2", "train_loss_gap") == told


def test_curves_of_other_settings_or_lengths_are_not_compared(tmp_path: Path) -> None:
    table = table_of(
        tmp_path,
        spread_record(spread_cell("single", 1, steps=2), [1.0, 2.0]),
        spread_record(spread_cell("ddp", 2), [1.0]),
        spread_record(spread_cell("zero2", 2, learning_rate=1e-5), [1.0, 2.0]),
    )
    assert value(table, "ddp x2", "train_loss_gap") is None
    assert value(table, "zero2 x2", "train_loss_gap") is None
    assert any("not of the same steps" in note for note in table.notes)
    assert any("learning_rate" in note for note in table.notes)


def test_results_of_one_device_have_no_table_of_parallelism(tmp_path: Path) -> None:
    made.write(tmp_path, made.record(made.trained("full")))
    assert build(load_records(tmp_path), "parallelism") == []


def test_a_doubt_is_marked_at_speed_and_memory_in_every_table(tmp_path: Path) -> None:
    doubt = "GPU-1 was used by pid 9 (python)"
    made.write(tmp_path, made.record(made.trained("full"), contaminated=[doubt]))
    made.write(tmp_path, made.record(made.trained("lora")))
    [table] = build(load_records(tmp_path), "methods")
    [note] = [n for n, text in enumerate(table.notes, 1) if doubt in text]
    [full] = [n for n, row in enumerate(table.rows) if row.group.name == "full"]
    for column in table.columns:
        marked = [n for n, marks in enumerate(column.marks) if note in marks]
        in_doubt = column.name in ("peak_bytes", "step_seconds", "tokens_per_second")
        assert (full in marked) == in_doubt, column.name
    for format in ("md", "html", "latex", "text", "csv"):
        assert "pid 9" in render(table, format)


def shown(record: Record) -> str:
    return show(Result(record, Path("results/x/record.json")), {})


def test_show_lists_every_rank() -> None:
    text = shown(spread_record(spread_cell("zero3", 2), [1.0], share=0.5))
    [first] = [line for line in text.splitlines() if "host0" in line]
    [second] = [line for line in text.splitlines() if "host1" in line]
    for part in ("cpu", "70", "400 B", "500 B (50.0 %)", "90", "800 B in 4 calls"):
        assert part in first
    assert "501 B (50.0 %)" in second
    assert "+25.0 % over smallest" in text
    assert "expected on each rank: 50.0 % (zero3)" in text
    assert "not what they hold" not in text


def test_show_says_when_parameters_were_not_divided() -> None:
    text = shown(spread_record(spread_cell("fsdp", 2), [1.0], share=1.0))
    assert "that is not what they hold" in " ".join(text.split())


def test_show_says_where_each_rank_stopped() -> None:
    record = spread_record(
        spread_cell("ddp", 2), [], status="timeout", reason="rank 1 stopped",
        ranks=[
            RankState(rank=0, phase="backward", step=3, exit_code=-9, stack_file="ranks/0.txt"),
            RankState(
                rank=1, phase="forward", step=4, status="oom",
                failure=Failure(type="OutOfMemoryError", message="2 GiB more"),
            ),
        ],
    )  # fmt: skip
    text = " ".join(shown(record).split())
    assert "rank 0 ended in backward, step 3: exit code -9; stacks in ranks/0.txt" in text
    assert "rank 1 ended in forward, step 4: oom; 2 GiB more" in text


def test_show_says_on_what_it_ran_and_what_is_in_doubt() -> None:
    record = made.record(
        made.trained("lora"), contaminated=["others used 40 % of the processors"],
        placement=Placement(engine="slurm", hosts=["n1"], job="12_0", exclusive=False),
    )  # fmt: skip
    text = " ".join(shown(record).split())
    assert "on n1; by slurm, job 12_0; other cells may have run beside it" in text
    assert "in doubt others used 40 % of the processors" in text


def compatibility_rows(text: str) -> dict[str, list[str]]:
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


def test_compatibility_is_what_records_say() -> None:
    refused = "sharding-needs-quant-storage: uint8 is not sharded by FSDP2"
    records = [
        spread_record(spread_cell("single", 1), [1.0]),
        spread_record(spread_cell("ddp", 2), [1.0]),
        spread_record(
            spread_cell("zero3", 2), [], status="failed", reason="rank 1 died", phase="backward"
        ),
        spread_record(spread_cell("fsdp", 2, method="qlora"), [], status="invalid", reason=refused),
        spread_record(
            spread_cell("fsdp", 2, method="qlora", quant_storage="bf16"), [1.0], share=0.5
        ),
        made.record(Cell(method="base")),
    ]
    text = compatibility_text(records)
    rows = compatibility_rows(text)
    assert rows["parallelism"] == ["full", "lora", "qlora"]
    assert rows["single"] == ["–", "ok", "–"]
    assert rows["ddp"] == ["–", "ok (2 processes)", "–"]
    assert rows["zero3"] == ["–", "failed (2 devices) [2]", "–"]
    assert rows["fsdp"][2] == (
        "invalid (2 devices, quant storage uint8) [1]<br>ok (2 processes, quant storage bf16)"
    )
    assert rows["zero1"] == ["–", "–", "–"]
    assert "2. failed in backward: rank 1 died" in text
    assert f"1. invalid: {refused}" in text
    assert "AMD EPYC 7B13" in text
    assert "gloo" in text
    assert "torch 2.13.0" in text


def test_compatibility_needs_a_trained_cell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="no record of a trained cell"):
        compatibility_text([made.record(Cell(method="base"))])
    assert main([str(tmp_path)]) == 2
    assert "no record.json" in capsys.readouterr().err
    made.write(tmp_path, spread_record(spread_cell("ddp", 2), [1.0]))
    assert main([str(tmp_path)]) == 0
    assert "ok (2 processes)" in capsys.readouterr().out


def test_losses_stand_beside_those_of_one_process_with_the_same_samples() -> None:
    records = [
        spread_record(spread_cell("single", 1, micro=2, steps=2), [4.0, 2.0]),
        spread_record(spread_cell("single", 1, micro=2, steps=4), [9.0, 9.0]),  # other samples
        spread_record(spread_cell("zero3", 2, micro=2, steps=1), [4.0, 2.5], share=0.5),
        spread_record(spread_cell("ddp", 2, micro=2, steps=1), [], status="oom"),
        spread_record(spread_cell("fsdp", 2, method="full"), [1.0, 1.0]),  # nothing beside it
    ]
    rows = [line.strip("| ").split(" | ") for line in losses_text(records).splitlines()[-3:]]
    told = {tuple(row[2:7]) for row in rows}
    assert told == {
        ("single", "4.00000", "2.00000", "–", "–"),
        ("single", "9.00000", "9.00000", "–", "–"),
        ("zero3", "4.00000", "2.50000", "2e-01", "50.0%"),  # 0.5 / 2.0 = 0.25
    }


def test_without_a_cell_of_one_process_no_losses_are_compared() -> None:
    assert losses_text([spread_record(spread_cell("zero3", 2), [1.0, 1.0])]) == ""
