"""The speed part of a record, from hand-made steps: totals over totals, warm-up left out."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harness.meters import speed
from harness.meters import steps as steps_module
from harness.meters.energy import Energy
from harness.meters.foreign_cpu import foreign_share
from harness.meters.rates import TokenCount
from harness.meters.steps import Diverged, StepClock, highest_figures
from harness.records.memory import PhaseMemory
from harness.records.provenance import new_record
from harness.records.record import Record
from harness.train import StepFacts
from matrices.cell import Cell, Data, Train


def record_of(flops: int | None = None, max_length: int = 100, **train: Any) -> Record:
    settings = {"steps": 5, "warmup_steps": 2, "micro_batch_size": 1} | train
    cell = Cell(method="full", data=Data(max_length=max_length), train=Train(**settings))
    record = new_record(cell, ["true"])
    record.speed.flops_per_step = flops
    return record


def steps(
    seconds: list[float], counts: list[TokenCount] | None = None, joules: float | None = None
) -> Any:
    counts = COUNTS[: len(seconds)] if counts is None else counts
    return SimpleNamespace(
        seconds=seconds,
        losses=[2.0] * len(seconds),
        counts=counts,
        divisors=[float(count.loss) for count in counts],
        facts=[StepFacts(0.5 * n, 0.1, 1.5, False) for n, _ in enumerate(seconds, start=1)],
        meter_seconds=0.25,
        energy=lambda: Energy(joules, None if joules is not None else "no counter"),
        foreign_cpu_share=lambda: 0.125,
    )


SECONDS = [9.0, 7.0, 1.0, 2.0, 5.0]
COUNTS = [
    TokenCount(100, 100, 99, 1),
    TokenCount(100, 90, 89, 1),
    TokenCount(100, 100, 99, 1),
    TokenCount(100, 50, 49, 1),
    TokenCount(100, 30, 29, 1),
]


def test_rates_are_totals_over_totals_of_the_timed_steps() -> None:
    """Timed: 1 + 2 + 5 = 8 s, 300 tokens, 180 of them text, 177 with a label, 3 samples. The mean
    of the steps' rates would be (100 + 25 + 6) / 3 = 43.7 text tokens a second, not 22.5."""
    record = record_of()
    speed.fill_speed(record, steps(SECONDS, joules=40.0))
    found = record.speed
    assert found.tokens is not None
    assert found.tokens_per_second is not None
    assert (found.tokens.all, found.tokens.non_padding, found.tokens.loss) == (300, 180, 177)
    assert found.tokens_per_second.all == 300 / 8
    assert found.tokens_per_second.non_padding == 22.5
    assert found.tokens_per_second.loss == 177 / 8
    assert found.samples_per_second == 3 / 8
    assert found.step_seconds == SECONDS
    assert found.warmup_steps == 2
    # Of 1, 2 and 5: the middle, and half-way to either neighbour.
    assert (found.step_seconds_q1, found.step_seconds_median, found.step_seconds_q3) == (
        1.5,
        2,
        3.5,
    )
    assert (found.energy_joules, found.meter_seconds) == (40.0, 0.25)
    assert record.quality.train_loss == [2.0] * 5


def test_the_table_balances() -> None:
    """tokens = rate x time, for every kind of token."""
    record = record_of(warmup_steps=1)
    speed.fill_speed(record, steps(SECONDS))
    seconds = math.fsum(record.speed.step_seconds[record.speed.warmup_steps :])
    tokens, rates = record.speed.tokens, record.speed.tokens_per_second
    assert tokens is not None
    assert rates is not None
    for kind in ("all", "non_padding", "loss"):
        assert getattr(rates, kind) * seconds == pytest.approx(getattr(tokens, kind), rel=1e-12)


def test_steps_are_filed_as_they_were_counted() -> None:
    """Steps of 3 and, at an epoch's end, 1 micro batch; the middle one learns nothing."""
    record = record_of(gradient_accumulation_steps=3, steps=3, warmup_steps=0)
    counts = [
        TokenCount(60, 50, 44, 6, 3),
        TokenCount(20, 20, 0, 2, 1),
        TokenCount(60, 60, 54, 6, 3),
    ]
    speed.fill_speed(record, steps([1.0, 1.0, 2.0], counts))
    found = record.steps
    assert (found.micro_batches, found.samples) == ([3, 1, 3], [6, 2, 6])
    assert (found.tokens_all, found.tokens_non_padding) == ([60, 20, 60], [50, 20, 60])
    assert (found.tokens_loss, found.loss_divisor) == ([44, 0, 54], [44.0, 0.0, 54.0])
    assert (found.epoch, found.gradient_norm) == ([0.5, 1.0, 1.5], [1.5] * 3)
    assert record.speed.samples_per_second == 14 / 4
    assert record.quality.train_loss == [2.0, None, 2.0]
    assert "1 of 3 steps (step 2)" in record.missing["quality.train_loss"]
    assert record.verified.loss_normalization is None


