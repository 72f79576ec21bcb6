"""Cells to predictions through a process that speaks the protocol: order, refusals, memory."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.records.prediction import Prediction
from launch.display.progress import PlainDisplay
from launch.display.schedule import PredictionCount
from launch.predict import predict as predicting
from launch.predict.overlays import Overlay
from launch.predict.predict import (
    TRAINS_NOTHING,
    PredictionOptions,
    checked_engine,
    predict,
    predictor,
)
from launch.predict.simulator_process import ROOT
from matrices.catalogue.gpus import gpu
from matrices.cell import Adapter, Cell, Data, Model, Train
from matrices.errors import UserError

STAND_INS = Path(__file__).parents[2] / "integration"
OK, INVALID, DIES, HANGS, CHATTY = range(5)  # stand_in_simulate's seeds
T4 = gpu("t4")


@pytest.fixture(autouse=True)
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predicting, "SIMULATE", "stand_in_simulate")
    monkeypatch.setenv("PYTHONPATH", str(STAND_INS))
    monkeypatch.setenv("TUNEBENCH_CACHE", str(tmp_path / "cache"))


def lora(seed: int = OK, rank: int = 8, **changes: Any) -> Cell:
    parts = {
        "method": "lora",
        "model": Model(name="llama-3.1-8b"),
        "adapter": Adapter(rank=rank),
        "data": Data(max_length=512),
        "train": Train(micro_batch_size=2),
        "seed": seed,
    }
    return Cell(**(parts | changes))


def statuses(found: list[Prediction]) -> list[str]:
    return [one.status for one in found]


class RecordingDisplay(PlainDisplay):
    """Keeps what a person would be shown."""

    def __init__(self) -> None:
        super().__init__()
        self.totals: list[int] = []
        self.cell_ids: list[str] = []

    @contextlib.contextmanager
    def predicting(self, total: int, last: str) -> Iterator[Callable[[Prediction], None]]:
        self.totals.append(total)
        yield lambda prediction: self.cell_ids.append(prediction.cell_id)


def test_answers_come_in_the_order_of_the_cells_whatever_order_they_came_in() -> None:
    cells = [lora(rank=rank) for rank in (64, 8, 32, 16)]
    display = RecordingDisplay()
    found = predict(cells, PredictionOptions(judge=(T4,)), display)
    assert [one.cell_id for one in found] == [cell.cell_id for cell in cells]
    assert display.cell_ids == [cell.cell_id for cell in reversed(cells)]
    # 8 GiB and a MiB for each of 2 x 512 tokens; the stand-in's arithmetic.
    assert {one.memory.peak_allocated_bytes for one in found} == {9 * 2**30}
    assert [one.verdicts[0].outcome for one in found] == ["fits"] * 4


def test_what_cannot_be_simulated_is_answered_without_a_process() -> None:
    display = RecordingDisplay()
    long = lora(data=Data(max_length=200_000))
    found = predict([Cell(method="base"), lora(), long], PredictionOptions(), display)
    assert statuses(found) == ["invalid", "predicted", "invalid"]
    assert found[0].reason == TRAINS_NOTHING
    assert "sequence-needs-positions: " in (found[2].reason or "")
    assert display.totals == [1]
    assert predict([Cell(method="base")], PredictionOptions(), display)[0].status == "invalid"
    assert display.totals == [1], "nothing to simulate starts nothing"


def test_a_cell_refused_by_the_simulation_is_that_cells_alone() -> None:
    found = predict([lora(INVALID), lora()], PredictionOptions(), PlainDisplay())
    assert [(one.status, one.reason) for one in found] == [
        ("invalid", "as the test asked"),
        ("predicted", None),
    ]


def test_a_process_that_dies_leaves_its_answers_and_its_last_words(tmp_path: Path) -> None:
    # It answers from the last to the first.
    found = predict([lora(rank=4), lora(DIES), lora()], PredictionOptions(), PlainDisplay())
    assert statuses(found) == ["failed", "failed", "predicted"]
    log = tmp_path / "cache/logs/simulate.txt"
    assert found[0].reason == (
        "the simulating process was killed by signal 9 (SIGKILL): RuntimeError: no such internals "
        f"(all it said: {log})"
    )
    assert log.read_text() == "RuntimeError: no such internals\n"


def test_what_libraries_print_is_no_answer() -> None:
    assert (
        statuses(predict([lora(CHATTY), lora()], PredictionOptions(), PlainDisplay()))
        == ["predicted"] * 2
    )


def test_one_process_answers_until_it_dies_or_the_context_ends() -> None:
    def processes() -> list[int]:
        return [child.pid for child in psutil.Process().children()]

    before = processes()
    with predictor(PredictionOptions(fresh=True), PlainDisplay()) as predict_cells:
        assert statuses(predict_cells([lora()])) == ["predicted"]
        first = processes()
        assert len(first) == len(before) + 1
        assert statuses(predict_cells([lora(CHATTY), lora(rank=4)])) == ["predicted"] * 2
        assert processes() == first
        assert statuses(predict_cells([lora(DIES)])) == ["failed"]
        assert processes() == before
        assert statuses(predict_cells([lora()])) == ["predicted"]
        assert len(processes()) == len(before) + 1
    assert processes() == before


def test_a_module_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predicting, "SIMULATE", "no_such_module")
    [found] = predict([lora()], PredictionOptions(), PlainDisplay())
    assert found.status == "failed"
    assert "exit code 1" in (found.reason or "")
    assert "No module named no_such_module" in (found.reason or "")


def overlay_of(directory: Path, **packages: str) -> Overlay:
    for name, version in packages.items():
        (directory / f"{name}-{version}.dist-info").mkdir(parents=True)
        (directory / f"{name}-{version}.dist-info/METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
    return Overlay((directory,))


def test_the_stack_is_executed_and_does_not_replace_tunebench(tmp_path: Path) -> None:
    over = overlay_of(tmp_path / "over", peft="0.0.1")
    # A stack that was made from an environment with tunebench in it.
    (tmp_path / "over/harness").mkdir()
    (tmp_path / "over/harness/__init__.py").write_text("raise ImportError('the wrong harness')")
    [here, there] = [
        predict([lora()], options, PlainDisplay())[0]
        for options in (PredictionOptions(), PredictionOptions(overlay=over))
    ]
    assert there.stack["peft"] == "0.0.1"
    assert here.stack["peft"] != "0.0.1"
    assert there.stack["torch"] == here.stack["torch"]
    assert there.stack["harness"] == str(ROOT / "harness/__init__.py")


def test_the_second_time_is_remembered_by_what_could_change_it(tmp_path: Path) -> None:
    display = RecordingDisplay()
    options = PredictionOptions(judge=(T4,))
    first = predict([lora(), lora(INVALID)], options, display)
    again = predict([lora(), lora(INVALID)], options, display)
    assert first == again
    assert display.totals == [2, 1], "what was not predicted is tried again"
    predict([lora()], PredictionOptions(judge=(T4,), workers=1), display)
    assert display.totals == [2, 1], "how many at once changes nothing"
    predict([lora(rank=16)], options, display)
    predict([lora()], PredictionOptions(judge=(gpu("l4"),)), display)
    predict([lora()], PredictionOptions(judge=(T4,), engine="fake-cpu"), display)
    predict(
        [lora()],
        PredictionOptions(judge=(T4,), overlay=overlay_of(tmp_path / "o", peft="1")),
        display,
    )
    predict([lora()], PredictionOptions(judge=(T4,), fresh=True), display)
    assert display.totals == [2, 1, 1, 1, 1, 1, 1]


def test_a_broken_memory_is_made_again(tmp_path: Path) -> None:
    display = RecordingDisplay()
    [first] = predict([lora()], PredictionOptions(), display)
    [file] = (tmp_path / "cache/predictions").glob("*.json")
    file.write_text("{")
    assert predict([lora()], PredictionOptions(), display) == [first]
    assert display.totals == [1, 1]
    assert json.loads(file.read_text())["cell_id"] == first.cell_id


def test_a_cache_that_cannot_be_written_costs_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TUNEBENCH_CACHE", str(tmp_path / "file"))
    assert statuses(predict([lora()], PredictionOptions(), PlainDisplay())) == ["predicted"]


def test_engines_are_checked() -> None:
    assert checked_engine(None) is None
    assert checked_engine("fake-cpu") == "fake-cpu"
    with pytest.raises(UserError, match="did you mean 'fake-cuda'"):
        checked_engine("cuda")


def test_what_a_person_reads_meanwhile(capsys: pytest.CaptureFixture[str]) -> None:
    predict([lora(), lora(rank=4)], PredictionOptions(), PlainDisplay())
    captured = capsys.readouterr()
    assert captured.out == ""
    first, last = captured.err.splitlines()
    assert first == "tunebench: predicting 0/2 · importing the stack · 0:00"
    assert last.startswith("tunebench: simulated 2 cells in 0:0")


def test_a_line_about_the_work_in_hand() -> None:
    count = PredictionCount(3, "importing the stack")
    [answer] = predict([lora()], PredictionOptions(), PlainDisplay())
    count.add(answer)
    assert " · ".join(count.parts()).startswith(
        "predicting 1/3 · lora r8 attention 2 x 512: 9.00 GiB · 0:0"
    )
