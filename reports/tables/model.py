"""What a table is: columns of estimates and texts, rows of groups, a caption and notes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

from reports.records.columns import Better
from reports.statistics.intervals import Estimate, counted
from reports.tables.groups import Group
from reports.text import DASH, GIB, MIB, signed

Value = Estimate | str | None
ARROWS = {"lower": "↓", "higher": "↑"}
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
PANELS = {"cost": "Cost", "quality": "Quality"}


@dataclass(frozen=True)
class Style:
    """From a figure to its text: times `scale`, `decimals` (none: as many as the interval
    supports), then `suffix`."""

    scale: float = 1.0
    decimals: int | None = None
    suffix: str = ""
    signed: bool = False


@dataclass(frozen=True)
class Row:
    """One configuration, and what it is called among those of its table; a reference row is a base
    model that nothing is compared to here."""

    group: Group
    name: str
    reference: bool = False
    baseline: bool = False


class Text(NamedTuple):
    """A value in words: the figure, its interval, n where the heading's does not hold, and the
    marks of notes."""

    figure: str
    interval: str = ""
    n: str = ""
    marks: str = ""


@dataclass
class TableColumn:
    """`name` is for machines and carries the unit of the raw figure; `heading` and `unit` are for
    readers. `panel` is `setting` or `status` (in every panel), `cost` or `quality`."""

    name: str
    heading: str
    panel: str
    values: list[Value]
    unit: str = ""
    style: Style = field(default_factory=Style)
    better: Better | None = None
    marks: list[tuple[int, ...]] = field(default_factory=list)
    show_n: bool = True
    part: str = ""

    @property
    def estimates(self) -> list[Estimate]:
        return [value for value in self.values if isinstance(value, Estimate)]

    @property
    def common_n(self) -> str:
        """`n = 36 timed steps`: what holds for most figures; cells say where theirs differs."""
        counts = Counter(count(estimate) for estimate in self.estimates)
        return counts.most_common(1)[0][0] if counts and self.show_n else ""

    @property
    def heading_lines(self) -> list[str]:
        """Name and direction, unit, n."""
        arrow = f"\N{NO-BREAK SPACE}{ARROWS[self.better]}" if self.better else ""
        return [line for line in (self.heading + arrow, self.unit, self.common_n) if line]

    def parts(self) -> list[Text]:
        """Each value as a reader sees it."""
        decimals = self.style.decimals
        if decimals is None:
            decimals = decimals_for(self.estimates, self.style.scale)
        marks = self.marks or [()] * len(self.values)
        common_n = self.common_n
        return [
            self._text(value, decimals, common_n)._replace(marks=mark_text(mark))
            for value, mark in zip(self.values, marks, strict=True)
        ]

    def texts(self) -> list[str]:
        """Each value on one line, with marks of notes."""
        return [" ".join(part for part in text[:3] if part) + text.marks for text in self.parts()]

    def _text(self, value: Value, decimals: int, common_n: str) -> Text:
        if not isinstance(value, Estimate):
            return Text(DASH if value is None else value)
        figure = self._number(value.value, decimals) + self.style.suffix
        interval = n = ""
        if value.low is not None and value.high is not None:
            low, high = self._number(value.low, decimals), self._number(value.high, decimals)
            interval = f"[{low}, {high}]"
        if self.show_n and count(value) != common_n:
            n = f"({count(value).removeprefix('n = ')})"
        return Text(figure, interval, n)

    def _number(self, figure: float, decimals: int) -> str:
        scaled = figure * self.style.scale
        if self.style.signed:
            return signed(scaled, decimals)
        return f"{scaled:,.{decimals}f}".replace("-", "−")


def count(estimate: Estimate) -> str:
    """`n = 3 seeds`."""
    return f"n = {counted(estimate.n, estimate.over)}"


def mark_text(marks: Sequence[int]) -> str:
    """Numbers of notes as superscripts."""
    return " ".join(str(mark).translate(SUPERSCRIPTS) for mark in marks)


def decimals_for(estimates: Sequence[Estimate], scale: float) -> int:
    """Decimals at which the typical half-width of the intervals is 2 to 20 units of the last one,
    the same for the whole column; four significant digits where there are no intervals."""
    halves = [
        (e.high - e.low) / 2 * scale for e in estimates if e.low is not None and e.high is not None
    ]
    halves = [half for half in halves if half > 0 and math.isfinite(half)]
    if halves:
        return _clamp(-math.floor(math.log10(median(halves) / 2)))
    sizes = [abs(e.value * scale) for e in estimates if e.value and math.isfinite(e.value)]
    return _clamp(3 - math.floor(math.log10(max(sizes)))) if sizes else 0


def _clamp(decimals: int) -> int:
    return max(0, min(5, decimals))


def bytes_style(estimates: Sequence[Estimate]) -> tuple[str, Style]:
    """Unit and style of a column of bytes: GiB when its largest figure has 10 of them."""
    largest = max((estimate.value for estimate in estimates), default=0)
    if largest >= 10 * GIB:
        return "GiB", Style(scale=1 / GIB, decimals=2)
    return "MiB", Style(scale=1 / MIB, decimals=1)


def seconds_style(estimates: Sequence[Estimate]) -> tuple[str, Style]:
    """Unit and style of a column of seconds: ms when its largest figure is below one second."""
    largest = max((estimate.value for estimate in estimates), default=0)
    return ("ms", Style(scale=1000)) if largest < 1 else ("s", Style())


class Panel(NamedTuple):
    """A part of a table: which columns, and the places of its rows."""

    title: str
    columns: list[TableColumn]
    rows: list[int]


@dataclass
class Table:
    """One table: a model on a stack. `caption` holds what all rows share, `notes` what the
    superscript marks refer to (the first is 1)."""

    name: str
    title: str
    rows: list[Row]
    columns: list[TableColumn] = field(default_factory=list)
    caption: list[str] = field(default_factory=list)
    _notes: dict[str, int] = field(default_factory=dict)

    @property
    def notes(self) -> list[str]:
        return list(self._notes)

    def panels(self, by_part: bool = False) -> list[Panel]:
        """The table in parts that fit a page: settings and status with the cost, then with the
        quality (`by_part`: in narrower ones, a task each). Base models have no row among the
        costs; a part without any figure is left out unless all are."""
        common = [column for column in self.columns if column.panel == "setting"]
        status = [column for column in self.columns if column.panel == "status"]
        found = []
        parts: dict[str, list[TableColumn]] = {}
        for column in self.columns:
            if column.panel in PANELS:
                part = f": {column.part}" if by_part and column.part else ""
                parts.setdefault(PANELS[column.panel] + part, []).append(column)
        for title, columns in parts.items():
            if any(column.estimates for column in columns):
                rows = [
                    place
                    for place, row in enumerate(self.rows)
                    if not row.reference or any(column.values[place] for column in columns)
                ]
                found.append(Panel(title, common + status + columns, rows))
        return found or [Panel("", common + status, list(range(len(self.rows))))]

    def note(self, text: str) -> int:
        """The number of a note, added unless it is there."""
        return self._notes.setdefault(text, len(self._notes) + 1)
