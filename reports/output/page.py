"""One HTML page that needs nothing else: tables, figures, and every run with its command."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from harness.records.record import Record
from reports.output.figures import Drawing, drawings
from reports.output.html import Html, tag
from reports.output.page_style import STYLE
from reports.output.render import command_text, record_link, render, short_id
from reports.records.load import Index, Result, index
from reports.tables.build import section_title
from reports.tables.captions import hardware_text, model_text
from reports.tables.groups import Group, names, section_key, sorted_groups
from reports.tables.model import Table
from reports.text import DASH, one_line, seconds_text

READING = (
    "A row is one configuration. Figures of several seeds are means with a 95 % interval over "
    "seeds; figures of one seed carry an interval over its documents or timed steps, which says "
    "nothing about other seeds. Differences pair the same documents or the same seeds, and are "
    "given only between configurations that differ in nothing but what the table is about. An "
    "arrow points to what is better. A dash is something that was not measured; it is never zero."
)

# A figure is drawn before the page knows how wide its place will be.
FIT = 'addEventListener("load", () => dispatchEvent(new Event("resize")));'


def page(
    results: Sequence[Result],
    tables: Sequence[Table],
    directory: Path,
    name: str,
    metrics: Sequence[str] = (),
) -> str:
    """The page for these results; links to records are relative to `directory`, where it will be.
    All text from records is escaped. `metrics` are those chosen for the figures."""
    newest = index(results)
    sections = _sections(newest)
    tables_of: dict[tuple[str, ...], list[Table]] = {}
    for table in tables:
        tables_of.setdefault(_key(table), []).append(table)
    parts = [_header(results, name)]
    for key, groups in sections.items():
        figures = [_figure(drawing) for drawing in drawings(groups, newest, metrics)]
        found = tables_of.get(key, [])
        parts.append(_section(groups, found, figures, directory, alone=len(sections) == 1))
    parts += [tag("h2", "All runs"), _runs(results, newest, directory)]
    parts += [tag("h2", "How to read this"), tag("p", READING, class_="reading")]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"Tunebench: {name}"),
        Html(f"<style>{STYLE}</style>"),
        Html(f"<script>{_plotly_script()}\n{FIT}</script>"),
    )
    return "<!doctype html>\n" + tag("html", head, tag("body", tag("main", *parts)), lang="en")


def _plotly_script() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def _key(table: Table) -> tuple[str, ...]:
    row = next(row for row in table.rows if not row.reference)
    return section_key(row.group.results[0])


def _sections(newest: Index) -> dict[tuple[str, ...], list[Group]]:
    sections: dict[tuple[str, ...], list[Group]] = {}
    for item in sorted_groups(newest):
        if item.cell.method != "base":
            sections.setdefault(section_key(item.results[0]), []).append(item)
    return sections


def _header(results: Sequence[Result], name: str) -> Html:
    counts = Counter(result.record.status for result in results)
    chips = [
        tag("span", f"{number} {status}", class_=f"chip {status}")
        for status, number in counts.most_common()
    ]
    times = sorted(result.record.started for result in results)
    days = " to ".join(dict.fromkeys((times[0][:10], times[-1][:10])))
    return tag(
        "header",
        tag("h1", f"Tunebench report: {name}"),
        tag("p", f"{len(results)} records, started {days}", class_="sub"),
        tag("p", *chips, class_="chips"),
    )


def _section(
    groups: Sequence[Group],
    tables: Sequence[Table],
    figures: Sequence[Html],
    directory: Path,
    alone: bool,
) -> Html:
    first = groups[0].results[0]
    parts = [] if alone else [tag("h2", section_title(first))]
    machine = f"{model_text(first.record)}, measured on {hardware_text(first.record)}"
    parts.append(tag("p", machine, class_="sub"))
    parts += [Html(render(table, "html", directory)) for table in tables[:1]]
    parts.append(tag("div", *figures, class_="figures"))
    parts += [Html(render(table, "html", directory)) for table in tables[1:]]
    return tag("section", *parts)


def _figure(drawing: Drawing) -> Html:
    import plotly.io

    plot = plotly.io.to_html(
        drawing.figure,
        full_html=False,
        include_plotlyjs=False,
        config={"responsive": True, "displayModeBar": False},
        default_height=f"{drawing.height}px",
        validate=False,
    )
    caption = tag("figcaption", tag("strong", drawing.title), " ", drawing.reading)
    return tag("figure", caption, tag("div", Html(plot), class_="plot"))


def _runs(results: Sequence[Result], newest: Index, directory: Path) -> Html:
    in_force = set(newest.values())
    head = ("Record", "Configuration", "Seed", "Status", "Took", "Why", "Command")
    rows = []
    name_of = dict(zip(results, names([Group((each,)) for each in results]), strict=True))
    for result in sorted(results, key=lambda r: (name_of[r], r.record.cell.seed)):
        record = result.record
        status = record.status + ("" if result in in_force else ", superseded")
        rows.append(
            tag(
                "tr",
                tag("td", tag("a", short_id(result), href=record_link(result, directory))),
                tag("td", name_of[result]),
                tag("td", str(record.cell.seed), class_="number"),
                tag("td", tag("span", status, class_=f"chip {record.status}")),
                tag("td", seconds_text(_took(result)), class_="number"),
                tag("td", _why(record)),
                tag("td", tag("code", command_text(result, directory))),
            )
        )
    table = tag(
        "table",
        tag("thead", tag("tr", *[tag("th", word, scope="col") for word in head])),
        tag("tbody", *rows),
        class_="runs",
    )
    return tag("div", table, class_="scroll")


def _why(record: Record) -> str:
    """Why it did not end ok, and why its figures are in doubt."""
    doubts = [f"in doubt: {doubt}" for doubt in record.contaminated]
    return one_line("; ".join([*([record.reason] if record.reason else []), *doubts])) or DASH


def _took(result: Result) -> float | None:
    from datetime import datetime

    record = result.record
    if record.ended is None:
        return None
    ended, started = datetime.fromisoformat(record.ended), datetime.fromisoformat(record.started)
    return (ended - started).total_seconds()
