"""Every command that reads records goes on when some of them cannot be read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from harness.records.memory import Memory
from harness.records.provenance import new_record
from harness.records.record import Record, RecordedPrediction
from harness.records.store import Store, record_key
from launch.cells import runner
from launch.cli import app
from launch.predict import predict
from matrices.errors import UserError
from matrices.expand import expand
from matrices.load import load

MATRIX = """\
name: two
model: tiny-llama
method: lora
evaluate: {tasks: [], sample_prompts: []}
axes: {rank: [4, 8]}
"""
CLAIMS = "claims: [{id: a, kind: measure, quantity: checkpointing_slowdown, value: 0.2}]"
BROKEN = ("binary", "changed", "deep", "directory", "empty", "foreign", "list", "newer", "pipe")
BROKEN += ("truncated", "types")


def publish(store: Store, record: Record) -> Path:
    working = store.start(
        lambda place, attempt: record.model_copy(update={"attempt": attempt}),
        record_key(record.cell_id, record.stack_id),
    )
    return store.publish(working, record).directory


def break_(place: Path, kind: str, sound: dict[str, Any]) -> None:
    """Leave one `record.json` that is no record."""
    place.mkdir()
    path = place / "record.json"
    changed = {
        "changed": lambda: sound["cell"]["train"].update(steps=7),
        "newer": lambda: sound.update(schema_version=99, news={"a": 1}),
        "types": lambda: sound["memory"].update(peak_bytes=["much"]),
    }
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind in changed:
        changed[kind]()
        path.write_text(json.dumps(sound))
    else:
        content = {
            "binary": bytes(range(256)),
            "deep": b'{"schema_version": ' + b"[" * 100_000,
            "empty": b"",
            "foreign": b'{"loss": 0.5}',
            "list": b"[1, 2]",
            "truncated": json.dumps(sound).encode()[:-200],
        }
        path.write_bytes(content[kind])


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both cells of the matrix, measured, among records of every way to be broken."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNEBENCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "two.yaml").write_text(MATRIX)
    (tmp_path / "claims.yaml").write_text(CLAIMS)
    root = tmp_path / "results" / "two"
    store = Store(root)
    store.prepare()
    for cell in expand(load(str(tmp_path / "two.yaml"), [], None)).cells:
        first = new_record(cell, ["accelerate", "launch", "x"])
        memory = Memory(headline="ledger", peak_bytes=2**20, peak_phase="backward")
        measured = {"status": "ok", "reason": None, "ended": first.started, "memory": memory}
        measured["prediction"] = RecordedPrediction(peak_allocated_bytes=2**20, error=0.0)
        place = publish(store, first.model_copy(update=measured))
    for kind in BROKEN:
        break_(root / kind, kind, json.loads((place / "record.json").read_text()))
    # And what a runner left that died while the disk was full.
    (root / ".running" / f"{place.name}.2-abc").mkdir()
    (root / ".running" / f"{place.name}.2-abc" / "record.json").write_text('{"schema_v')
    return root


def tunebench(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def set_aside(result: Result) -> list[str]:
    """The places of which a note says that they were passed over, each once."""
    lines = [line for line in result.stderr.splitlines() if line.endswith("; set aside")]
    assert all(line.startswith("tunebench: note: ") for line in lines)
    places = [Path(line.removeprefix("tunebench: note: ").split(": ")[0]).parent for line in lines]
    assert len(set(places)) == len(places), lines
    return sorted(place.name for place in places if place.parent.name != ".running")


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (("plan", "two.yaml", "--no-predict"), "2 keep"),
        (("run", "two.yaml", "--no-predict"), "2 ok"),
        (("status", "results/two"), "2 ok"),
        (("report", "results/two", "--table", "methods"), "2 runs: 2 ok"),
        (("report", "results"), "2 runs: 2 ok"),
        (("calibration", "results/two"), "tiny-llama"),
        (("claims", "claims.yaml", "results/two"), "not testable"),
    ],
)
def test_the_rest_goes_on(results: Path, command: tuple[str, ...], shown: str) -> None:
    done = tunebench(*command)
    assert done.exit_code == 0, done.output
    assert shown in done.stdout
    assert set_aside(done) == sorted(BROKEN)


def test_one_record_is_shown_beside_broken_ones(results: Path) -> None:
    [directory, _] = sorted(results.glob("*-*/"))
    for named in (directory, directory.name[:12]):
        done = tunebench("show", named, "--results", results.parent)
        assert done.exit_code == 0, done.output
        assert directory.name.split("-")[0] in done.stdout
        assert set_aside(done) == sorted(BROKEN)


def test_predictions_are_timed_by_the_sound_records(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "SIMULATE", "stand_in_simulate")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "integration"))
    done = tunebench("predict", "two.yaml", "--records", results, "--no-self-check")
    assert done.exit_code in (0, 2), done.output
    assert set_aside(done) == sorted(BROKEN)


@pytest.mark.parametrize("command", ["show", "rerun"])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_record_that_is_named_is_a_mistake(results: Path, command: str, kind: str) -> None:
    for named in (results / kind, results / kind / "record.json"):
        done = tunebench(command, named)
        assert isinstance(done.exception, UserError), done.output
        assert "\n" not in str(done.exception)


def test_run_tells_before_anything_is_imported(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of what was left behind. The broken record of a cell does not count as its record, and
    is not overwritten."""

    def stop(modules: list[str]) -> None:
        raise UserError(f"would import {modules}")

    monkeypatch.setattr(runner, "start_server", stop)
    [first, second] = sorted(results.glob("*-*/record.json"))
    first.write_text(first.read_text()[:99])
    done = tunebench("run", "two.yaml", "--no-predict")
    assert str(done.exception).startswith("would import ")
    assert first.parent.name in set_aside(done)
    assert "/.running/" in done.stderr
    assert Store(results).next_attempt(first.parent.name) == 2
    assert Store(results).next_attempt(second.parent.name) == 2
