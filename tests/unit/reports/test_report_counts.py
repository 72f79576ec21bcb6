"""Steps, rows and losses as they were counted: in `show`, captions, columns and comparisons."""

from __future__ import annotations

from pathlib import Path

import pytest
import synthetic_results as made
from compatibility import losses_text

from harness.records.memory import Memory
from harness.records.record import Record
from harness.records.speed import Preparation, Steps
from harness.records.verified import Verified
from reports.records.columns import COLUMNS
from reports.records.load import Result
from reports.records.steps_text import data_text, loss_text
from reports.show.record import show
from reports.statistics.intervals import NotComparable
from reports.tables.parallelism import _gap

BY_NAME = {column.name: column for column in COLUMNS}
OTHER_QUANTITY = "divided by 60 labels where 57 are predicted"


def counted() -> Record:
    """Twelve rows, half of which lose their completion; the second of three steps has no label."""
    cell = made.trained("lora", completion_only_loss=True, max_length=64, packing=False)
    record = made.record(cell)
    record.preparation = Preparation(
        rows_read=12, rows_kept=6, rows_truncated=0, rows_dropped=6, rows_cut_off=6,
        sequences=6, tokens_read=690, tokens=60, loss_tokens=30,
    )  # fmt: skip
    record.steps = Steps(
        micro_batches=[4, 2, 4],
        samples=[8, 4, 8],
        epoch=[0.67, 1.0, 1.67],
        learning_rate=[0.0, 2e-4, 1e-4],
        gradient_norm=[0.75, None, 0.5],
        skipped_updates=[2],
    )
    record.quality = record.quality.model_copy(update={"train_loss": [3.0, None, 1.5]})
    record.verified = Verified(loss_normalization=OTHER_QUANTITY)
    return record


def shown(record: Record) -> str:
    return " ".join(show(Result(record, Path("there")), {}).split())


def test_show_tells_what_was_counted() -> None:
    text = shown(counted())
    for told in (
        "12 rows read, 6 kept; 6 of 12 lose their completion at 64 tokens and are dropped",
        "690 before cutting, 60 in 6 sequences, 30 of them predicted",
        "3: 2 of 4 micro batches and 8 samples, 1 of 2 micro batches and 4 samples",
        "epochs 1.67",
        "0 → 0.0001, highest 0.0002",
        "0.75 → 0.5, highest 0.75",
        "1 step changed no weight, as gradients overflowed: 2",
        "3.0000 → 1.5000 in 3 steps; 1 step without a label",
        OTHER_QUANTITY,
    ):
        assert told in text


def test_show_tells_nothing_of_a_record_made_before() -> None:
    record = made.record(made.trained("lora"))
    text = show(Result(record, Path("there")), {})
    assert "as it was prepared" not in text
    assert "as they were counted" not in text


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rows_kept": 12, "rows_dropped": 0, "rows_cut_off": 0, "rows_truncated": 5},
         "12 rows read, 12 kept; 5 of 12 truncated at 64 tokens"),
        ({"rows_dropped": 6, "rows_cut_off": 4},
         "12 rows read, 6 kept; 4 of 12 lose their completion at 64 tokens and are dropped; "
         "2 of 12 dropped: they have no token with a label"),
        ({"rows_kept": None, "rows_dropped": None, "rows_cut_off": None, "rows_truncated": None},
         ""),
    ],
)  # fmt: skip
def test_a_caption_tells_of_lost_rows_only(changes: dict[str, int | None], told: str) -> None:
    record = counted()
    assert record.preparation is not None
    record.preparation = record.preparation.model_copy(update=changes)
    assert data_text([record, made.record(made.trained("full"))]) == (told and f"Data: {told}.")


def test_a_caption_says_that_losses_are_two_quantities() -> None:
    one, other = counted(), made.record(made.trained("full"))
    assert loss_text([other]) == ""
    assert OTHER_QUANTITY in loss_text([one])
    assert "1 of 2 runs, not to be compared" in loss_text([one, other])


def test_columns_of_what_was_counted() -> None:
    record = counted()
    figures = {"preparation.rows_dropped": 6, "steps.epochs": 1.67, "steps.samples": 20}
    assert {name: BY_NAME[name].value(record) for name in figures} == figures
    record.quality.train_loss.append(None)
    assert BY_NAME["quality.train_loss_final"].value(record) is None


def test_losses_are_compared_where_they_are_one_quantity() -> None:
    one, other = counted(), counted()
    other.quality.train_loss = [3.0, None, 1.25]
    assert _gap(one, other) == 0.25
    other.quality.train_loss = [3.0, 0.0, 1.25]
    with pytest.raises(NotComparable, match="without any label"):
        _gap(one, other)
    other.quality.train_loss = [3.0, None, 1.25]
    other.verified = Verified()
    with pytest.raises(NotComparable, match="not divided by the same"):
        _gap(one, other)
    assert "3.00000 | 1.50000" in losses_text([one])


def test_a_higher_peak_of_the_timed_steps_is_told_beside_the_headline() -> None:
    record = counted()
    record.memory = Memory(
        headline="cuda_allocated", peak_bytes=2**20, peak_phase="backward",
        ledger_peak_bytes=2**19, ledger_peak_phase="forward", by_category={"weights": 2**19},
        timed_peak_bytes=2**21,
    )  # fmt: skip
    text = shown(record)
    assert "peak 1.0 MiB in backward" in text
    assert "timed steps 2.0 MiB: higher, in a phase that is not known" in text
    assert "at the ledger's training peak, 512.0 KiB in forward" in text
