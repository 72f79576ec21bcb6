"""The baseline of a table, and which rows may be compared with it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matrices.errors import UserError, nearest
from reports.statistics.intervals import NotComparable
from reports.tables.groups import (
    SETTINGS,
    Group,
    baseline_arguments,
    differing,
    hashable,
    matches,
)
from reports.text import setting_text, short_name

TARGETS = ("qv", "attention", "mlp", "all-linear")
CANDIDATES_SHOWN = 12
Key = tuple[Any, ...]


class ComparableRows:
    """Rows, found by their settings other than the axes of a table."""

    def __init__(self, rows: Sequence[Group], axes: Sequence[str]) -> None:
        self.rows, self.axes = rows, frozenset(axes)
        self._places = {row: place for place, row in enumerate(rows)}
        self._by_names: dict[Key, list[Group]] = {}
        for row in rows:
            self._by_names.setdefault(tuple(row.settings), []).append(row)
        # By the names of all settings of a row, and those it has in common with another.
        self._by_values: dict[tuple[Key, Key], dict[Key, list[Group]]] = {}
        self._fewest: dict[Key, list[str]] = {}

    def __contains__(self, item: Group) -> bool:
        return item in self._places

    def key(self, item: Group) -> Key:
        """The settings other than the axes: two rows with one key compare alike."""
        return tuple(
            (name, hashable(value))
            for name, value in item.settings.items()
            if name not in self.axes
        )

    def comparable(self, item: Group) -> list[Group]:
        """The rows that differ from this one in nothing but the axes, in their order."""
        found: list[Group] = []
        for names, rows in self._by_names.items():
            common = tuple(name for name in item.settings if name in rows[0].settings)
            if (names, common) not in self._by_values:
                self._by_values[names, common] = self._index(rows, common)
            found += self._by_values[names, common].get(self._values(item, common), [])
        return sorted(found, key=self._places.__getitem__)

    def fewest_differences(self, item: Group) -> list[str]:
        """The settings, other than the axes, in which the nearest of the rows differs."""
        key = self.key(item)
        if key not in self._fewest:
            self._fewest[key] = self._nearest(item)
        return self._fewest[key]

    def _nearest(self, item: Group) -> list[str]:
        nearest: list[str] | None = None
        for row in self.rows:
            names = [name for name in differing(item, row) if name not in self.axes]
            if nearest is None or len(names) < len(nearest):
                nearest = names
            if len(nearest) <= 1:
                break
        return nearest or []

    def _index(self, rows: Sequence[Group], names: Key) -> dict[Key, list[Group]]:
        found: dict[Key, list[Group]] = {}
        for row in rows:
            found.setdefault(self._values(row, names), []).append(row)
        return found

    def _values(self, item: Group, names: Key) -> Key:
        return tuple(hashable(item.settings[name]) for name in names if name not in self.axes)


@dataclass(frozen=True)
class Baselines:
    """The baseline rows of a table, and the sentence that names them. Of several, each row's
    baseline is the one that differs from it in `axes` only."""

    rows: Sequence[Group]
    axes: tuple[str, ...]
    sentence: str

    @functools.cached_property
    def comparable_rows(self) -> ComparableRows:
        return ComparableRows(self.rows, self.axes)

    @functools.cached_property
    def _answers(self) -> dict[Group, Group | str | None]:
        return {}

    def of(self, item: Group) -> Group | None:
        """The row to compare with (itself for a baseline row), none when the table has none.

        Raises NotComparable, naming the settings, when it differs in more than the axes.
        """
        if item not in self._answers:
            is_baseline = item in self.comparable_rows
            self._answers[item] = item if is_baseline else self.choose(item) if self.rows else None
        answer = self._answers[item]
        if isinstance(answer, str):
            raise NotComparable(answer)
        return answer

    def choose(self, item: Group) -> Group | str:
        """The baseline of a row that is none itself, or why it has none."""
        found = self.comparable_rows.comparable(item)
        if len(found) == 1:
            return found[0]
        if found:
            return "several rows could be its baseline; name one with --baseline"
        names = self.comparable_rows.fewest_differences(item)
        return f"the baseline differs in {', '.join(map(short_name, names))} too"


Default = Callable[[Sequence[Group], tuple[str, ...]], Baselines]


def parse_baseline(text: str) -> dict[str, Any]:
    """`method=lora, rank=8` as dotted settings and values; a list is `[q_proj, v_proj]`.

    Raises UserError for a part that is not setting=value or a setting that does not exist.
    """
    import yaml

    spec: dict[str, Any] = {}
    for part in _split(text):
        name, equals, value = part.partition("=")
        if not equals:
            raise UserError(
                f"{part.strip()!r} is not setting=value, as in method=lora,rank=8",
                key="--baseline",
            )
        try:
            spec[_dotted(name.strip())] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"{value!r} is not a value: {error}", key="--baseline") from error
    return spec


def _split(text: str) -> list[str]:
    parts, depth = [""], 0
    for letter in text:
        depth += {"[": 1, "]": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part for part in parts if part.strip()]


def _dotted(name: str) -> str:
    short = {"model": "model.name", "data": "data.source"}
    if name in SETTINGS or name in short:
        return short.get(name, name)
    matches = [known for known in SETTINGS if known.rpartition(".")[2] == name]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UserError(f"{name!r} is one of {', '.join(matches)}", key="--baseline")
    bare = [known.rpartition(".")[2] for known in SETTINGS]
    raise UserError(f"no setting {name!r}{nearest(name, bare)}", key="--baseline")


def check(spec: Mapping[str, Any], sections: Sequence[Sequence[Group]]) -> None:
    """Raise UserError, listing candidates, unless every section has one row with these settings
    or none, and some section has one."""
    found = [[g for g in groups if matches(g.cell, spec)] for groups in sections]
    several = next((rows for rows in found if len(rows) > 1), None)
    if several:
        raise UserError(
            f"{spec_text(spec)} selects {len(several)} rows; one of: {_candidates(several)}",
            key="--baseline",
        )
    if not any(found) and sections:
        raise UserError(
            f"no row has {spec_text(spec)}; there are: {_candidates(max(sections, key=len))}",
            key="--baseline",
        )


def _candidates(groups: Sequence[Group]) -> str:
    more = len(groups) - CANDIDATES_SHOWN
    shown = "; ".join(baseline_arguments(groups, CANDIDATES_SHOWN))
    return shown + (f"; and {more} more" if more > 0 else "")


def spec_text(spec: Mapping[str, Any]) -> str:
    """Settings and values as one reads them: `method = lora, rank = 8`."""
    return ", ".join(f"{short_name(key)} = {setting_text(key, spec[key])}" for key in spec)


def named(groups: Sequence[Group], axes: tuple[str, ...], spec: Mapping[str, Any]) -> Baselines:
    """The row that `--baseline` names; none in a table that has no such row."""
    rows = [item for item in groups if matches(item.cell, spec)]
    text = spec_text(spec)
    return Baselines(rows, axes, f"Baseline: {text}." if rows else f"No row here has {text}.")


def first_of(*specs: Mapping[str, Any]) -> Default:
    """A default: the measured rows with the first of these settings that any of them has."""

    def choose(groups: Sequence[Group], axes: tuple[str, ...]) -> Baselines:
        for spec in specs:
            rows = [item for item in groups if matches(item.cell, spec) and item.measured]
            if rows:
                each = f"; for each row the one that differs in nothing but {_names(axes)}"
                sentence = f"Baseline: {spec_text(spec)}{each if len(rows) > 1 else ''}."
                return Baselines(rows, axes, sentence)
        wanted = " or ".join(spec_text(spec) for spec in specs)
        return Baselines([], axes, f"No row with {wanted} was measured: no differences.")

    return choose


def lowest_rank(groups: Sequence[Group], axes: tuple[str, ...]) -> Baselines:
    """A default: of the measured rows that differ in rank and targets only, the one of lowest
    rank with the first of qv, attention, mlp, all-linear."""
    measured = ComparableRows([item for item in groups if item.measured], axes)
    families: dict[Key, Group] = {}
    for item in groups:
        families.setdefault(measured.key(item), item)
    comparable = [measured.comparable(item) for item in families.values()]
    lowest = [min(found, key=_size) for found in comparable if found]
    return Baselines(
        list(dict.fromkeys(lowest)),
        axes,
        f"Baseline: of the rows that differ in nothing but {_names(axes)}, the lowest rank with "
        f"the first of {', '.join(TARGETS)}.",
    )


def _size(item: Group) -> tuple[int, int, str]:
    adapter = item.cell.adapter
    if adapter is None:
        return 0, 0, ""
    target = adapter.target_modules
    place = TARGETS.index(target) if target in TARGETS else len(TARGETS)
    return adapter.rank, place, str(target)


def _names(axes: Sequence[str]) -> str:
    return ", ".join(map(short_name, axes))
