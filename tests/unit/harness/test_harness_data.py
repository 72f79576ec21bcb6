"""Rows under TRL's column names, errors that name what there is, and tokens counted by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from datasets import Dataset

from harness.data import dataset
from harness.data.dataset import TrainingRows
from matrices.cell import Data
from matrices.errors import UserError
from matrices.files.data_format import RowLayout, layout_of

TEXT = RowLayout("text", ("text",), conversational=False)
ROWS = [{"text": "one", "n": 1}, {"text": "two", "n": 2}, {"text": "three", "n": 3}]
WRITERS: dict[str, Callable[[Path], Any]] = {
    "json": lambda path: path.write_text(json.dumps(ROWS)),
    "jsonl": lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in ROWS)),
    "csv": lambda path: pd.DataFrame(ROWS).to_csv(path, index=False),
    "parquet": lambda path: pd.DataFrame(ROWS).to_parquet(path, index=False),
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def jsonl(place: Path, *rows: dict[str, Any]) -> str:
    path = place / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("kind", sorted(WRITERS))
def test_local_files_of_every_kind(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{kind}"
    WRITERS[kind](path)
    rows = dataset.read_rows(Data(source=str(path))).rows
    assert rows.to_dict() == {"text": ["one", "two", "three"]}
    assert list(tmp_path.glob("cache/data/*")), "the library's cache must be ours"
    first = dataset.read_rows(Data(source=str(path), max_samples=2)).rows
    assert first["text"][:] == ["one", "two"]
    assert len(dataset.read_rows(Data(source=str(path), max_samples=99)).rows) == 3


def test_an_edited_file_is_read_again(tmp_path: Path) -> None:
    source = jsonl(tmp_path, {"text": "before"})
    assert dataset.read_rows(Data(source=source)).rows["text"][:] == ["before"]
    jsonl(tmp_path, {"text": "after!"})
    assert dataset.read_rows(Data(source=source)).rows["text"][:] == ["after!"]


@pytest.mark.parametrize(
    ("settings", "row", "expected"),
    [
        ({}, {"text": "a", "id": 1}, {"text": "a"}),
        ({"text_column": "body"}, {"body": "a", "title": "b"}, {"text": "a"}),
        (
            {},
            {"prompt": "p", "completion": "c", "text": "t"},
            {"prompt": "p", "completion": "c"},
        ),
        (
            {"prompt_column": "q", "completion_column": "a"},
            {"q": "p", "a": "c"},
            {"prompt": "p", "completion": "c"},
        ),
        (
            {},
            {"messages": [{"role": "user", "content": "hi"}], "text": "t"},
            {"messages": [{"role": "user", "content": "hi"}]},
        ),
        (
            {"messages_column": "turns"},
            {"turns": [{"role": "user", "content": "hi"}]},
            {"messages": [{"role": "user", "content": "hi"}]},
        ),
        # A column that is named wins over those that are not, whatever else is there.
        (
            {"text_column": "body"},
            {"prompt": "p", "completion": "c", "messages": [], "text": "t", "body": "b"},
            {"text": "b"},
        ),
        (
            {"completion_column": "answer"},
            {"prompt": "p", "completion": "c", "answer": "a", "text": "t"},
            {"prompt": "p", "completion": "a"},
        ),
        # Two formats named: the one whose columns are there.
        (
            {"text_column": "body", "messages_column": "turns"},
            {"body": "b", "prompt": "p", "completion": "c"},
            {"text": "b"},
        ),
        # Asked for by name, although another format's columns are there too.
        ({"format": "text"}, {"prompt": "p", "completion": "c", "text": "t"}, {"text": "t"}),
    ],
)
def test_the_format_is_told_from_the_columns(
    settings: dict[str, Any], row: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    rows = dataset.read_rows(Data(source=jsonl(tmp_path, row), **settings)).rows
    assert rows[0] == expected


@pytest.mark.parametrize(
    ("settings", "columns", "key", "fragments"),
    [
        ({}, ["body", "title"], "data.text_column", ["body, title", "text_column: body"]),
        (
            {"format": "text", "text_column": "txt"},
            ["text", "id"],
            "data.text_column",
            ["'txt' is not a column of x.jsonl", "text, id", "did you mean 'text'"],
        ),
        (
            {"format": "prompt-completion"},
            ["prompt", "answer"],
            "data.completion_column",
            ["'completion' is not a column", "prompt, answer"],
        ),
        (
            {"format": "prompt-completion"},
            ["question", "completion"],
            "data.prompt_column",
            ["'prompt' is not a column", "question, completion"],
        ),
        (
            {"format": "chat", "messages_column": "message"},
            ["messages"],
            "data.messages_column",
            ["'message' is not a column", "did you mean 'messages'"],
        ),
        # Named and not there, although other columns could be trained on.
        (
            {"text_column": "ful_text"},
            ["prompt", "completion", "full_text"],
            "data.text_column",
            ["'ful_text' is not a column", "did you mean 'full_text'"],
        ),
        (
            {"text_column": "body", "messages_column": "turns"},
            ["body", "turns"],
            "data.format",
            ["columns of chat and text are named", "format: chat"],
        ),
        (
            {"prompt_column": "question", "completion_column": "question"},
            ["question"],
            "data.completion_column",
            ["both 'question'"],
        ),
    ],
)
def test_a_missing_column_is_named_with_those_there_are(
    settings: dict[str, Any], columns: list[str], key: str, fragments: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        layout_of(Data(source="x.jsonl", **settings), columns, {})
    assert caught.value.key == key
    for fragment in fragments:
        assert fragment in caught.value.message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("broken.jsonl", '{"text": "fine"}\n{"text": "no end\n'),
        ("broken.json", "{not json"),
        ("broken.parquet", "not parquet"),
        ("broken.csv", 'text,n\n"never closed,1\n'),
    ],
)
def test_a_broken_file_is_named(name: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        dataset.read_rows(Data(source=str(path)))
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.key == "data.source"


def test_a_file_that_is_not_there_empty_or_of_no_known_kind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl is not there"):
        dataset.read_rows(Data(source=str(tmp_path / "none.jsonl")))
    (tmp_path / "text.txt").write_text("words")
    with pytest.raises(UserError, match=r"is not one of \.csv, \.json, \.jsonl, \.parquet"):
        dataset.read_rows(Data(source=str(tmp_path / "text.txt")))
    for name, content in (("a.csv", "text\n"), ("b.json", "[]"), ("c.jsonl", "")):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match="has no rows"):
            dataset.read_rows(Data(source=str(tmp_path / name)))


def test_a_hub_name_that_cannot_be_had_is_one_line() -> None:
    with pytest.raises(UserError) as caught:
        dataset.read_rows(Data(source="nobody/never-such-a-dataset"))
    assert "nobody/never-such-a-dataset" in caught.value.message
    assert "\n" not in caught.value.message


def test_where_the_loss_is() -> None:
    everywhere = {"completion_only_loss": False, "assistant_only_loss": False}
    for columns in (["text"], ["prompt", "completion"], ["messages"]):
        assert dataset.loss_arguments(Data(), columns) == everywhere
    asked = Data(completion_only_loss=True)
    assert dataset.loss_arguments(asked, ["prompt", "completion"]) == {
        "completion_only_loss": True,
        "assistant_only_loss": False,
    }
    assert dataset.loss_arguments(asked, ["messages"]) == {
        "completion_only_loss": False,
        "assistant_only_loss": True,
    }
    with pytest.raises(UserError, match="plain text") as caught:
        dataset.loss_arguments(asked, ["text"])
    assert caught.value.key == "data.completion_only_loss"


def test_provenance_tells_rows_apart() -> None:
    def digest(rows: list[dict[str, str]]) -> str:
        return dataset.provenance(Data(), TrainingRows(Dataset.from_list(rows), TEXT))["sha256"]

    one, other = {"text": "a"}, {"text": "b"}
    assert digest([one, other]) == digest([one, other])
    assert len({digest(rows) for rows in ([one, other], [other, one], [one], [one, one])}) == 4
    found = dataset.provenance(
        Data(source="mine.jsonl"), TrainingRows(Dataset.from_list([one]), TEXT)
    )
    assert (found["source"], found["rows"]) == ("mine.jsonl", "1")
    assert (found["format"], found["columns"]) == ("text", "text")
