"""The record as a contract: round trips, every version ever written, clear refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from harness.records.memory import LiveTensor, PhaseMemory
from harness.records.provenance import new_record
from harness.records.quality import Generation, Metric, TaskScore
from harness.records.ranks import Failure
from harness.records.reading import read_record
from harness.records.record import SCHEMA_VERSION, Record
from harness.records.speed import Tokens
from matrices.cell import Adapter, Cell, Data, Model, Quantization, Train
from matrices.errors import UserError

SAMPLES = Path(__file__).parent
CELL = Cell(
    method="qlora",
    model=Model(name="tiny-llama"),
    quantization=Quantization(double_quant=True),
    adapter=Adapter(rank=8, target_modules=("q_proj", "v_proj"), lora_config={"bias": "none"}),
    data=Data(max_length=64),
    train=Train(steps=3),
    seed=7,
)


def filled() -> Record:
    """A record with something in every part."""
    record = new_record(CELL, ["accelerate", "launch", "--module", "harness.worker"])
    record.status, record.reason, record.phase = "oom", "train: no memory", "train"
    record.failure = Failure(type="E", message="m", phase="train", requested_bytes=2**40)
    record.memory.headline, record.memory.peak_bytes = "ledger", 2**35 + 1
    record.memory.peak_phase = "backward"
    record.memory.phases["backward"] = [PhaseMemory(ledger_peak_bytes=2**35 + 1), PhaseMemory()]
    record.memory.by_category = {"weights": 512}
    record.memory.top_tensors = [
        LiveTensor(
            bytes=512,
            category="weights",
            op="existing",
            shape=[1, 2],
            dtype="uint8",
            module="m",
            phase="load",
        )
    ]
    record.speed.step_seconds = [0.1, 1 / 3]
    record.speed.tokens_per_second = Tokens(all=3.0, non_padding=2.0, loss=1.0)
    record.quality.tasks["t"] = TaskScore(
        metrics={"acc": Metric(value=0.1 + 0.2)},
        higher_is_better={"acc": True},
        n=3,
        version="1.0",
        hash="ab",
    )
    record.quality.generations = [Generation(prompt='é "quoted"\n', text="\u2028\x00")]
    record.missing["speed.mfu"] = "why"
    return record


def write(place: Path, content: Any) -> Path:
    path = place / "record.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_round_trip_to_the_last_digit(tmp_path: Path) -> None:
    record = filled()
    again = read_record(write(tmp_path, record.to_json()))
    assert again == record
    assert again.to_json() == record.to_json()
    assert again.cell.cell_id == record.cell_id


def test_numbers_json_does_not_know(tmp_path: Path) -> None:
    record = filled()
    record.quality.train_loss = [math.nan, math.inf, -math.inf, None]
    text = record.to_json()
    assert json.loads(text)["quality"]["train_loss"] == ["NaN", "Infinity", "-Infinity", None]
    again = read_record(write(tmp_path, text)).quality.train_loss
    assert again[0] is not None
    assert math.isnan(again[0])
    assert again[1:] == [math.inf, -math.inf, None]


def test_the_sample_of_version_1_still_reads() -> None:
    """A record as the worker wrote it: a QLoRA cell of the tiny Llama on a CPU machine."""
    path = SAMPLES / "record_v1.json"
    plain = json.loads(path.read_text())
    record = read_record(path)
    assert (plain["schema_version"], record.status, record.attempt) == (1, "ok", 1)
    assert record.cell.quantization == Quantization(double_quant=True)
    assert record.cell_id.startswith("6aceac2fd0fd")
    # A default of the cell that changes, or a setting that is renamed, would change this.
    assert record.cell.cell_id == record.cell_id
    assert record.memory.phases["backward"][0].ledger_peak_bytes == 24714752
    assert record.memory.resident["quantization_state"] == 31152
    assert record.speed.step_seconds[2] == 0.3898921789996166
    assert record.quality.tasks["python_reference_topic"].metrics["acc"].value == 2 / 3
    assert record.quality.train_loss[0] == 5.66978645324707
    assert record.artifacts.trainable_parameters == 21504
    # Nothing that was written is lost; fields that came later have their defaults.
    assert _kept(plain, json.loads(record.to_json())) == plain


def _kept(old: Any, new: Any) -> Any:
    """`new` without the keys that `old` does not have."""
    if isinstance(old, dict):
        return {key: _kept(old[key], new[key]) for key in old}
    return new


def test_every_sample_of_every_version_is_here() -> None:
    versions = {json.loads(p.read_text())["schema_version"] for p in SAMPLES.glob("record_v*.json")}
    assert versions == set(range(1, SCHEMA_VERSION + 1))


def test_an_older_record_without_later_fields_reads(tmp_path: Path) -> None:
    plain = json.loads(filled().to_json())
    del plain["speed"]["foreign_cpu_share"]
    del plain["memory"]["resident"]
    del plain["missing"]
    found = read_record(write(tmp_path, plain))
    assert (found.speed.foreign_cpu_share, found.memory.resident, found.missing) == (None, {}, {})


def test_a_newer_schema_is_refused_with_what_to_do(tmp_path: Path) -> None:
    plain = json.loads(filled().to_json())
    plain["schema_version"] = SCHEMA_VERSION + 1
    plain["something_new"] = {"unheard": "of"}
    path = write(tmp_path, plain)
    with pytest.raises(UserError) as caught:
        read_record(path)
    assert str(caught.value).startswith(f"{path}: schema_version: written by a newer tunebench")
    assert f"{SCHEMA_VERSION + 1} is above {SCHEMA_VERSION}" in str(caught.value)
    assert "upgrade" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "about"),
    [
        ("", "not a readable record"),
        ('{"schema_version": 1, "cell', "not a readable record"),
        ("[1, 2]", "no schema_version"),
        ({"cell_id": "x"}, "no schema_version"),
        ({"schema_version": "1"}, "no schema_version"),
        ({"schema_version": 1}, "cell_id: Field required"),
    ],
)
def test_a_broken_file_is_named(content: Any, about: str, tmp_path: Path) -> None:
    path = write(tmp_path, content)
    with pytest.raises(UserError) as caught:
        read_record(path)
    assert caught.value.where == str(path)
    assert about in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a readable record"):
        read_record(tmp_path / "none.json")
    (tmp_path / "record.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a readable record"):
        read_record(tmp_path / "record.json")


def test_fields_of_a_newer_writer_are_kept(tmp_path: Path) -> None:
    """In every part, also in settings of the cell that stand at their writer's default."""
    plain = json.loads(filled().to_json())
    for part in (plain, plain["speed"], plain["memory"]["phases"]["backward"][0]):
        part["unheard_of"] = {"a": [1, None]}
    plain["cell"]["export"] = None
    plain["cell"]["train"]["unheard_of"] = 0.5
    record = read_record(write(tmp_path, plain))
    assert record.cell == CELL
    again = record.model_copy(update={"attempt": 2})
    assert json.loads(again.to_json()) == plain | {"attempt": 2}
    assert read_record(write(tmp_path, again.to_json())) == again


