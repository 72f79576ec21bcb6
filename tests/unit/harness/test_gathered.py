"""One record out of two ranks' records, by hand-made figures."""

from __future__ import annotations

import pytest

from harness.gathered import by_rank, gather
from harness.provenance import new_record
from harness.record import PhaseMemory, RankState, Record, Tokens
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
    speed = record.speed
    speed.step_seconds, speed.warmup_steps = seconds, 1
    speed.tokens = Tokens(all=tokens, non_padding=tokens, loss=tokens)
    speed.samples_per_second = 4 / sum(seconds[1:])
    speed.flops_per_step = 100
    speed.tflops_per_second = 1.0
    speed.energy_joules = 5.0
    record.quality.train_loss = [float(rank + 1), 2.0, 3.0]
    return record


@pytest.fixture
def both() -> Record:
    first = of_rank(0, 1000, [9.0, 1.0, 3.0], 100.0)
    gather(first, [of_rank(1, 1500, [8.0, 2.0, 2.0], 60.0)])
    return first


def test_memory_is_kept_per_rank_and_the_highest_heads_it(both: Record) -> None:
    assert by_rank(both.memory.phases["backward"]) == [1000, 1500]
    assert both.memory.peak_bytes == 1500
    assert both.memory.by_category == {"weights": 1500}
    assert [state.rank for state in both.ranks] == [0, 1]


def test_tokens_are_summed_once_over_the_slowest_ranks_seconds(both: Record) -> None:
    assert both.speed.step_seconds == [9.0, 2.0, 3.0]
    assert both.speed.tokens == Tokens(all=160.0, non_padding=160.0, loss=160.0)
    assert both.speed.tokens_per_second is not None
    assert both.speed.tokens_per_second.all == pytest.approx(160 / 5)
    assert both.speed.samples_per_second == pytest.approx(8 / 5)
    assert both.speed.step_seconds_median == pytest.approx(2.5)


def test_operations_and_energy_are_everybodys(both: Record) -> None:
    assert both.speed.flops_per_step == 200
    assert both.speed.tflops_per_second == pytest.approx(200 * 2 / 5 / 1e12)
    assert both.speed.energy_joules == 10.0


def test_the_loss_is_the_mean_of_the_ranks(both: Record) -> None:
    assert both.quality.train_loss == [1.5, 2.0, 3.0]


def test_energy_that_one_rank_does_not_know_is_not_known() -> None:
    first, second = of_rank(0, 1, [1.0, 1.0, 1.0], 1.0), of_rank(1, 1, [1.0, 1.0, 1.0], 1.0)
    second.speed.energy_joules = None
    gather(first, [second])
    assert first.speed.energy_joules is None


def test_torchs_counter_stands_before_the_ledger() -> None:
    counted = PhaseMemory(ledger_peak_bytes=5, allocated_peak_bytes=7)
    assert by_rank([counted, PhaseMemory(ledger_peak_bytes=6), PhaseMemory()]) == [7, 6]
