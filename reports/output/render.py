"""Tables as Markdown, CSV, HTML, LaTeX and plain text. Text from records is always escaped."""

from __future__ import annotations

import csv
import functools
import io
import os
import re
import shlex
import textwrap
from pathlib import Path
from urllib.parse import quote

from harness.ranks.launch_command import command_of_record
from matrices.errors import UserError, nearest
from reports.output.html import Html, tag
from reports.records.load import Result
from reports.statistics.intervals import Estimate
from reports.tables.model import Row, Table, TableColumn, Text, Value, mark_text
from reports.text import harmless, printable, text_table

FORMATS = ("md", "csv", "html", "latex", "text")
TEXT_WIDTH = 110
NO_BREAK = "\N{NO-BREAK SPACE}"
# Underscores within words and brackets that open no link are left alone: they read better raw.
MARKDOWN_SPECIAL = re.compile(r"([\\`*|~]|(?<!\w)_|_(?!\w)|\](?=[(\[:]))")
LATEX_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{letter: f"\\{letter}" for letter in "&%$#_"},
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "−": "$-$",
    "–": "--",
    "×": r"$\times$",
    "±": r"$\pm$",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "…": r"\ldots{}",
    **{mark: f"$^{number}$" for number, mark in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
}


def render(table: Table, format: str, relative_to: Path | None = None) -> str:
    """A table as `md`, `csv`, `html` (a fragment), `latex` (booktabs) or `text`.

    Links to records (md, html) are relative to the directory `relative_to`; without one there are
    none. Raises UserError for another format.
    """
    check_format(format)
    if format == "md":
        return _markdown(table, relative_to)
    if format == "html":
        return _html(table, relative_to)
    return {"csv": _csv, "latex": _latex, "text": _text}[format](table)


def check_format(format: str) -> None:
    """Raises UserError for a word that is no format."""
    if format not in FORMATS:
        raise UserError(
            f"no format {format!r}{nearest(format, FORMATS)}; there are {', '.join(FORMATS)}",
            key="--format",
        )


# Each of several tables links to the same records.
@functools.lru_cache(maxsize=65536)
def record_link(result: Result, relative_to: Path) -> str:
    """A relative URL of a record, safe in an attribute and in a Markdown link."""
    path = os.path.relpath(result.path.absolute(), relative_to.absolute())
    return quote(Path(path).as_posix())


@functools.lru_cache(maxsize=65536)
def command_text(result: Result, relative_to: Path) -> str:
    """What reproduces a cell by hand, called in the directory `relative_to`."""
    directory = Path(os.path.relpath(result.directory.absolute(), relative_to.absolute()))
    output = Path(f"{result.directory.absolute().name}.by-hand")
    return shlex.join(command_of_record(result.record, directory, output))


def short_id(result: Result) -> str:
    """The part of the cell's identity that names it to a reader."""
    return result.record.cell_id[:8]


def _ids(row: Row) -> str:
    others = len(row.group.results) - 1
    return short_id(row.group.results[0]) + (f" +{others}" if others else "")


def escape_markdown(text: str) -> str:
    """Text that GitHub shows as it is: no pipes, markup, HTML or line breaks of its own."""
    joined = " ".join(text.split())
    plain = joined.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return MARKDOWN_SPECIAL.sub(r"\\\1", plain)


def _markdown(table: Table, relative_to: Path | None) -> str:
    lines = [f"### {escape_markdown(table.title)}", ""]
    for title, columns, places in table.panels():
        head = ["<br>".join(map(_markdown_heading, column.heading_lines)) for column in columns]
        texts = []
        for column in columns:
            parts, numbers = column.parts(), bool(column.estimates)
            texts.append([_markdown_cell(parts[place], numbers) for place in places])
        ruler = ["---:" if column.estimates else ":---" for column in columns]
        if relative_to is not None:
            head.append("Record")
            texts.append([_markdown_links(table.rows[place], relative_to) for place in places])
            ruler.append(":---")
        lines += [f"**{title}**", ""] if title else []
        lines += [_pipes(head), _pipes(ruler)]
        lines += [_pipes(list(cells)) for cells in zip(*texts, strict=True)]
        lines.append("")
    lines += [f"{mark_text([n])} {escape_markdown(t)}<br>" for n, t in enumerate(table.notes, 1)]
    lines += [""] * bool(table.notes)
    lines += [escape_markdown(sentence) for sentence in table.caption]
    return "\n".join(lines) + "\n"


def _markdown_heading(line: str) -> str:
    return _kept_together(escape_markdown(line))


def _markdown_cell(text: Text, numbers: bool) -> str:
    lines = (text.figure + text.marks, text.interval, text.n)
    escaped = [escape_markdown(line) for line in lines if line]
    if numbers:  # GitHub must not break a figure over two lines.
        escaped = [line.replace(" ", NO_BREAK) for line in escaped]
    return "<br>".join(escaped)


def _at(column: TableColumn, places: list[int]) -> list[str]:
    texts = column.texts()
    return [texts[place] for place in places]


