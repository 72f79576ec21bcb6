"""What a recorded loss was divided by, from hand-made steps."""

from __future__ import annotations

import pytest

from harness.meters import losses
from harness.records.speed import Steps


def steps(predicted: list[int], divisors: list[float | None], micro_batches: int = 1) -> Steps:
    return Steps(
        tokens_loss=predicted,
        loss_divisor=divisors,
        micro_batches=[micro_batches] * len(predicted),
    )


def test_a_step_without_a_label_has_no_loss() -> None:
    known = losses.labelled_losses([1.5, 0.0, 0.0, 2.5], [3, 0, 1, 2])
    assert known == [1.5, None, 0.0, 2.5]
    assert losses.explain_missing_losses(known) == (
        "no token carries a label in 1 of 4 steps (step 2): they have no loss"
    )
    assert losses.explain_missing_losses([1.5, 0.0]) is None


@pytest.mark.parametrize(
    ("ranks", "told"),
    [
        ([steps([20, 30], [20.0, 30.0])], None),
        # A step without labels says nothing, whatever it was divided by.
        ([steps([20, 0], [20.0, 3.0])], None),
        ([steps([20, 30], [50.0, 60.0]), steps([30, 30], [50.0, 60.0])], None),
        ([steps([57, 57], [60.0, 60.0])], "are 0.9500 of"),
        ([steps([20, 30], [20.0, 30.0]), steps([30, 31], [30.0, 31.0])], losses.RANK_MEANS),
        ([steps([20, 30], [None, None])], None),
        ([steps([20, 30], [None, None], micro_batches=2)], losses.MICRO_BATCH_MEANS),
        ([steps([20, 30], [10.0, 30.0])], "divided by 40 tokens where 50 are predicted"),
    ],
)
def test_normalization(ranks: list[Steps], told: str | None) -> None:
    found = losses.normalization(ranks)
    assert found is told is None or (told is not None and told in str(found))
