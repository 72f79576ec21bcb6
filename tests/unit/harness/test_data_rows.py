"""From rows as users store them to rows as TRL takes them: published formats, tools, parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from harness.data import dataset
from matrices.cell import Data

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "5"}
# As the data card of tatsu-lab/alpaca shows the prompt its authors trained with.
ALPACA_PROMPT = """\
Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
Add.

### Input:
2 and 3

### Response:"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEBENCH_CACHE", str(tmp_path / "cache"))


def read(place: Path, *rows: Any, **settings: Any) -> tuple[list[dict[str, Any]], str]:
    path = place / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, layout, _ = dataset.read_rows(Data(source=str(path), **settings))
    return list(found), layout.format


def test_alpaca(tmp_path: Path) -> None:
    rows, form = read(
        tmp_path,
        {"instruction": "Add.", "input": "2 and 3", "output": "5"},
        {"instruction": "Greet.", "input": "", "output": "hi"},
    )
    assert form == "alpaca"
    assert rows[0] == {"prompt": ALPACA_PROMPT, "completion": "5"}
    assert rows[1]["prompt"].endswith("request.\n\n### Instruction:\nGreet.\n\n### Response:")
    assert "input" not in rows[1]["prompt"].lower()
    # The published file has a text column too, which was always read first.
    rows, form = read(tmp_path, {"instruction": "a", "input": "", "output": "b", "text": "t"})
    assert (rows, form) == ([{"text": "t"}], "text")
    # Asked for, it is read as Alpaca nevertheless.
    rows, form = read(tmp_path, {"instruction": "a", "output": "b", "text": "t"}, format="alpaca")
    assert (rows[0]["completion"], form) == ("b", "alpaca")


SHAREGPT = [
    {"from": "system", "value": "s"},
    {"from": "human", "value": "q"},
    {"from": "gpt", "value": "a"},
    {"from": "tool", "value": "t"},
]
ROLES = ["system", "user", "assistant", "tool"]


@pytest.mark.parametrize(
    ("column", "settings"),
    [
        ("conversations", {}),
        ("messages", {}),
        ("conversations", {"messages_column": "conversations"}),
        ("turns", {"messages_column": "turns"}),
        ("turns", {"messages_column": "turns", "format": "sharegpt"}),
        ("conversations", {"format": "sharegpt"}),
    ],
)
def test_sharegpt_wherever_it_stands(column: str, settings: dict[str, Any], tmp_path: Path) -> None:
    rows, form = read(tmp_path, {"id": "x", column: SHAREGPT}, **settings)
    assert form == "sharegpt"
    assert [message["role"] for message in rows[0]["messages"]] == ROLES
    assert [message["content"] for message in rows[0]["messages"]] == ["s", "q", "a", "t"]


def test_conversations_of_roles_are_chat(tmp_path: Path) -> None:
    rows, _ = read(tmp_path, {"conversations": [USER, ANSWER]})
    assert rows == [{"messages": [USER, ANSWER]}]


def test_parts_of_text_are_text_and_texts_stay_texts(tmp_path: Path) -> None:
    """datasets reads a column of texts and lists as JSON, where the text "5" is a number."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    rows, _ = read(tmp_path, {"messages": [{"role": "user", "content": parts}, ANSWER]})
    assert rows == [{"messages": [{"role": "user", "content": "ab"}, ANSWER]}]


def test_texts_that_look_like_times_stay_texts(tmp_path: Path) -> None:
    rows, _ = read(tmp_path, {"text": "2020-01-01 00:00:00"}, {"text": "2020-01-02 00:00:00"})
    assert [row["text"] for row in rows] == ["2020-01-01 00:00:00", "2020-01-02 00:00:00"]


TOOLS = [
    [{"type": "function", "function": {"name": "f", "parameters": {"city": {"type": "string"}}}}],
    [{"type": "function", "function": {"name": "g", "parameters": {"n": {"default": None}}}}],
]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": {"x": 1}}}]}


def test_each_row_keeps_its_own_tools_and_template_arguments(tmp_path: Path) -> None:
    rows, _ = read(
        tmp_path,
        {"messages": [USER, CALL], "tools": TOOLS[0]},
        {"messages": [USER, ANSWER], "tools": json.dumps(TOOLS[1])},
        {"messages": [USER, ANSWER], "chat_template_kwargs": {"thinking": True}},
    )
    # TRL reads tools that are text as JSON.
    told = [json.loads(row["tools"]) if row["tools"] else None for row in rows]
    assert told == [*TOOLS, None]
    assert [row["chat_template_kwargs"] for row in rows] == [{}, {}, {"thinking": True}]
    assert rows[0]["messages"] == [USER, CALL]


def test_columns_without_a_value_are_left_out(tmp_path: Path) -> None:
    rows, _ = read(tmp_path, {"messages": [USER], "tools": None, "chat_template_kwargs": None})
    assert rows == [{"messages": [USER]}]


def test_tools_of_a_table_are_their_own(tmp_path: Path) -> None:
    """In a parquet file each tool has the keys of all tools."""
    path = tmp_path / "rows.parquet"
    Dataset.from_list([{"messages": [USER], "tools": tools} for tools in TOOLS]).to_parquet(path)
    rows = dataset.read_rows(Data(source=str(path))).rows
    assert json.loads(rows[0]["tools"]) == TOOLS[0]


def test_prompts_and_completions_may_be_messages(tmp_path: Path) -> None:
    rows, _ = read(tmp_path, {"prompt": [USER], "completion": [ANSWER], "tools": TOOLS[0]})
    assert rows[0]["prompt"] == [USER]
    assert rows[0]["completion"] == [ANSWER]
    assert json.loads(rows[0]["tools"]) == TOOLS[0]


def test_data_of_the_hub_is_checked_and_read_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Dataset.from_list([{"conversations": SHAREGPT, "id": 1}] * 2)
    monkeypatch.setattr(dataset, "_load_hub", lambda source: table)
    rows, layout, _ = dataset.read_rows(Data(source="someone/something"))
    assert layout.format == "sharegpt"
    assert [message["role"] for message in rows[1]["messages"]] == ROLES
    right = Dataset.from_list([{"messages": [USER, ANSWER]}] * 2)
    monkeypatch.setattr(dataset, "_load_hub", lambda source: right)
    rows = dataset.read_rows(Data(source="someone/something")).rows
    assert rows.features == right.features, "what is right already is passed on as it is"