def test_timing_warmup_is_the_schedules_unless_said() -> None:
    assert speed.warmup_steps(Train(warmup_steps=3)) == 3
    assert speed.warmup_steps(Train(warmup_steps=3, timing_warmup_steps=0)) == 0
    record = record_of(timing_warmup_steps=0)
    speed.fill_speed(record, steps([1.0, 3.0]))
    assert record.speed.tokens_per_second is not None
    assert record.speed.tokens_per_second.all == 50.0


@pytest.mark.parametrize("seconds", [[], [9.0], [9.0, 7.0]])
def test_nothing_but_warmup_gives_reasons_not_numbers(seconds: list[float]) -> None:
    record = record_of()
    speed.fill_speed(record, steps(seconds))
    found = record.speed
    assert found.step_seconds == seconds
    assert found.tokens is found.tokens_per_second is found.samples_per_second is None
    assert found.step_seconds_median is found.tflops_per_second is found.energy_joules is None
    assert record.missing["speed.tokens_per_second"] == speed.TOO_SHORT


def test_a_run_cut_short_keeps_the_steps_it_has() -> None:
    record = record_of()
    speed.fill_speed(record, steps([9.0, 7.0, 4.0]))
    assert record.speed.tokens is not None
    assert record.speed.tokens.non_padding == 100
    assert "speed.tokens_per_second" not in record.missing


def test_a_missing_energy_counter_is_a_reason() -> None:
    record = record_of()
    speed.fill_speed(record, steps(SECONDS))
    assert record.speed.energy_joules is None
    assert record.missing["speed.energy_joules"] == "no counter"


def test_operations_stand_for_steps_as_long_as_those_counted() -> None:
    """3 timed steps of 2e12 operations in 8 s: 0.75e12 a second; not when a batch was shorter."""
    record = record_of(flops=2 * 10**12)
    speed.fill_speed(record, steps(SECONDS))
    assert record.speed.tflops_per_second == 0.75
    assert record.speed.mfu is None
    assert record.missing["speed.mfu"] == speed.NO_PEAK_RATE
    shorter = record_of(flops=2 * 10**12)
    speed.fill_speed(shorter, steps(SECONDS, [*COUNTS[:4], TokenCount(99, 30, 29, 1)]))
    assert shorter.speed.tflops_per_second is None
    assert "shorter" in shorter.missing["speed.tflops_per_second"]


BATCH = {"input_ids": torch.ones(1, 3), "labels": torch.ones(1, 3)}


def test_the_clock_keeps_losses_and_leaves_reporting_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 3, 5 and 4 s, each followed by 100 s of reporting that is in none of them."""
    now = [50.0]

    def report(*_: Any) -> None:
        now[0] += 100.0

    monkeypatch.setattr(steps_module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    clock = StepClock(1, report)
    clock.train_begin(None)
    work = [(3.0, (0.5, 0.25)), (5.0, (1.0, 2.0)), (4.0, (0.125, 0.0))]
    for number, (seconds, parts) in enumerate(work, start=1):
        for part in parts:
            clock.micro_batch(BATCH)
            clock.phase("forward")
            now[0] += seconds / 2
            clock.micro_batch_end(torch.tensor(part))
        clock.step_end(number)
    assert clock.seconds == [3.0, 5.0, 4.0]
    assert clock.losses == [0.75, 3.0, 0.125]
    assert clock.counts == [TokenCount(6, 6, 4, 2, 2)] * 3
    assert clock.meter_seconds == 300.0


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_run_and_is_kept(loss: float) -> None:
    seen: list[int] = []
    clock = StepClock(0, lambda step, *_: seen.append(step))
    clock.train_begin(None)
    clock.micro_batch_end(torch.tensor(1.0))
    clock.step_end(1)
    clock.micro_batch_end(torch.tensor(loss))
    with pytest.raises(Diverged, match="step 2"):
        clock.step_end(2)
    assert seen == [1]
    assert str(clock.losses) == str([1.0, loss])
    assert len(clock.seconds) == 2


def test_foreign_share() -> None:
    """2 processors for 10 s: 20 s; 9 s were busy, 6 of them ours."""
    assert foreign_share(9.0, 6.0, 20.0) == 0.15
    # Clock ticks may make ours the larger.
    assert foreign_share(5.99, 6.0, 20.0) == 0.0
    assert foreign_share(0.0, 0.0, 0.0) is None


def test_the_higher_reading_stands_figure_by_figure() -> None:
    one = PhaseMemory(allocated_peak_bytes=5, host_peak_rss_bytes=9)
    other = PhaseMemory(allocated_peak_bytes=7, host_peak_rss_bytes=3, device_bytes=1)
    assert highest_figures(one, other) == PhaseMemory(
        allocated_peak_bytes=7, host_peak_rss_bytes=9, device_bytes=1
    )
