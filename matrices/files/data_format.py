"""Which columns of the data are read, and as what."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matrices.cell import Data
from matrices.errors import UserError, nearest

# In the order in which columns are looked for when neither a format nor a column is named.
FORMATS = ("chat", "prompt-completion", "text", "sharegpt", "alpaca")
COLUMN_SETTINGS = {
    "chat": ("messages_column",),
    "prompt-completion": ("prompt_column", "completion_column"),
    "text": ("text_column",),
}
SHAREGPT_COLUMN = "conversations"
ALPACA_COLUMNS = ("instruction", "output")
ALPACA_INPUT = "input"
# Read beside messages: TRL hands both to the chat template.
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")


@dataclass(frozen=True)
class RowLayout:
    """How rows are read. `columns` are the source's, those the format needs first."""

    format: str
    columns: tuple[str, ...]
    conversational: bool
    """Rows hold messages, which go through the chat template."""


def layout_of(data: Data, columns: Sequence[str], first: Mapping[str, Any]) -> RowLayout:
    """The layout of rows with these columns, `first` being one of them.

    A `format` that is asked for wins. Else a column that is named, which is one that differs from
    its default; it must be there. Else the first of FORMATS whose columns are there. Raises
    UserError, with the columns there are, when no format can be told.
    """
    if data.prompt_column == data.completion_column:
        raise UserError(
            f"prompt_column and completion_column are both {data.prompt_column!r}; the completion "
            "is what follows the prompt, name its own column",
            key="data.completion_column",
        )
    chosen = data.format if data.format != "auto" else _told(data, columns)
    needed = _needed(data, chosen)
    _must_be_there(data, needed, columns)
    conversational = chosen in ("chat", "sharegpt") or (
        chosen == "prompt-completion" and isinstance(first.get(needed[0]), list)
    )
    optional: tuple[str, ...] = TEMPLATE_COLUMNS if conversational else ()
    if chosen == "alpaca":
        optional = (ALPACA_INPUT,)
    if chosen == "chat" and _says_from(first.get(needed[0])):
        chosen = "sharegpt"
    read = (*needed, *(name for name in optional if name in columns and name not in needed))
    return RowLayout(chosen, read, conversational)


def format_named(data: Data, written: Collection[str], columns: Sequence[str]) -> str | None:
    """The format to put down for data whose column settings `written` are named by the user, where
    they hold nothing but their defaults and another format's columns would be taken before.

    A cell holds values only: what is named there must differ from its default.
    """
    named = [chosen for chosen, settings in COLUMN_SETTINGS.items() if {*settings} & {*written}]
    if len(named) != 1 or data.format != "auto" or any(_named(data, f) for f in COLUMN_SETTINGS):
        return None
    if not {*_needed(data, named[0])} <= {*columns} or _told(data, columns) == named[0]:
        return None
    return named[0]


def _needed(data: Data, chosen: str) -> tuple[str, ...]:
    if chosen == "alpaca":
        return ALPACA_COLUMNS
    if chosen == "sharegpt":
        return (data.messages_column if _named(data, "chat") else SHAREGPT_COLUMN,)
    return tuple(getattr(data, setting) for setting in COLUMN_SETTINGS[chosen])


def _named(data: Data, chosen: str) -> list[str]:
    """The settings of a format whose column is another than the default."""
    return [
        setting
        for setting in COLUMN_SETTINGS.get(chosen, ())
        if getattr(data, setting) != Data.model_fields[setting].default
    ]


def _told(data: Data, columns: Sequence[str]) -> str:
    named = [chosen for chosen in COLUMN_SETTINGS if _named(data, chosen)]
    complete = [chosen for chosen in named or FORMATS if set(_needed(data, chosen)) <= {*columns}]
    if named and len(complete) > 1:
        raise UserError(
            f"columns of {' and '.join(complete)} are named and {data.source} has them all; say "
            f"which is meant, e.g. format: {complete[0]}",
            key="data.format",
        )
    if complete:
        return complete[0]
    if named:
        return named[0]
    raise UserError(
        f"{data.source} has the columns {', '.join(columns)}: none of "
        f"{data.messages_column!r}, {data.prompt_column!r} and {data.completion_column!r}, "
        f"{data.text_column!r}, {SHAREGPT_COLUMN!r} (ShareGPT), or {ALPACA_COLUMNS[0]!r} and "
        f"{ALPACA_COLUMNS[1]!r} (Alpaca); name them, e.g. text_column: {columns[0]}",
        key="data.text_column",
    )


def _must_be_there(data: Data, needed: Sequence[str], columns: Sequence[str]) -> None:
    for column in needed:
        if column not in columns:
            raise UserError(
                f"{column!r} is not a column of {data.source}, which has "
                + ", ".join(columns)
                + nearest(column, columns),
                key=_column_setting(data, column),
            )


def _column_setting(data: Data, column: str) -> str:
    for leaf in ("text_column", "prompt_column", "completion_column", "messages_column"):
        if getattr(data, leaf) == column:
            return f"data.{leaf}"
    return "data.format"


def _says_from(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and bool(messages)
        and isinstance(messages[0], dict)
        and messages[0].get("from") is not None
        and messages[0].get("role") is None
    )
