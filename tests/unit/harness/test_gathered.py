"""One record out of two ranks' records, by hand-made figures."""

from __future__ import annotations

import pytest

from harness.meters.speed import SHORTER_BATCHES
from harness.ranks.gather_records import gather, peaks_by_rank
from harness.records.memory import PhaseMemory
from harness.records.provenance import new_record
from harness.records.ranks import RankState
from harness.records.record import Record
from harness.records.speed import Steps, Tokens
from matrices.cell import Adapter, Cell, Data, Train

CELL = Cell(
    method="lora",
    adapter=Adapter(),
    data=Data(),
    train=Train(steps=3, warmup_steps=1),
    parallelism="ddp",
    devices=2,
)


def of_rank(rank: int, peak: int, seconds: list[float], tokens: float) -> Record:
    record = new_record(CELL, [])
    record.ranks = [RankState(rank=rank, world_size=2)]
    record.memory.phases = {"backward": [PhaseMemory(ledger_peak_bytes=peak)]}
    record.memory.peak_bytes, record.memory.headline = peak, "ledger"
    record.memory.peak_phase = "backward"
    record.memory.by_category = {"weights": peak}
    record.memory.ledger_peak_bytes, record.memory.ledger_peak_phase = peak, "backward"
    speed = record.speed
    speed.step_seconds, speed.warmup_steps = seconds, 1
    speed.tokens = Tokens(all=tokens, non_padding=tokens, loss=tokens)
    record.steps = Steps(
        micro_batches=[2, 1, 1],
        samples=[4, 2, 2 - rank],
        tokens_all=[30, 30, 30],
        tokens_non_padding=[30, 20, 20],
        tokens_loss=[20, 0, 10 * rank],
        epoch=[0.5, 1.0, 1.5],
        learning_rate=[0.1, 0.2, 0.3],
        gradient_norm=[1.0, 2.0, 3.0],
        loss_divisor=[40.0, 0.0, 10.0],
        skipped_updates=[1] if rank else [],
    )
    speed.flops_per_step = 100
    speed.tflops_per_second = 1.0
    speed.energy_joules = 5.0
    record.quality.train_loss = [float(rank + 1), 0.0, 6.0 * rank]
    return record


@pytest.fixture
def both() -> Record:
    first = of_rank(0, 1000, [9.0, 1.0, 3.0], 100.0)
    gather(first, [of_rank(1, 1500, [8.0, 2.0, 2.0], 60.0)])
    return first


def test_memory_is_kept_per_rank_and_the_highest_heads_it(both: Record) -> None:
    assert peaks_by_rank(both.memory.phases["backward"]) == [1000, 1500]
    assert both.memory.peak_bytes == 1500
    assert both.memory.by_category == {"weights": 1500}
    assert [state.rank for state in both.ranks] == [0, 1]


def test_tokens_are_summed_once_over_the_slowest_ranks_seconds(both: Record) -> None:
    assert both.speed.step_seconds == [9.0, 2.0, 3.0]
    assert both.speed.tokens == Tokens(all=160.0, non_padding=160.0, loss=160.0)
    assert both.speed.tokens_per_second is not None
    assert both.speed.tokens_per_second.all == pytest.approx(160 / 5)
    assert both.speed.samples_per_second == pytest.approx((4 + 3) / 5)
    assert both.speed.step_seconds_median == pytest.approx(2.5)


def test_operations_and_energy_are_everybodys(both: Record) -> None:
    assert both.speed.flops_per_step == 200
    assert both.speed.tflops_per_second == pytest.approx(200 * 2 / 5 / 1e12)
    assert both.speed.energy_joules == 10.0


def test_the_loss_is_the_mean_of_the_ranks(both: Record) -> None:
    """No rank has a label in the second step; one of them has none in the third."""
    assert both.quality.train_loss == [1.5, None, 3.0]
    assert "step 2" in both.missing["quality.train_loss"]
    assert both.verified.loss_normalization is None


def test_each_ranks_counts_are_summed(both: Record) -> None:
    steps = both.steps
    assert (steps.micro_batches, steps.samples) == ([4, 2, 2], [8, 4, 3])
    assert (steps.tokens_all, steps.tokens_loss) == ([60] * 3, [40, 0, 10])
    assert (steps.epoch, steps.gradient_norm) == ([0.5, 1.0, 1.5], [1.0, 2.0, 3.0])
    assert steps.skipped_updates == [1]


def test_operations_of_shorter_batches_on_another_rank_are_no_rate() -> None:
    first, second = of_rank(0, 1, [1.0] * 3, 1.0), of_rank(1, 1, [1.0] * 3, 1.0)
    second.speed.tflops_per_second = None
    second.missing["speed.tflops_per_second"] = SHORTER_BATCHES
    gather(first, [second])
    assert first.speed.tflops_per_second is None
    assert first.missing["speed.tflops_per_second"] == SHORTER_BATCHES


def test_peak_phase_and_categories_are_of_one_rank() -> None:
    """Torch's counter heads it; the ledger has its peak elsewhere, and says where."""
    first, second = of_rank(0, 1000, [1.0] * 3, 1.0), of_rank(1, 900, [1.0] * 3, 1.0)
    second.memory.headline, second.memory.peak_bytes = "cuda_allocated", 1200
    second.memory.peak_phase, second.memory.timed_peak_bytes = "optimizer_step", 1100
    first.memory.timed_peak_bytes = 1300
    gather(first, [second])
    memory = first.memory
    assert (memory.peak_bytes, memory.peak_phase) == (1200, "optimizer_step")
    assert (memory.ledger_peak_bytes, memory.ledger_peak_phase) == (900, "backward")
    assert sum(memory.by_category.values()) == memory.ledger_peak_bytes
    assert memory.timed_peak_bytes == 1300


def test_energy_that_one_rank_does_not_know_is_not_known() -> None:
    first, second = of_rank(0, 1, [1.0, 1.0, 1.0], 1.0), of_rank(1, 1, [1.0, 1.0, 1.0], 1.0)
    second.speed.energy_joules = None
    gather(first, [second])
    assert first.speed.energy_joules is None


def test_torchs_counter_stands_before_the_ledger() -> None:
    counted = PhaseMemory(ledger_peak_bytes=5, allocated_peak_bytes=7)
    assert peaks_by_rank([counted, PhaseMemory(ledger_peak_bytes=6), PhaseMemory()]) == [7, 6]