def _pipes(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _markdown_links(row: Row, relative_to: Path) -> str:
    return " ".join(
        f"[{short_id(result)}]({record_link(result, relative_to)})" for result in row.group.results
    )


def _csv(table: Table) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = []
    columns = [(column, bool(column.estimates)) for column in table.columns]
    for column, numbers in columns:
        parts = ["", "_low", "_high", "_n", "_over"] if numbers else [""]
        names += [column.name.replace(" ", "_") + part for part in parts]
    writer.writerow([*names, "reference", "baseline", "cell_ids", "notes"])
    notes = table.notes
    for place, row in enumerate(table.rows):
        cells: list[object] = []
        marks: set[int] = set()
        for column, numbers in columns:
            cells += _csv_cells(column.values[place], numbers)
            marks.update(column.marks[place] if column.marks else ())
        ids = " ".join(result.record.cell_id for result in row.group.results)
        text = " ".join(notes[number - 1] for number in sorted(marks))
        writer.writerow([*cells, row.reference, row.baseline, ids, text])
    return out.getvalue()


def _csv_cells(value: Value, numbers: bool) -> list[object]:
    if not numbers:
        return ["" if value is None else value]
    if isinstance(value, Estimate):
        return [value.value, value.low, value.high, value.n, value.over]
    return [""] * 5


def _html(table: Table, relative_to: Path | None) -> str:
    parts = [tag("h3", table.title)]
    for title, columns, places in table.panels():
        parts += [tag("h4", title)] if title else []
        parts.append(tag("div", _html_table(table, columns, places, relative_to), class_="scroll"))
    notes = [tag("li", note) for note in table.notes]
    parts += [tag("ol", *notes, class_="notes")] if notes else []
    sentences = [tag("p", sentence) for sentence in table.caption]
    parts.append(tag("div", *sentences, class_="caption"))
    return tag("section", *parts, class_="table")


def _html_table(
    table: Table, columns: list[TableColumn], places: list[int], relative_to: Path | None
) -> Html:
    head = [
        tag("th", *_lines(column.heading_lines), class_=_side(column), scope="col")
        for column in columns
    ]
    parts = [column.parts() for column in columns]
    sides = [_side(column) for column in columns]
    body = []
    for place in places:
        row = table.rows[place]
        cells = [
            _html_cell(column_parts[place], side)
            for side, column_parts in zip(sides, parts, strict=True)
        ]
        if relative_to is not None:
            cells.append(tag("td", _html_records(row, relative_to), class_="record"))
        kind = "reference" if row.reference else "baseline" if row.baseline else "row"
        body.append(tag("tr", *cells, class_=kind))
    head += [tag("th", "Record", scope="col")] if relative_to is not None else []
    return tag("table", tag("thead", tag("tr", *head)), tag("tbody", *body))


def _lines(lines: list[str]) -> list[Html]:
    kinds = ["name"] + ["sub"] * (len(lines) - 1)
    return [tag("span", line, class_=kind) for line, kind in zip(lines, kinds, strict=True)]


def _side(column: TableColumn) -> str:
    return "number" if column.estimates else "text"


def _html_cell(text: Text, side: str) -> Html:
    under = [tag("span", part, class_="ci") for part in (text.interval, text.n) if part]
    return tag("td", text.figure, text.marks, *under, class_=side)


def _html_records(row: Row, relative_to: Path) -> Html:
    runs = [
        tag(
            "p",
            tag("a", short_id(result), href=record_link(result, relative_to)),
            f" seed {result.record.cell.seed}, {result.record.status}",
            tag("code", command_text(result, relative_to)),
        )
        for result in row.group.results
    ]
    return tag("details", tag("summary", _ids(row)), *runs)


def escape_latex(text: str) -> str:
    """Text as LaTeX shows it."""
    return "".join(LATEX_SPECIAL.get(letter, letter) for letter in " ".join(text.split()))


def _latex(table: Table) -> str:
    lines = []
    for title, columns, places in table.panels():
        sides = "".join("r" if column.estimates else "l" for column in columns)
        head = [
            r"\shortstack{" + r" \\ ".join(map(escape_latex, column.heading_lines)) + "}"
            for column in columns
        ]
        texts = [[escape_latex(text) for text in _at(column, places)] for column in columns]
        name = f"{table.title} ({title.lower()})" if title else table.title
        caption = " ".join([f"{name}.", *table.caption])
        lines += [r"\begin{table*}", r"\centering", rf"\caption{{{escape_latex(caption)}}}"]
        lines += [rf"\begin{{tabular}}{{{sides}}}", r"\toprule", " & ".join(head) + r" \\"]
        lines += [r"\midrule", *[" & ".join(row) + r" \\" for row in zip(*texts, strict=True)]]
        lines += [r"\bottomrule", r"\end{tabular}"]
        for number, note in enumerate(table.notes, 1):
            lines.append(rf"\par\footnotesize {escape_latex(mark_text([number]) + ' ' + note)}")
        lines += [r"\end{table*}", ""]
    return "\n".join(lines)


def _text(table: Table) -> str:
    name = printable(table.title)
    lines = [name, "=" * len(name), ""]
    for title, columns, places in table.panels(by_part=True):
        head = [*map(_wrapped_heading, columns), "Cell"]
        texts = [[printable(text).strip() for text in _at(column, places)] for column in columns]
        ids = [_ids(table.rows[place]) for place in places]
        right = [place for place, column in enumerate(columns) if column.estimates]
        lines += [printable(title)] if title else []
        lines += [*text_table([head, *zip(*texts, ids, strict=True)], right, ruled=True), ""]
    for number, note in enumerate(table.notes, 1):
        lines += _wrap(f"{mark_text([number])} {note}")
    for sentence in table.caption:
        lines += _wrap(sentence)
    return harmless("\n".join(lines) + "\n")


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(
        printable(text), TEXT_WIDTH, subsequent_indent="  ", break_on_hyphens=False
    )


def _kept_together(line: str) -> str:
    # The arrow of a heading stays with its last word.
    return printable(line).replace(" ↓", f"{NO_BREAK}↓").replace(" ↑", f"{NO_BREAK}↑")


def _wrapped_heading(column: TableColumn) -> str:
    lines = []
    for line in column.heading_lines:
        lines += textwrap.wrap(
            _kept_together(line), 16, break_long_words=False, break_on_hyphens=False
        )
    return "\n".join(lines)
