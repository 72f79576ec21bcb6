"""Hub models and data by their commits, from a local copy laid out as huggingface_hub does."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from model_directories import CONFIG, EMBEDDING, safetensors, write_model

from harness.data import dataset
from harness.models import checkpoint, model
from harness.records import hub
from harness.records.provenance import new_record
from harness.records.record import Record
from harness.records.stack import Provenance
from launch.planning.plan import RETRIED, decide
from matrices.cell import Cell, Data, Model
from matrices.errors import UserError
from reports.records.load import Result, by_commit
from reports.tables.groups import group, section_key

OLD, NEW = "a" * 40, "b" * 40
CELL = Cell(method="full", model=Model(name="org/some"), data=Data(source="org/rows"))


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache; the current directory is empty."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    model._commit.cache_clear()
    return tmp_path / "hub"


def point(cached: Path, folder: str, commit: str, revision: str = "main") -> Path:
    """Let a revision of a repository be a commit, and return where its files are."""
    (cached / folder / "refs").mkdir(parents=True, exist_ok=True)
    (cached / folder / "refs" / revision).write_text(commit)
    return cached / folder / "snapshots" / commit


def read(cell: Cell = CELL, status: str = "ok", **commits: str) -> Record:
    """A record of a cell that read these commits."""
    provenance = Provenance(**{kind: {"commit": commit} for kind, commit in commits.items()})
    changes = {"status": status, "ended": "2026-01-02T03:04:05", "provenance": provenance}
    return new_record(cell, []).model_copy(update=changes)


def test_what_is_known_of_a_revision(cached: Path) -> None:
    assert hub.known_commit("org/some", None) is None
    point(cached, "models--org--some", NEW)
    point(cached, "models--org--some", OLD, "v1")
    assert hub.known_commit("org/some", None) == hub.known_commit("org/some", "main") == NEW
    assert hub.known_commit("org/some", "v1") == OLD
    assert hub.known_commit("org/some", OLD) == OLD, "a commit is itself"
    assert hub.known_commit("org/some", "v2") is None
    assert hub.known_commit("org/some", "main", "dataset") is None
    point(cached, "models--org--some", "not a commit")
    assert hub.known_commit("org/some", None) is None


def test_a_result_of_another_commit_does_not_count(cached: Path) -> None:
    measured = read(model=OLD, data=OLD)
    assert decide(measured, "", RETRIED)[0] == "keep", "nothing is known here"
    point(cached, "models--org--some", OLD)
    point(cached, "datasets--org--rows", OLD)
    assert decide(measured, "", RETRIED)[0] == "keep"
    assert decide(read(data=OLD), "", RETRIED) == (
        "retry",
        "attempt 1 was ok (it measured an unknown commit of org/some, "
        f"whose main is {OLD[:12]} now)",
    )
    point(cached, "datasets--org--rows", NEW)
    action, why = decide(measured, "", RETRIED)
    assert action == "retry"
    assert f"it measured commit {OLD[:12]} of org/rows, whose main is {NEW[:12]} now" in why
    action, why = decide(measured, "refused here", RETRIED)
    assert action == "keep", "a result outlives a refusal"
    assert "org/rows" in why

    point(cached, "models--org--some", NEW)
    pinned = {"model": Model(name="org/some", revision=OLD), "data": Data(source="./x.csv")}
    assert decide(read(CELL.model_copy(update=pinned)), "", RETRIED)[0] == "keep"
    local = {"model": Model(name="/x", fingerprint="f"), "data": Data()}
    assert decide(read(CELL.model_copy(update=local)), "", RETRIED)[0] == "keep"


def test_a_record_begins_with_what_is_known(cached: Path) -> None:
    point(cached, "models--org--some", NEW)
    begun = new_record(CELL, []).provenance
    assert (begun.model, begun.data) == ({"commit": NEW}, {})
    assert new_record(Cell(method="full"), []).provenance.model == {}


def test_tables_tell_commits_apart() -> None:
    """Other commits are another model; other rows another configuration, seeds of which are not
    put together."""

    def result(seed: int, **commits: str) -> Result:
        cell = CELL.model_copy(update={"seed": seed})
        return Result(by_commit(read(cell, **commits)), Path("record.json"))

    one, two = result(0, model=OLD, data=OLD), result(1, model=OLD, data=OLD)
    other_rows, other_model = result(2, model=OLD, data=NEW), result(3, model=NEW, data=OLD)
    sizes = [len(item.results) for item in group([one, two, other_rows, other_model])]
    assert sizes == [2, 1, 1]
    assert section_key(one) == section_key(other_rows)
    assert section_key(one) != section_key(other_model)
    assert one.record.cell.model.revision == f"main@{OLD[:12]}"
    assert by_commit(read()).cell == CELL


def test_what_is_loaded_is_of_one_commit(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    point(cached, "models--org--some", OLD)
    assert model.source(CELL.model) == ("org/some", {"revision": OLD, "trust_remote_code": False})
    point(cached, "models--org--some", NEW)  # a download by somebody else, meanwhile
    assert model.source(CELL.model)[1]["revision"] == OLD
    assert model.provenance(CELL.model) == {"name": "org/some", "commit": OLD}
    # Another process, which scores what this one trained.
    model._commit.cache_clear()
    assert model.source(model.cell_at_commit(read(model=OLD)).model)[1]["revision"] == OLD


def test_a_directory_is_not_taken_for_a_hub_id(cached: Path) -> None:
    """transformers and datasets would take one in the current directory without a word."""
    Path("org/some").mkdir(parents=True)
    Path("org/rows").mkdir()
    with pytest.raises(UserError, match="'org/some' can be a hub id and is also there as /"):
        model.source(CELL.model)
    assert CELL.data is not None
    with pytest.raises(UserError, match="'org/rows' can be a hub id and is also there as /"):
        dataset.read_rows(CELL.data)
    local = Model(name="./org/some")
    assert model.source(local) == ("org/some", {})
    trusted = local.model_copy(update={"trust_remote_code": True})
    assert model.source(trusted)[1] == {"trust_remote_code": True}


def test_rows_of_another_commit_are_refused(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, datasets takes its newest copy, whatever revision is asked for."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    copy = tmp_path / "datasets" / "org___rows" / "default" / "0.0.0" / OLD
    _keep_as_datasets_does(copy, [{"text": "one"}, {"text": "two"}])

    read = dataset.read_rows(Data(source="org/rows"))
    assert read.rows["text"] == ["one", "two"]
    assert dataset.provenance(Data(source="org/rows"), read)["commit"] == OLD
    point(cached, "datasets--org--rows", OLD)
    assert len(dataset.read_rows(Data(source="org/rows", max_samples=1)).rows) == 1
    for asked in (Data(source="org/rows", revision=NEW), Data(source="org/rows")):
        point(cached, "datasets--org--rows", NEW)
        with pytest.raises(UserError, match=f"of commit {OLD[:12]}, and .* is {NEW[:12]}"):
            dataset.read_rows(asked)


def _keep_as_datasets_does(directory: Path, rows: list[dict[str, Any]]) -> None:
    made = directory.parent / "made"
    DatasetDict(train=Dataset.from_list(rows)).save_to_disk(made)
    directory.mkdir(parents=True)
    [arrow] = (made / "train").glob("*.arrow")
    shutil.move(arrow, directory / "rows-train.arrow")
    info = Dataset.from_list(rows).info.copy()
    info.config_name = "default"
    info.dataset_name = "rows"
    info.splits = {"train": {"name": "train", "num_bytes": 8, "num_examples": len(rows)}}
    info.write_to_directory(directory)
    shutil.rmtree(made)


def test_the_local_copy_of_a_hub_model_is_looked_at(cached: Path) -> None:
    """As far as it is there: weights may still have to come."""
    copy = point(cached, "models--org--some", OLD)
    write_model(copy, CONFIG | {"architectures": ["BertForMaskedLM"]})
    with pytest.raises(UserError, match="is an encoder"):
        checkpoint.check(CELL)
    write_model(point(cached, "models--org--some", NEW))
    checkpoint.check(CELL)
    (point(cached, "models--org--some", NEW) / "model.safetensors").write_bytes(
        safetensors(EMBEDDING)[:-1]
    )
    with pytest.raises(UserError, match="is truncated"):
        checkpoint.check(CELL)
