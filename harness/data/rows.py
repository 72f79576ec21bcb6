"""Convert a stored row to TRL's format; a value that TRL cannot use is refused with its column.

Valid values stay unchanged. Two published formats are converted: Alpaca to prompt and completion,
ShareGPT to messages.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matrices.files.data_format import ALPACA_INPUT, RowLayout

# The two prompts of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca, train.py). The
# completion follows without a space, as in that code.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
# Keys that an assistant's turn may have instead of content; the template must render them.
CONTENT_ALTERNATIVES = ("tool_calls", "function_call", "reasoning_content", "thinking")
SHOWN_CHARACTERS = 40
NULL = "is null"


class BadValue(Exception):
    """A value that cannot be trained on: its column, the problem, and the fix."""

    def __init__(self, column: str, what: str, fix: str) -> None:
        super().__init__(f"column {column!r} {what}; {fix}")
        self.column = column
        self.is_null = what == NULL


def standard_row(row: Mapping[str, Any], layout: RowLayout) -> dict[str, Any]:
    """The row under TRL's names: `text`, `prompt` and `completion`, or `messages`.

    `tools` (a JSON list) and `chat_template_kwargs` are present only where the row has some. Raises
    BadValue.
    """
    if layout.conversational:
        return _conversation(row, layout)
    if layout.format == "alpaca":
        return _alpaca(row, layout)
    names = ("text",) if layout.format == "text" else ("prompt", "completion")
    return {name: _text(row, column) for name, column in zip(names, layout.columns, strict=True)}


def describe_value(value: Any) -> str:
    """`is null`, `is the number 1`, ...: a value as a message describes it."""
    if value is None:
        return NULL
    if isinstance(value, bool):
        return f"is {str(value).lower()}"
    if isinstance(value, float) and math.isnan(value):
        return "is NaN, a missing value"
    if isinstance(value, int | float):
        return f"is the number {value}"
    if isinstance(value, str):
        return f"is the text {shorten(value)}"
    if isinstance(value, bytes):
        return f"is binary data {shorten(value)}"
    if isinstance(value, list | tuple):
        return "is an empty list" if not value else f"is a list {shorten(value)}"
    if isinstance(value, Mapping):
        return f"is a struct {shorten(value)}"
    if isinstance(value, datetime.date | datetime.time):
        return f"is the time {value}"
    return f"is a {type(value).__name__}"


def shorten(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= SHOWN_CHARACTERS else f"{shown[:SHOWN_CHARACTERS]}..."


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            what = f"holds half a character (U+{ord(value[error.start]):04X})"
            raise BadValue(column, what, "write the whole character") from error
        return value
    if column not in row:
        raise BadValue(column, "is not there", "write it or remove the row")
    if value is None:
        raise BadValue(column, NULL, "write its text or remove the row")
    raise BadValue(column, f"{describe_value(value)}, not text", _text_fix(value))


def _text_fix(value: Any) -> str:
    """How to store a value as text."""
    if isinstance(value, int | float):
        return "write it in quotes in a JSONL file (a CSV column of numbers is read as numbers)"
    return "store it as text"


def _alpaca(row: Mapping[str, Any], layout: RowLayout) -> dict[str, Any]:
    instruction, output = layout.columns[:2]
    filled = {"instruction": _text(row, instruction)}
    template = ALPACA_WITHOUT_INPUT
    if row.get(ALPACA_INPUT) not in (None, ""):
        filled["input"] = _text(row, ALPACA_INPUT)
        template = ALPACA_WITH_INPUT
    return {"prompt": template.format_map(filled), "completion": _text(row, output)}


def _conversation(row: Mapping[str, Any], layout: RowLayout) -> dict[str, Any]:
    if layout.format == "prompt-completion":
        prompt, completion = layout.columns[:2]
        found: dict[str, Any] = {
            "prompt": _messages(row, prompt),
            "completion": _messages(row, completion),
        }
    else:
        found = {"messages": _messages(row, layout.columns[0])}
    if "tools" in layout.columns and (tools := _tools(row.get("tools"))):
        found["tools"] = tools
    if "chat_template_kwargs" in layout.columns and row.get("chat_template_kwargs") is not None:
        found["chat_template_kwargs"] = _template_arguments(row["chat_template_kwargs"])
    return found


def _messages(row: Mapping[str, Any], column: str) -> list[dict[str, Any]]:
    value = row.get(column)
    if column not in row:
        raise BadValue(column, "is not there", "write its messages or remove the row")
    if not isinstance(value, list) or not value:
        fix = 'write a list such as [{"role": "user", "content": "..."}], or remove the row'
        raise BadValue(column, describe_value(value), fix)
    return [_message(message, f"{column}[{at}]") for at, message in enumerate(value)]


def _message(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise BadValue(place, f"{describe_value(message)}, not a message", "write role and content")
    if message.get("role") is None and message.get("from") is not None:
        message = _from_sharegpt(message, place)
    if not isinstance(message.get("role"), str):
        what = f"has no role ({shorten(dict(message))})"
        raise BadValue(place, what, "write a role such as user or assistant")
    content = message.get("content")
    if isinstance(content, str):
        return dict(message)
    if isinstance(content, list) and not (message["role"] == "tool" and not _has_parts(content)):
        return {**message, "content": _join_parts(content, f"{place}.content")}
    if content is None and not any(message.get(key) for key in CONTENT_ALTERNATIVES):
        said = NULL if "content" in message else "is not there"
        raise BadValue(f"{place}.content", said, "write its text or remove the row")
    if content is not None and message["role"] != "tool":
        raise BadValue(
            f"{place}.content", f"{describe_value(content)}, not text", _text_fix(content)
        )
    return dict(message)


def _from_sharegpt(message: Mapping[str, Any], place: str) -> dict[str, Any]:
    role = SHAREGPT_ROLES.get(message["from"]) if isinstance(message["from"], str) else None
    if role is None:
        known = ", ".join(SHAREGPT_ROLES)
        raise BadValue(f"{place}.from", describe_value(message["from"]), f"known are {known}")
    if not isinstance(message.get("value"), str):
        what = describe_value(message.get("value")) if "value" in message else "is not there"
        raise BadValue(f"{place}.value", what, "write its text or remove the row")
    rest = {key: value for key, value in message.items() if key not in ("from", "value", "role")}
    return {"role": role, **rest, "content": message["value"]}


def _has_parts(content: Sequence[Any]) -> bool:
    return all(isinstance(part, Mapping) and "type" in part for part in content)


def _join_parts(parts: Sequence[Any], place: str) -> str:
    """The text of a content that is a list of parts, which must all be text."""
    if not parts:
        raise BadValue(place, "is an empty list", "write its text or remove the row")
    texts = []
    for at, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            said = (
                f"is a part of type {kind!r}"
                if kind not in (None, "text")
                else describe_value(part)
            )
            raise BadValue(f"{place}[{at}]", said, "only parts of type 'text' can be trained on")
        texts.append(part["text"])
    return "".join(texts)


def _tools(value: Any) -> str | None:
    """The tools of a row as JSON, which keeps each tool's own keys; None where it has none."""
    parsed = value
    if isinstance(value, str) and value.strip():
        try:
            parsed = json.loads(value)
        except ValueError as error:
            raise BadValue("tools", f"{describe_value(value)}, not JSON", "write a list") from error
    if parsed in (None, "", []):
        return None
    if not isinstance(parsed, list) or not all(isinstance(tool, Mapping) for tool in parsed):
        raise BadValue("tools", describe_value(parsed), "write a list of JSON schemas")
    return value if isinstance(value, str) else json.dumps(parsed, ensure_ascii=False)


def _template_arguments(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise BadValue(
            "chat_template_kwargs", describe_value(value), 'write a mapping such as {"a": 1}'
        )
    return dict(value)
