"""Expected step times against factors that are known because they were put in."""

from __future__ import annotations

import math

import numpy as np
import pytest
from synthetic_results import CPU, trained

from harness.records.prediction import PredictedSpeed, Prediction
from harness.records.record import Record, RecordedPrediction
from harness.records.speed import Speed
from harness.records.stack import Hardware, Stack
from matrices.cell import Cell
from reports.predictions.step_time import (
    NOT_CALIBRATED,
    Step,
    device_name,
    expected,
    family,
    past_steps,
    with_expectation,
)
from reports.statistics.intervals import next_value_interval

GPU = Hardware(cpu="EPYC", cpu_count=8, host_memory_bytes=2**36, accelerator="NVIDIA Gadget")
LORA, QLORA, FULL = trained("lora"), trained("qlora"), trained("full")


def step(efficiency: float, floor: float = 1.0, kind: str = "lora") -> Step:
    """Took `floor / efficiency` seconds; ran 1000 operations per second of floor."""
    return Step(kind, int(1000 * floor), floor, floor / efficiency)


def test_next_value_by_hand() -> None:
    """Mean 2, s = 1, n = 3: t(2) at 97.5 % is 4.302653, times sqrt(1 + 1/3)."""
    found = next_value_interval([1.0, 2.0, 3.0], "steps")
    half = 4.302653 * math.sqrt(4 / 3)
    assert found.value == 2.0
    assert [found.low, found.high] == pytest.approx([2 - half, 2 + half], rel=1e-6)


def test_the_floor_over_the_geometric_mean_of_efficiencies() -> None:
    """0.2, 0.4 and 0.8 have the geometric mean 0.4; their logs a spread of ln 2."""
    past = [step(0.2, 1.0), step(0.4, 2.0), step(0.8, 3.0)]
    found = expected(PredictedSpeed(floor_seconds=6.0, flops_per_step=1), LORA, past)
    factor = math.exp(4.302653 * math.sqrt(4 / 3) * math.log(2))
    assert found.seconds == pytest.approx(15.0)
    assert found.low == pytest.approx(15.0 / factor, rel=1e-5)
    assert found.high == pytest.approx(15.0 * factor, rel=1e-5)
    assert found.n == 3
    assert "efficiency of 3 measured lora steps" in found.note


def test_own_family_when_it_has_three_else_all() -> None:
    others = [step(0.1, floor, "qlora") for floor in (1.0, 2.0, 3.0)]
    own = [step(0.5, floor) for floor in (1.0, 2.0, 3.0)]
    speed = PredictedSpeed(floor_seconds=1.0, flops_per_step=1)
    assert expected(speed, LORA, own + others).seconds == pytest.approx(2.0)
    two = expected(speed, LORA, own[:2] + others)
    assert two.seconds == pytest.approx((2.0**2 * 10.0**3) ** (1 / 5))
    assert two.n == 5


def test_repeats_of_one_step_are_one_observation() -> None:
    repeats = [step(0.4), step(0.4), step(0.9)]
    found = expected(PredictedSpeed(floor_seconds=1.0, flops_per_step=1), LORA, repeats)
    assert found.seconds == pytest.approx((1 / (0.4 * 0.4 * 0.9)) ** (1 / 3))
    assert (found.low, found.high, found.n) == (None, None, 1)
    assert "one measured step, which tells no interval" in found.note


def test_without_floors_the_rate_of_operations() -> None:
    """2000 operations in 4 s and 3000 in 6 s: 500 a second."""
    past = [Step("lora", 2000, None, 4.0), Step("lora", 3000, None, 6.0)]
    for floor in (None, 0.001):
        speed = PredictedSpeed(floor_seconds=floor, flops_per_step=10_000)
        found = expected(speed, LORA, past)
        assert found.seconds == pytest.approx(20.0)
        assert "operations per second of 2 measured steps" in found.note


def test_nothing_to_go_by_is_said() -> None:
    none = expected(PredictedSpeed(floor_seconds=1.0, flops_per_step=1), LORA, [])
    assert none == (None, None, None, 0, NOT_CALIBRATED)
    assert expected(PredictedSpeed(), LORA, [step(0.5)]).seconds is None


@pytest.mark.parametrize(("records", "sigma"), [(2, 0.3), (3, 0.05), (5, 0.3), (12, 0.1)])
def test_the_interval_holds_19_of_20_new_steps(records: int, sigma: float) -> None:
    """Efficiencies drawn log-normally around 0.35. A binomial count of 4000 has a standard
    deviation of 0.0034 at 0.95; four of them either way."""
    random = np.random.default_rng(11)
    hits = 0
    for _ in range(4000):
        drawn = 0.35 * np.exp(random.normal(0, sigma, records + 1))
        floors = random.uniform(0.1, 50, records + 1)
        past = [step(e, f) for e, f in zip(drawn[1:], floors[1:], strict=True)]
        speed = PredictedSpeed(floor_seconds=floors[0], flops_per_step=1)
        found = expected(speed, LORA, past)
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= floors[0] / drawn[0] <= found.high
    assert hits / 4000 == pytest.approx(0.95, abs=4 * 0.0034)


def record(cell: Cell, hardware: Hardware = CPU, **speed: float) -> Record:
    figures = {"flops_per_step": 5000, "tflops_per_second": 1e-9, "step_seconds_median": 2.0}
    return Record(
        cell_id=cell.cell_id,
        cell=cell,
        stack_id="0",
        stack=Stack(python="3.11", packages={}),
        hardware=hardware,
        command=[],
        status="ok",
        started="2026-01-01T00:00:00Z",
        speed=Speed.model_validate(figures | speed),
    )


def test_steps_of_this_device_that_ended_well_and_ran_full_length() -> None:
    short, failed = record(FULL), record(QLORA)
    short.speed.tflops_per_second = None
    failed.status = "failed"
    records = [record(LORA), short, failed, record(LORA, GPU)]
    assert past_steps(records, {device_name(CPU)}) == [Step("lora", 5000, None, 2.0)]
    assert past_steps(records, {"NVIDIA Gadget"}) == [Step("lora", 5000, None, 2.0)]
    assert past_steps(records, {"NVIDIA Gizmo"}) == []


def test_floors_count_for_the_device_they_were_predicted_for() -> None:
    told = record(LORA, GPU)
    told.prediction = RecordedPrediction(device="gadget", floor_seconds=0.5)
    for device, floor in (("gadget", 0.5), ("gizmo", None), (None, None)):
        assert [s.floor_seconds for s in past_steps([told], {"NVIDIA Gadget"}, device)] == [floor]


def test_cells_on_several_devices_are_a_family_of_their_own() -> None:
    spread = LORA.model_copy(update={"parallelism": "fsdp", "devices": 2})
    assert {family(LORA), family(QLORA), family(spread)} == {"lora", "qlora", "lora fsdp x2"}


def test_a_prediction_gets_its_expectation() -> None:
    prediction = Prediction(
        cell_id=LORA.cell_id,
        cell=LORA,
        stack={},
        status="predicted",
        speed=PredictedSpeed(flops_per_step=20_000, bytes_per_step=7),
    )
    speed = with_expectation(prediction, past_steps([record(LORA)], {device_name(CPU)})).speed
    assert speed.expected_seconds == pytest.approx(8.0)
    assert (speed.bytes_per_step, speed.calibration_records) == (7, 1)
    assert with_expectation(prediction, []).speed.note == NOT_CALIBRATED
