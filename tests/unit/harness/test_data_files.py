"""Mistakes in data files: one line with file, row from 1, column, value and what would be right."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from harness.data import dataset, local_files
from harness.data.local_files import MISSING_VALUES, check_first_rows
from matrices.cell import Data
from matrices.errors import UserError

GOOD = {"text": "fine"}
USER = {"role": "user", "content": "hi"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEBENCH_CACHE", str(tmp_path / "cache"))


def refusals(path: Path, **settings: Any) -> list[str]:
    """What is said by a look at the first rows and by reading them all, as preflight does."""
    given = Data(source=str(path), **settings)
    said = []
    for look in (check_first_rows, read_as_preflight):
        with pytest.raises(UserError) as caught:
            look(given)
        assert caught.value.key is not None
        assert "\n" not in caught.value.message
        assert str(path) in caught.value.message
        said.append(caught.value.message)
    return said


def read_as_preflight(given: Data) -> None:
    if given.source.endswith(".csv"):
        local_files.check_csv(given)
    dataset.read_rows(given)


def chat(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([GOOD, {"text": None}], "row 2: column 'text' is null"),
        ([GOOD, {"text": 12}], "row 2: column 'text' is the number 12, not text"),
        ([{"text": 1.5}], "row 1: column 'text' is the number 1.5, not text"),
        ([GOOD, GOOD, {"text": True}], "row 3: column 'text' is true, not text"),
        ([{"text": {"a": 1}}], "row 1: column 'text' is a struct {'a': 1}, not text"),
        ([GOOD, {"text": ["a"]}], "row 2: column 'text' is a list ['a'], not text"),
        ([{"text": float("nan")}], "row 1: column 'text' is NaN, a missing value"),
        # What datasets would read as a number is none: the first bad row is the number.
        ([{"text": "12"}, {"text": 7}], "row 2: column 'text' is the number 7"),
        ([GOOD, GOOD, {"source": "b"}], "row 3: column 'text' is not there"),
        ([{"text": "a\ud83d"}], r"row 1: column 'text' holds half a character (U+D83D)"),
        ([GOOD, "words"], "row 2: 'words' is not a JSON object"),
        ([{"prompt": "p", "completion": "c"}, {"prompt": "p"}], "row 2: column 'completion' is"),
        ([{"prompt": [USER], "completion": "c"}], "row 1: column 'completion' is the text 'c'"),
        ([{"instruction": "i", "input": 3, "output": "o"}], "row 1: column 'input' is the number"),
        ([chat(USER), chat()], "row 2: column 'messages' is an empty list"),
        ([chat(USER), {"messages": None}], "row 2: column 'messages' is null"),
        ([{"messages": "hi"}], "row 1: column 'messages' is the text 'hi'"),
        ([chat("hi")], "row 1: column 'messages[0]' is the text 'hi', not a message"),
        ([chat(USER, {"content": "x"})], "row 1: column 'messages[1]' has no role"),
        ([chat({"role": "user", "content": None})], "column 'messages[0].content' is null"),
        ([chat({"role": "user"})], "column 'messages[0].content' is not there"),
        ([chat({"role": "user", "content": 5})], "'messages[0].content' is the number 5, not"),
        (
            [chat({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]})],
            "column 'messages[0].content[0]' is a part of type 'image_url'; only parts of type",
        ),
        ([chat({"from": "narrator", "value": "x"})], "'messages[0].from' is the text 'narrator'"),
        ([chat({"from": "human", "value": None})], "column 'messages[0].value' is null"),
        ([chat(USER) | {"tools": "{"}], "column 'tools' is the text '{', not JSON"),
        ([chat(USER) | {"chat_template_kwargs": 3}], "column 'chat_template_kwargs' is the number"),
    ],
)
def test_values_in_json(rows: list[Any], expected: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for said in refusals(path):
        assert expected in said
        assert ";" in said, "what to do about it"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"text": "a"}\n\n{"text": "caf\xe9"}\n', "row 3: byte 29 of the file is 0xe9 ('é' in"),
        (b'{"text": "a"}\n{"text": "b"\n{"text": "c"}\n', "row 2 is not JSON: Expecting ',' del"),
        (b'{"text": "a"}\nwords\n', "row 2 is not JSON"),
        (b'{"text": "a", "text": "b"}\n', "row 1 has the key 'text' twice"),
        (b'[{"text": "a"},\n {"text" "b"}]', "row 2 is not JSON: Expecting ':' delimiter"),
        (b'[{"text": "a"}, 5]', "row 2: 5 is not a JSON object"),
        ('{"text": "a"}\n'.encode("utf-16"), "is UTF-16; save it as UTF-8"),
        (b"", "has no rows"),
        (b"[]", "has no rows"),
        (b"{}\n", "row 1 has no columns"),
    ],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_json_that_cannot_be_read(name: str, content: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    for said in refusals(path):
        assert expected in said


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"id,text\n1,a\n2,\n", "row 2: column 'text' is empty"),
        (b"id,text\n1,None\n", "row 1: column 'text' holds 'None', which is read as a missing"),
        (b"id,text\n1,a\n2\n", "row 2: column 'text' is empty"),
        (b"text,id\n1,a\n\n0,b\n", "row 1: column 'text' is the number 1, not text"),
        (b"text;id\na;1\n", "is separated by semicolons ('text;id' would be one column)"),
        (b"text\tid\na\t1\n", "is separated by tabs"),
        (b"text,text\na,b\n", "has the column 'text' twice"),
        (b"text,id\na,1\nb, c,2\n", "row 2 has 3 fields and the header 2"),
        (b"text,id\na,b,1\nb,c,2\n", "row 1 has 3 fields and the header 2"),
        (b'id,text\n1,"a\nb"\n2,caf\xe9\n', "row 2 (line 4): byte 22 of the file is 0xe9"),
        (b"caf\xe9,text\n", "the header (line 1): byte 4"),
        ("text,id\na,1\n".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        (b"text,id\n", "has no rows"),
        (b"", "has no rows"),
    ],
)
def test_csv(content: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    for said in refusals(path):
        assert expected in said


PARQUET: dict[str, tuple[Callable[[], pa.Array], str]] = {
    "nulls": (lambda: pa.array(["a", None]), "row 2: column 'text' is null"),
    "binary": (lambda: pa.array([b"row 0"]), "row 1: column 'text' is binary data b'row 0'"),
    "numbers": (lambda: pa.array([3]), "row 1: column 'text' is the number 3"),
    "structs": (lambda: pa.array([{"a": 1}]), "row 1: column 'text' is a struct {'a': 1}"),
    "times": (lambda: pa.array(pd.to_datetime(["2020-01-01"])), "is the time 2020-01-01 00:00:00"),
}


@pytest.mark.parametrize("kind", sorted(PARQUET))
def test_parquet(kind: str, tmp_path: Path) -> None:
    values, expected = PARQUET[kind]
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"text": values()}), path)
    for said in refusals(path):
        assert expected in said


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bom.csv", b"\xef\xbb\xbftext,id\r\na,1\r\n"),
        ("one.csv", b"text\na\n"),
        ("index.csv", b",text\n0,a\n"),
        ("row_names.csv", b'"text","id"\n"1","a",3\n'),
        ("twice.csv", b"text,id,id\na,1,2\n"),
        ("bom.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n'),
        ("blank.jsonl", b'\n{"text": "a"}\n\n'),
        ("several_lines.json", b'{\n"text": "a"\n}\n'),
        ("texts.json", b'["a"]'),
    ],
)
def test_what_is_right_is_read(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    check_first_rows(Data(source=str(path)))
    read_as_preflight(Data(source=str(path)))
    assert [dict(row) for row in dataset.read_rows(Data(source=str(path))).rows] == [{"text": "a"}]


def test_a_bad_row_beyond_those_that_are_trained_on(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": null}\n')
    check_first_rows(Data(source=str(path), max_samples=1))
    assert len(dataset.read_rows(Data(source=str(path), max_samples=1)).rows) == 1
    assert all("row 2" in said for said in refusals(path))


def test_missing_values_are_those_of_pandas(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    words = sorted(MISSING_VALUES - {""})
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *([word] for word in words), ["none"], ["nil"]])
    read = pd.read_csv(path)["text"]
    assert list(read[: len(words)].isna()) == [True] * len(words)
    assert list(read[len(words) :]) == ["none", "nil"]
    listed = re.search(r"considered\s+NaN:?\s*(.*?)\.\s", pd.read_csv.__doc__ or "", re.DOTALL)
    if listed:
        assert set(re.findall(r'"([^"]*)"', listed[1])) - {" "} <= MISSING_VALUES
