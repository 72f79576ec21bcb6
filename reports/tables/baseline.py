"""The baseline of a table, and which rows may be compared with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matrices.errors import UserError, nearest
from reports.statistics.intervals import NotComparable
from reports.tables.groups import SETTINGS, Group, describe, differing, matches
from reports.text import setting_text, short_name

TARGETS = ("qv", "attention", "mlp", "all-linear")
CANDIDATES_LISTED = 12


@dataclass(frozen=True)
class Baselines:
    """The baseline rows of a table, `told` in a sentence. Of several, each row's baseline is the
    one that differs from it in `axes` only."""

    rows: Sequence[Group]
    axes: tuple[str, ...]
    told: str

    def of(self, item: Group) -> Group | None:
        """The row to compare with (itself for a baseline row), none when the table has none.

        Raises NotComparable, naming the settings, when it differs in more than the axes.
        """
        if not self.rows or item in self.rows:
            return item if item in self.rows else None
        beyond = [beyond_axes(item, other, self.axes) for other in self.rows]
        fitting = [other for other, keys in zip(self.rows, beyond, strict=True) if not keys]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise NotComparable("several rows could be its baseline; name one with --baseline")
        fewest = min(beyond, key=len)
        raise NotComparable(f"the baseline differs in {', '.join(map(short_name, fewest))} too")


Default = Callable[[Sequence[Group], tuple[str, ...]], Baselines]


def beyond_axes(ours: Group, theirs: Group, axes: Sequence[str]) -> list[str]:
    """The settings, other than the axes, in which two rows differ."""
    return [key for key in differing(ours.cell, theirs.cell) if key not in axes]


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
            f"{spec_text(spec)} selects {len(several)} rows; one of: {_listed(several)}",
            key="--baseline",
        )
    if not any(found) and sections:
        raise UserError(
            f"no row has {spec_text(spec)}; there are: {_listed(max(sections, key=len))}",
            key="--baseline",
        )


def _listed(groups: Sequence[Group]) -> str:
    told = [describe(item, groups) for item in groups]
    more = len(told) - CANDIDATES_LISTED
    return "; ".join(told[:CANDIDATES_LISTED]) + (f"; and {more} more" if more > 0 else "")


def spec_text(spec: Mapping[str, Any]) -> str:
    """Settings and values as one reads them: `method = lora, rank = 8`."""
    return ", ".join(f"{short_name(key)} = {setting_text(key, spec[key])}" for key in spec)


def named(groups: Sequence[Group], axes: tuple[str, ...], spec: Mapping[str, Any]) -> Baselines:
    """The row that `--baseline` names; none in a table that has no such row."""
    rows = [item for item in groups if matches(item.cell, spec)]
    told = f"Baseline: {spec_text(spec)}." if rows else f"No row here has {spec_text(spec)}."
    return Baselines(rows, axes, told)


def first_of(*specs: Mapping[str, Any]) -> Default:
    """A default: the rows with the first of these settings that any measured row has."""

    def choose(groups: Sequence[Group], axes: tuple[str, ...]) -> Baselines:
        for spec in specs:
            rows = [item for item in groups if matches(item.cell, spec) and item.measured]
            if rows:
                told = f"Baseline: {spec_text(spec)}"
                each = f"; for each row the one that differs in nothing but {_names(axes)}"
                return Baselines(rows, axes, f"{told}{each if len(rows) > 1 else ''}.")
        wanted = " or ".join(spec_text(spec) for spec in specs)
        return Baselines([], axes, f"No row with {wanted} was measured: no differences.")

    return choose


def lowest_rank(groups: Sequence[Group], axes: tuple[str, ...]) -> Baselines:
    """A default: of the measured rows that differ in rank and targets only, the one of lowest
    rank with the first of qv, attention, mlp, all-linear."""
    rows: list[Group] = []
    for item in groups:
        alike = [g for g in groups if g.measured and not beyond_axes(item, g, axes)]
        lowest = min(alike, key=_size, default=None)
        if lowest is not None and lowest not in rows:
            rows.append(lowest)
    return Baselines(
        rows,
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
