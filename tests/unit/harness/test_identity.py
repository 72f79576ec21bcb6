"""The worker measures what its cell was planned with, or nothing."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from harness.records.reading import read_record
from harness.records.record import Record
from harness.verify import identity
from matrices.cell import Cell, Data, Evaluate, Model, Train
from matrices.files.fingerprint import fingerprint


@pytest.fixture
def own_model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A local copy of tiny-llama, with rows beside it."""
    shutil.copytree(tiny_llama, tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"text": "one two three"}\n' * 8)
    return tmp_path / "model"


def planned(directory: Path) -> Cell:
    rows = directory.parent / "rows.jsonl"
    return Cell(
        method="full",
        model=Model(name=str(directory), fingerprint=fingerprint(directory)),
        data=Data(source=str(rows), fingerprint=fingerprint(rows)),
        train=Train(steps=2),
        evaluate=Evaluate(tasks=(), sample_prompts=()),
    )


@pytest.fixture
def _own_signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def measure(cell: Cell, output: Path) -> Record:
    from harness import worker

    (output.parent / "cell.json").write_text(cell.model_dump_json())
    assert worker.run(output.parent / "cell.json", output) == 1
    return read_record(output / "record.json")


def test_what_changed_after_planning_is_named(own_model: Path) -> None:
    cell = planned(own_model)
    identity.check(cell)
    rows = own_model.parent / "rows.jsonl"
    with rows.open("a") as out:
        out.write('{"text": "four"}\n')
    with pytest.raises(identity.ChangedError) as caught:
        identity.check(cell)
    assert cell.data is not None
    assert str(caught.value).startswith(f"the data {rows} changed after the cell was planned")
    assert str(cell.data.fingerprint)[:12] in str(caught.value)
    assert fingerprint(rows)[:12] in str(caught.value)


@pytest.mark.usefixtures("_own_signals")
def test_a_cell_of_other_weights_fails_before_it_trains(own_model: Path, tmp_path: Path) -> None:
    cell = planned(own_model)
    file = own_model / "model.safetensors"
    state = {f"foo.{name}": tensor for name, tensor in load_file(file).items()}
    save_file(state, file, {"format": "pt"})

    record = measure(cell, tmp_path / "changed")
    assert record.status == "failed"
    assert record.reason is not None
    assert record.reason.startswith(f"load: the model {own_model} changed after the cell")

    # Planned as it is: every weight would be random.
    record = measure(planned(own_model), tmp_path / "random")
    assert (record.status, record.memory.peak_bytes) == ("failed", None)
    assert record.failure is not None
    assert record.failure.type == "WeightsError"
    assert "would be random: lm_head.weight" in str(record.reason)
    assert "there under 'foo.' instead of ''" in str(record.reason)


def test_preflight_looks_at_the_files_and_at_every_name(own_model: Path, tmp_path: Path) -> None:
    """Each cell of a broken model is named, and those of a whole one are not."""
    from harness.preflight import preflight

    for name in ("cut", "foreign", "adapted"):
        shutil.copytree(own_model, tmp_path / name)
    file = "model.safetensors"
    (tmp_path / "cut" / file).write_bytes((own_model / file).read_bytes()[:-1])
    state = {f"foo.{name}": tensor for name, tensor in load_file(own_model / file).items()}
    save_file(state, tmp_path / "foreign" / file, {"format": "pt"})
    (tmp_path / "adapted" / "adapter_config.json").write_text("{}")
    cells = {name: base(tmp_path / name) for name in ("model", "cut", "foreign", "adapted")}
    found = {
        problem.error.message: problem.cells for problem in preflight.problems([*cells.values()])
    }
    assert sorted(found.values()) == sorted(
        (cells[name].cell_id,) for name in ("cut", "foreign", "adapted")
    )
    for message, words in zip(
        sorted(found), ("adapter_config.json", "truncated", "'foo.'"), strict=True
    ):
        assert words in message


def base(directory: Path) -> Cell:
    chosen = Model(name=str(directory), fingerprint=fingerprint(directory))
    return Cell(method="base", model=chosen, evaluate=Evaluate(tasks=(), sample_prompts=()))