def test_a_setting_of_a_newer_writer_that_is_part_of_the_identity(tmp_path: Path) -> None:
    plain = json.loads(filled().to_json())
    plain["cell"]["train"]["unheard_of"] = 1
    plain["cell_id"] = "0" * 64  # as a version would hash it for which 1 is no default
    with pytest.raises(UserError, match=r"does not know \(train\.unheard_of\); upgrade"):
        read_record(write(tmp_path, plain))


@pytest.mark.parametrize(
    "change",
    [
        lambda plain: plain["cell"]["adapter"].update(rank=9),
        lambda plain: plain["cell"].pop("seed"),
        lambda plain: plain.update(cell_id="f" * 64),
    ],
)
def test_a_cell_that_is_not_the_one_named_is_refused(change: Any, tmp_path: Path) -> None:
    plain = json.loads(filled().to_json())
    change(plain)
    with pytest.raises(UserError, match="changed after it was written") as caught:
        read_record(write(tmp_path, plain))
    assert caught.value.key == "cell_id"


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda plain: plain.update(status="great"), "status"),
        (lambda plain: plain["memory"].update(peak_bytes="much"), "memory.peak_bytes"),
        (lambda plain: plain["cell"]["adapter"].update(rank=0), "cell.adapter.rank"),
        (lambda plain: plain.update(started="yesterday"), "started"),
        (lambda plain: plain.update(ended="2026-01-01T00:00:00"), "ended"),
        (lambda plain: plain.update(stack_id="../../.."), "stack_id"),
    ],
)
def test_a_wrong_value_is_named_by_its_key(change: Any, key: str, tmp_path: Path) -> None:
    plain = json.loads(filled().to_json())
    change(plain)
    with pytest.raises(UserError) as caught:
        read_record(write(tmp_path, plain))
    assert caught.value.key == key
