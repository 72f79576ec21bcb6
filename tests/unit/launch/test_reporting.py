"""`report` and `show`: from what a user names to records; problems placed in the matrix."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.records.memory import Memory
from harness.records.provenance import new_record
from harness.records.store import Entry, Store, record_key
from launch.commands.report import table_text, write_all, write_page
from launch.commands.show import find_record, record_text
from launch.planning.machine_findings import _hub
from launch.planning.plan import Sweep
from matrices.cell import Adapter, Cell, Data, Train
from matrices.errors import UserError
from matrices.load import load
from reports.records.load import load_records


def publish(results: Path, status: str = "ok", seed: int = 0) -> Entry:
    store = Store(results)
    store.prepare()
    cell = Cell(method="lora", adapter=Adapter(), data=Data(), train=Train(), seed=seed)
    memory = Memory(headline="ledger", peak_bytes=5 * 2**20, peak_phase="backward")
    first = new_record(cell, ["accelerate", "launch", "x"])
    record = first.model_copy(update={"status": status, "ended": first.started, "memory": memory})
    key = record_key(record.cell_id, record.stack_id)

    def start(place: Path, attempt: int) -> object:
        return record.model_copy(update={"attempt": attempt})

    working = store.start(start, key)  # type: ignore[arg-type]
    return store.publish(working, record.model_copy(update={"attempt": store.next_attempt(key)}))


def test_a_record_is_found_by_directory_file_and_start_of_its_id(tmp_path: Path) -> None:
    entry = publish(tmp_path / "results" / "a")
    path = entry.directory / "record.json"
    for named in (str(entry.directory), str(path), entry.record.cell_id[:6], entry.directory.name):
        assert find_record(named, tmp_path / "results") == path


def test_an_id_names_the_attempt_in_force(tmp_path: Path) -> None:
    publish(tmp_path, "failed")
    ok = publish(tmp_path, "ok")
    publish(tmp_path, "interrupted")
    assert find_record(ok.record.cell_id, tmp_path) == ok.directory / "record.json"


def test_an_id_that_names_none_or_several_is_a_users_problem(tmp_path: Path) -> None:
    # Seventeen cells: two of their ids start with the same hexadecimal digit.
    entries = [publish(tmp_path, seed=seed) for seed in range(17)]
    digits = [entry.record.cell_id[0] for entry in entries]
    shared = next(digit for digit in digits if digits.count(digit) > 1)
    with pytest.raises(UserError, match="no record in"):
        find_record("zzz", tmp_path)
    with pytest.raises(
        UserError, match=f"{digits.count(shared)} records match '{shared}'"
    ) as caught:
        find_record(shared, tmp_path)
    matching = [entry for entry in entries if entry.record.cell_id[0] == shared]
    assert str(matching[0].directory) in str(caught.value)


def test_show_prints_the_record_for_people_and_for_machines(tmp_path: Path) -> None:
    entry = publish(tmp_path)
    text = record_text(str(entry.directory), tmp_path, as_json=False)
    assert entry.record.cell_id in text
    assert "5.0 MiB" in text
    assert f"harness.worker {entry.directory}/cell.json" in text
    assert json.loads(record_text(entry.record.cell_id, tmp_path, as_json=True)) == json.loads(
        (entry.directory / "record.json").read_text()
    )


def test_a_report_is_written_beside_the_records_and_the_first_table_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(tmp_path)
    paths = write_all(tmp_path, tmp_path / "report", None, "md")
    assert {path.suffix for path in paths} == {".parquet", ".csv", ".md", ".html"}
    assert all(path.stat().st_size > 0 for path in paths)
    assert "| lora |" in capsys.readouterr().out
    page = write_page(tmp_path, tmp_path / "new" / "page.html", None)
    assert page.read_text().startswith("<!doctype html>")


def test_a_table_without_rows_says_what_it_needs(tmp_path: Path) -> None:
    publish(tmp_path)
    with pytest.raises(UserError, match=r"nothing for the table quantization: .* method qlora"):
        table_text(load_records(tmp_path), "quantization", "md", None)


def test_a_problem_of_preflight_is_placed_in_the_matrix(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text("name: m\nmodel: somebody/something\naxes: {method: [lora]}\n")
    matrix = load(path)
    sweep = Sweep((), tmp_path, locate=matrix.locate)
    located = sweep.located(UserError("no such model", key="model.name"))
    assert str(located) == f"{path}:2: model.name: no such model"
    kept = UserError("no such model", key="model.name", where="elsewhere:1")
    assert sweep.located(kept) is kept


def test_the_hub_is_asked_and_its_silence_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    finding = _hub()
    assert finding.state == "no"
    assert finding.detail.startswith("http://127.0.0.1:9: ")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert _hub().detail == "HF_HUB_OFFLINE is set"
