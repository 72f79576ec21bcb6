"""Which meter's figure heads a record, and what is kept of the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harness import device, phases, worker
from harness.meters import speed
from harness.meters.steps import CounterSteps
from harness.records.memory import PhaseMemory
from harness.records.provenance import new_record
from harness.records.reading import read_record
from harness.records.record import Record
from matrices.cell import Adapter, Cell, Data, Evaluate, Model, Train

PHASES = ("forward", "backward", "optimizer_step")


def measured_by_ledger() -> Record:
    record = new_record(Cell(method="base"), [])
    for phase, peak in zip(PHASES, (1000, 3000, 2000), strict=True):
        reading = PhaseMemory(ledger_peak_bytes=peak, ledger_end_bytes=10, allocated_peak_bytes=9)
        record.memory.phases[phase] = [reading]
    record.memory.headline, record.memory.peak_bytes = "ledger", 3000
    return record


def test_counters_without_the_ledger_replace_those_under_it() -> None:
    record = measured_by_ledger()
    steps = CounterSteps()
    steps.readings = {
        phase: PhaseMemory(allocated_peak_bytes=peak)
        for phase, peak in zip(PHASES, (1100, 2900, 3300), strict=True)
    }
    phases._record_counters(record, steps)
    assert record.memory.headline == "cuda_allocated"
    assert (record.memory.peak_bytes, record.memory.peak_phase) == (3300, "optimizer_step")
    found = {phase: record.memory.phases[phase][0] for phase in PHASES}
    assert [found[p].allocated_peak_bytes for p in PHASES] == [1100, 2900, 3300]
    assert [found[p].ledger_peak_bytes for p in PHASES] == [1000, 3000, 2000]


def test_without_counters_the_ledger_heads_the_record() -> None:
    record = measured_by_ledger()
    for phase in PHASES:
        record.memory.phases[phase][0].allocated_peak_bytes = None
    phases._choose_headline(record)
    assert (record.memory.headline, record.memory.peak_bytes) == ("ledger", 3000)


def test_a_peak_of_the_timed_steps_stays_beside_the_headline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record = measured_by_ledger()
    phases._choose_headline(record)
    before = record.memory.model_copy()
    monkeypatch.setattr(device, "peaks", lambda: device.Peaks(5000, 6000))
    speed.record_device_peak(record)
    assert record.memory.timed_peak_bytes == 5000
    assert record.memory.model_copy(update={"timed_peak_bytes": None}) == before


def test_counter_steps_keep_the_highest_of_each_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter([5, 7, 6])
    monkeypatch.setattr(
        "harness.meters.steps.read_phase",
        lambda: PhaseMemory(allocated_peak_bytes=next(peaks)),
    )
    with CounterSteps() as steps:
        for phase in ("forward", "backward", "forward"):
            steps.phase(phase)
    assert {name: r.allocated_peak_bytes for name, r in steps.readings.items()} == {
        "forward": 6,
        "backward": 7,
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_ledger_and_counter_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both count 512-byte blocks of the same tensors; what the ledger cannot see (cuBLAS
    workspaces, scratch inside kernels) is bounded."""
    monkeypatch.setenv("TUNEBENCH_CACHE", str(tmp_path / "cache"))
    cell = Cell(
        method="lora",
        model=Model(name="tiny-llama"),
        adapter=Adapter(rank=4),
        data=Data(max_length=64),
        train=Train(steps=2, warmup_steps=1),
        evaluate=Evaluate(tasks=(), sample_prompts=()),
    )
    (tmp_path / "cell.json").write_text(cell.model_dump_json())
    assert worker.run(tmp_path / "cell.json", tmp_path) == 0
    memory = read_record(tmp_path / "record.json").memory
    assert memory.headline == "cuda_allocated"
    for phase in PHASES:
        [reading] = memory.phases[phase]
        assert reading.ledger_peak_bytes is not None
        assert reading.allocated_peak_bytes is not None
        assert reading.allocated_peak_bytes >= reading.ledger_peak_bytes
        assert reading.allocated_peak_bytes - reading.ledger_peak_bytes < 64 * 2**20
