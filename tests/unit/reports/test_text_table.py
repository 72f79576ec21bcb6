"""The plain table that every listing is printed as."""

from __future__ import annotations

import sys

import pytest

from reports.text import text_table


def test_a_column_is_as_wide_as_its_widest_cell_on_a_terminal() -> None:
    assert text_table([("模型", "x"), ("abc", "y"), ("é", "")]) == ["模型  x", "abc   y", "é"]


def test_numbers_are_flush_right_and_rows_indented() -> None:
    assert text_table([("n", "k"), ("12.50", "a")], right=(0,), indent="  ") == [
        "      n  k",
        "  12.50  a",
    ]


def test_control_characters_are_escaped_before_they_are_counted() -> None:
    assert text_table([("\x1b[1m", "a"), ("b", "c")]) == [r"\u001b[1m  a", "b          c"]


def test_headings_of_several_lines_stand_over_a_rule() -> None:
    rows = [("name\nin full", "MiB"), ("a", "1,024")]
    assert text_table(rows, right=(1,), ruled=True) == [
        "name         MiB\nin full",
        "---------  -----",
        "a          1,024",
    ]


def test_nothing_is_an_empty_table() -> None:
    assert text_table([]) == []


def test_only_a_terminal_folds_its_last_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    rows = [("cell", "why"), ("123456789012", "one two three four five six seven")]
    assert text_table(rows)[1] == "123456789012  one two three four five six seven"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert text_table(rows)[1] == ("123456789012  one two three four five\n              six seven")
    monkeypatch.setenv("COLUMNS", "30")
    assert text_table(rows)[1] == "123456789012  one two three four five six seven"
