"""The worker's record while it is made: statuses from real errors, and what is on disk when."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from harness import measurement as measurement_module
from harness.measurement import Measurement, status_of
from harness.meters.steps import Diverged
from harness.records.provenance import new_record
from harness.records.reading import read_record
from harness.records.record import Record
from harness.system.interrupts import Interrupted
from matrices.cell import Cell
from matrices.errors import UserError

# 2 PiB: more than a process can address, so that no machine gives it, whatever it overcommits.
ABSURD = 2**51


@pytest.fixture
def measurement(tmp_path: Path) -> Measurement:
    return Measurement(new_record(Cell(method="base"), ["run", "me"]), tmp_path)


def on_disk(measurement: Measurement) -> Record:
    return read_record(measurement.output_dir / "record.json")


def progress(measurement: Measurement) -> dict[str, object]:
    found: dict[str, object] = json.loads((measurement.output_dir / "progress.json").read_text())
    return found


def fail_with(measurement: Measurement, error: BaseException) -> Record:
    with pytest.raises(type(error)) as caught:
        raise error
    assert measurement.fail(caught.value) == 1
    return on_disk(measurement)


def test_torch_out_of_memory_keeps_phase_and_bytes(
    measurement: Measurement, capsys: pytest.CaptureFixture[str]
) -> None:
    measurement.enter("load")
    measurement.record.speed.load_seconds = 1.5
    measurement.enter("memory_steps")
    with pytest.raises(RuntimeError) as caught:
        torch.empty(ABSURD, dtype=torch.uint8)
    assert measurement.fail(caught.value) == 1
    found = on_disk(measurement)
    assert found.status == "oom"
    assert found.ended is not None
    assert found.failure is not None
    assert found.failure.phase == "memory_steps"
    assert found.failure.requested_bytes == ABSURD
    assert found.reason is not None
    assert found.reason.startswith("memory_steps: ")
    # What was measured until then is still there.
    assert found.speed.load_seconds == 1.5
    assert "Traceback" in capsys.readouterr().err


def test_memory_error_without_words(measurement: Measurement) -> None:
    measurement.enter("data")
    found = fail_with(measurement, MemoryError())
    assert found.failure is not None
    assert (found.status, found.reason) == ("oom", "data: MemoryError")
    assert (found.failure.type, found.failure.requested_bytes) == ("MemoryError", None)


def test_diverged_keeps_the_losses_that_are_no_numbers(measurement: Measurement) -> None:
    """JSON has no NaN; the record must stay valid JSON and read back."""
    measurement.enter("train")
    measurement.record.quality.train_loss = [2.5, math.inf, math.nan]
    found = fail_with(measurement, Diverged("the loss of step 3 is nan"))
    assert (found.status, found.reason) == ("diverged", "train: the loss of step 3 is nan")
    assert found.quality.train_loss[:2] == [2.5, math.inf]
    assert found.quality.train_loss[2] is not None
    assert math.isnan(found.quality.train_loss[2])

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    json.loads((measurement.output_dir / "record.json").read_text(), parse_constant=refuse)


def test_steps_are_saved_for_a_share_of_the_time(
    measurement: Measurement, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Filling takes 0.1 s here, so 5 s pass before the next time."""
    now = [100.0]
    monkeypatch.setattr("harness.measurement.time", SimpleNamespace(monotonic=lambda: now[0]))
    filled: list[float] = []

    def fill() -> None:
        filled.append(now[0])
        now[0] += 0.1

    for moment in (100.0, 101.0, 104.9, 105.2, 106.0):
        now[0] = moment
        measurement.save_steps(fill)
    assert filled == [100.0, 105.2]


def test_interrupted(measurement: Measurement, capsys: pytest.CaptureFixture[str]) -> None:
    measurement.enter("evaluation")
    found = fail_with(measurement, Interrupted("stopped by SIGTERM"))
    assert (found.status, found.reason) == ("interrupted", "evaluation: stopped by SIGTERM")
    assert "Traceback" not in capsys.readouterr().err


def test_interrupted_passes_through_handlers_of_exception() -> None:
    assert not issubclass(Interrupted, Exception)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("first line\nsecond line"), "first line"),
        (KeyError("weights"), "'weights'"),
        (RuntimeError(""), "RuntimeError"),
        (UserError("no such column", key="data.text_column"), "data.text_column: no such column"),
    ],
)
def test_failure_says_its_first_line(
    measurement: Measurement, error: Exception, message: str
) -> None:
    measurement.enter("train")
    found = fail_with(measurement, error)
    assert (found.status, found.reason) == ("failed", f"train: {message}")
    assert found.failure is not None
    assert (found.failure.type, found.failure.message) == (type(error).__name__, message)
    assert found.failure.requested_bytes is None


def test_other_statuses() -> None:
    assert status_of(torch.OutOfMemoryError("CUDA out of memory. Tried")) == "oom"
    # Ctrl-C of a worker started by hand.
    assert status_of(KeyboardInterrupt()) == "interrupted"


def test_every_phase_is_on_disk_before_it_begins(measurement: Measurement) -> None:
    measurement.enter("load", "the model")
    first = on_disk(measurement)
    assert (first.phase, first.status, first.ended) == ("load", "interrupted", None)
    assert first.reason == "still running"
    assert (progress(measurement)["phase"], progress(measurement)["message"]) == (
        "load",
        "the model",
    )
    measurement.record.speed.load_seconds = 2.0
    assert on_disk(measurement).speed.load_seconds is None
    measurement.enter("train")
    assert (on_disk(measurement).phase, on_disk(measurement).speed.load_seconds) == ("train", 2.0)


def test_finish(measurement: Measurement) -> None:
    measurement.enter("evaluation")
    assert measurement.finish("ok") == 0
    found = on_disk(measurement)
    assert (found.status, found.reason) == ("ok", None)
    assert found.ended is not None
    assert found.ended >= found.started
    assert found.command == ["run", "me"]
    assert measurement.finish("skipped", "why") == 1


def test_a_save_that_is_cut_short_leaves_the_old_record(
    measurement: Measurement, monkeypatch: pytest.MonkeyPatch
) -> None:
    measurement.enter("load")
    before = (measurement.output_dir / "record.json").read_bytes()

    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        measurement.record.phase = "train"
        with pytest.raises(OSError, match="No space"):
            measurement.save()
    assert (measurement.output_dir / "record.json").read_bytes() == before
    files = sorted(path.name for path in measurement.output_dir.iterdir() if path.is_file())
    assert files == ["progress.json", "record.json"]


def test_progress_is_written_now_and_then(
    measurement: Measurement, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a second apart, but at once when a phase begins."""
    now = [100.0]
    monkeypatch.setattr(measurement_module.time, "monotonic", lambda: now[0])
    measurement.enter("train")
    measurement.progress(step=1, steps=9, loss=2.5, tokens_per_second=10.0)
    assert progress(measurement)["step"] is None
    now[0] += 0.6
    measurement.progress(step=2, steps=9, loss=2.25, tokens_per_second=11.0)
    found = progress(measurement)
    assert isinstance(found.pop("updated"), float)
    assert found == {
        "phase": "train",
        "message": "",
        "step": 2,
        "steps": 9,
        "loss": 2.25,
        "tokens_per_second": 11.0,
    }
