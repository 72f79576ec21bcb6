"""Tables of results with figures, intervals and differences to a named baseline.

A table holds one model on one stack. Its rows are configurations; only seeds are averaged. A row
is compared with the baseline only when they differ in nothing but the axes the table is about;
else the difference is a dash and a note names the other settings that differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matrices.cell import Quantization
from matrices.errors import UserError, nearest
from matrices.language.labels import QUANTIZATION, tails
from reports.records.load import Index, Result, bases, index
from reports.statistics.intervals import Estimate
from reports.tables.baseline import Default, check, first_of, lowest_rank, named, parse_baseline
from reports.tables.captions import caption, model_text, values_by_setting
from reports.tables.groups import (
    Group,
    matches,
    names,
    section_key,
    sort_key,
    sorted_groups,
)
from reports.tables.machines import mark
from reports.tables.metric_choice import check_metrics, metrics_shown
from reports.tables.metric_columns import (
    cost_columns,
    precision_column,
    quality_columns,
    status_column,
)
from reports.tables.model import Row, Table, TableColumn
from reports.tables.parallelism import (
    ALWAYS_SHOWN,
    AXES,
    batch_column,
    loss_columns,
    one_process,
    rank_columns,
)
from reports.text import setting_text, short_name


@dataclass(frozen=True)
class Spec:
    """What a table is about: the settings that may differ from the baseline, the methods it has
    rows for, those of which it needs one, the baseline when none is named, the base models its
    rows are judged against, and whether it is about parallelism over several devices."""

    title: str
    axes: tuple[str, ...]
    methods: tuple[str, ...]
    needs: tuple[str, ...]
    default: Default
    roles: tuple[str, ...] = ("untouched",)
    ranks: bool = False  # rows of any number of devices together, with what each rank holds


Sections = dict[tuple[str, ...], list[Group]]

DATA = "data.fingerprint"
STORAGE = "quantization"
PLAIN_NF4 = {"quantization.quant_type": "nf4", "quantization.double_quant": False}
TABLES: dict[str, Spec] = {
    "methods": Spec(
        "Method comparison",
        ("method",),
        ("full", "lora", "qlora"),
        ("full", "lora", "qlora"),
        first_of({"method": "full"}, {"method": "lora"}),
        ("untouched", "quantized"),
    ),
    "quantization": Spec(
        "Quantization comparison",
        ("method", "quantization.quant_type", "quantization.double_quant"),
        ("lora", "qlora"),
        ("qlora",),
        first_of({"method": "lora"}, PLAIN_NF4),
        ("untouched", "quantized"),
    ),
    "rank-targets": Spec(
        "Rank and target modules",
        ("adapter.rank", "adapter.target_modules"),
        ("lora", "qlora"),
        ("lora", "qlora"),
        lowest_rank,
    ),
    "parallelism": Spec(
        "Parallelism and method",
        AXES,
        ("full", "lora", "qlora"),
        ("full", "lora", "qlora"),
        one_process,
        ranks=True,
    ),
}


def build(
    records: Sequence[Result],
    table: str,
    baseline: str | None = None,
    metrics: Sequence[str] = (),
) -> list[Table]:
    """One table per model, stack and number of devices; none when there are no rows for it.

    `baseline` is setting=value pairs (`method=lora,rank=8`) and must select exactly one row of
    each table that has such a row. Default baselines, matched to each row so that only the axes
    differ: methods, full (else lora); quantization, lora (else nf4 without double quantization);
    rank-targets, the lowest rank with the first of qv, attention, mlp, all-linear; parallelism,
    one process with the same samples in a step; always among the rows that were measured.
    `metrics` are shown for each task that has one of them, in place of its usual one.

    Raises UserError for an unknown table, for a baseline that selects no row or several, and for a
    metric that no record has.
    """
    if table not in TABLES:
        raise UserError(f"no table {table!r}{nearest(table, TABLES)}", key="--table")
    check_metrics((result.record for result in records), metrics)
    explicit = parse_baseline(baseline) if baseline else None
    newest = index(records)
    sections = _sections(sorted_groups(newest), TABLES[table])
    if explicit is not None and sections:
        check(explicit, list(sections.values()))
    return _tables(records, newest, table, sections, explicit, metrics)


def build_all(
    records: Sequence[Result], baseline: str | None = None, metrics: Sequence[str] = ()
) -> list[Table]:
    """Every table that has rows. A table in which no row has the `baseline` keeps its default.

    Raises UserError for a baseline that selects no row of any table, or several of one, and for a
    metric that no record has.
    """
    check_metrics((result.record for result in records), metrics)
    newest = index(records)
    groups = sorted_groups(newest)
    sections = {name: _sections(groups, spec) for name, spec in TABLES.items()}
    explicit = parse_baseline(baseline) if baseline else None
    if explicit is not None:
        check(explicit, [rows for found in sections.values() for rows in found.values()])
    tables: list[Table] = []
    for name, found in sections.items():
        has_it = explicit is not None and any(
            matches(item.cell, explicit) for rows in found.values() for item in rows
        )
        tables += _tables(records, newest, name, found, explicit if has_it else None, metrics)
    return tables


def _tables(
    records: Sequence[Result],
    newest: Index,
    name: str,
    sections: Sections,
    explicit: dict[str, Any] | None,
    metrics: Sequence[str],
) -> list[Table]:
    counts = _superseded(records, newest, TABLES[name])
    return [
        _table(name, groups, newest, explicit, counts.get(key, 0), metrics)
        for key, groups in sections.items()
    ]


def _sections(groups: Sequence[Group], spec: Spec) -> Sections:
    sections: Sections = {}
    for item in groups:
        if item.cell.method in spec.methods:
            sections.setdefault(_section(item.results[0], spec), []).append(item)
    return {
        key: groups
        for key, groups in sections.items()
        if any(item.cell.method in spec.needs for item in groups)
        and not (spec.ranks and all(item.cell.devices == 1 for item in groups))
    }


def _section(result: Result, spec: Spec) -> tuple[str, ...]:
    """What a table holds together: without the number of devices where that is what it is about."""
    key = section_key(result)
    return key[:-1] if spec.ranks else key


def _superseded(records: Sequence[Result], newest: Index, spec: Spec) -> dict[tuple[str, ...], int]:
    kept = {id(result) for result in newest.values()}
    counts: dict[tuple[str, ...], int] = {}
    for result in records:
        if id(result) not in kept and result.record.cell.method != "base":
            key = _section(result, spec)
            counts[key] = counts.get(key, 0) + 1
    return counts


def _table(
    name: str,
    groups: list[Group],
    newest: Index,
    explicit: dict[str, Any] | None,
    superseded: int,
    metrics: Sequence[str],
) -> Table:
    spec = TABLES[name]
    baselines = named(groups, spec.axes, explicit) if explicit else spec.default(groups, spec.axes)
    references = _references(groups, newest)
    items = [*references, *groups]
    table = Table(
        name=name,
        title=f"{spec.title}: {section_title(groups[0].results[0])}",
        rows=[
            Row(item, row_name, place < len(references), item in baselines.comparable_rows)
            for place, (item, row_name) in enumerate(zip(items, names(items), strict=True))
        ],
    )
    values = values_by_setting(groups)
    shown = _shown_settings(values, spec)
    status = status_column(table)
    ran_on, where = mark(table.rows)
    table.columns = [
        *[_setting_column(table, setting) for setting in shown],
        *precision_column(table),
        *([ran_on] if ran_on is not None else []),
        *([batch_column(table)] if spec.ranks else []),
        *cost_columns(table, baselines),
        *(rank_columns(table) if spec.ranks else []),
        *(loss_columns(table, baselines) if spec.ranks else []),
        *quality_columns(table, baselines, spec.roles, newest, metrics),
        *([status] if set(status.values) != {"ok"} else []),
    ]
    hidden = metrics_shown(groups, metrics).hidden
    shown = [*shown, *QUANTIZATION] if STORAGE in shown else shown
    table.caption = [
        baselines.sentence,
        *caption(groups, values, shown, hidden, superseded, where),
    ]
    return table


def section_title(result: Result) -> str:
    """The model and the machine of a table."""
    hardware = result.record.hardware
    device = hardware.cpu
    if hardware.accelerator is not None:
        device = f"{hardware.accelerator_count} × {hardware.accelerator}"
    return f"{model_text(result.record)} on {device}"


def _references(groups: Sequence[Group], newest: Index) -> list[Group]:
    """The base models that rows are judged against, each once, the untouched one first."""
    found = dict.fromkeys(
        base for item in groups for base in bases(item.results[0], newest).values()
    )
    return sorted((Group((base,)) for base in found), key=sort_key)


def _shown_settings(values: Mapping[str, Sequence[Any]], spec: Spec) -> list[str]:
    """The method, the axes, then whatever else is not the same in all rows that have it."""
    axes = ALWAYS_SHOWN if spec.ranks else spec.axes
    fixed = ["method", *[axis for axis in axes if axis in values and axis != "method"]]
    names = fixed + [name for name in values if len(values[name]) > 1 and name not in fixed]
    # One column says both: nf4, nf4+dq.
    return list(dict.fromkeys(STORAGE if name in QUANTIZATION else name for name in names))


def _setting_column(table: Table, name: str) -> TableColumn:
    texts: list[Estimate | str | None] = []
    for row in table.rows:
        flat = row.group.settings
        text = setting_text(name, flat[name]) if name in flat else None
        quantization = row.group.cell.quantization
        stored = storage_text(quantization) if quantization else None
        if name == STORAGE:
            text = stored
        elif name == "method" and row.reference:
            text = f"base, {stored or 'untouched'}"
        texts.append(text)
    if name == DATA:
        return TableColumn(name, "Data", "setting", _data_names(table))
    heading = short_name(name)
    return TableColumn(name, heading[:1].upper() + heading[1:], "setting", texts)


def _data_names(table: Table) -> list[Estimate | str | None]:
    """Local data by the name of its file; with its hash only where the same file was changed."""
    read = [row.group.cell.data for row in table.rows]
    found = {(data.source, data.fingerprint) for data in read if data}
    versions = Counter(source for source, _ in found)
    called = tails(list(versions))
    texts: list[Estimate | str | None] = []
    for data in read:
        several = data is not None and versions[data.source] > 1
        suffix = f" ({data.fingerprint[:12]})" if data and data.fingerprint and several else ""
        texts.append(called[data.source] + suffix if data else None)
    return texts


def storage_text(quantization: Quantization) -> str:
    """`nf4`, or `nf4+dq` with double quantization."""
    return quantization.quant_type + ("+dq" if quantization.double_quant else "")
