"""The columns of figures in a table: cost, quality, status."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from harness.evaluation.score_precision import softmax_dtype
from harness.records.record import Record
from reports.records.columns import Better
from reports.records.load import Index, bases
from reports.statistics.comparisons import joint_confidence
from reports.statistics.intervals import Estimate, NotComparable
from reports.tables import estimates
from reports.tables.baseline import Baselines
from reports.tables.groups import Group
from reports.tables.metric_choice import metric_text, metrics_shown
from reports.tables.model import Row, Style, Table, TableColumn, Value, bytes_style, seconds_style
from reports.text import bytes_text, one_line

Figure = Callable[[Group], Estimate | str | None]
Comparison = Callable[[Group, Group], Estimate | None]


def cost_columns(table: Table, baselines: Baselines) -> list[TableColumn]:
    """Memory, speed and size; a column nobody has a figure for is left out."""
    peak = figure_column(table, "peak_bytes", "Peak memory", "cost", estimates.peak_bytes, "lower")
    peak.unit, peak.style = bytes_style(peak.estimates)
    step = figure_column(
        table, "step_seconds", "Step time", "cost", estimates.step_seconds, "lower"
    )
    step.unit, step.style = seconds_style(step.estimates)
    rate = figure_column(
        table, "tokens_per_second", "Tokens/s", "cost", estimates.tokens_per_second, "higher"
    )
    change = figure_column(
        table, "peak_change", "Memory vs baseline", "cost",
        _against(baselines, estimates.peak_change), "lower",
    )  # fmt: skip
    change.style = Style(scale=100, decimals=1, suffix=" %", signed=True)
    confidence = joint_confidence(_compared(table, baselines))

    def slower(ours: Group, theirs: Group) -> Estimate | None:
        return estimates.step_ratio(ours, theirs, confidence)

    ratio = figure_column(
        table, "step_ratio", "Step vs baseline", "cost", _against(baselines, slower), "lower"
    )
    ratio.style = Style(decimals=2, suffix="×")
    phase = figure_column(table, "peak_phase", "Peak in", "cost", _peak_phase)
    if len(set(phase.values) - {None}) == 1:  # The caption says it.
        phase.values = [None] * len(phase.values)
    sizes, predicted = _sizes(table), _predicted(table)
    for column in (peak, change, phase, *predicted, *sizes):
        column.part = "memory"
    for column in (step, ratio, rate):
        column.part = "speed"
    for column in (peak, change, step, ratio, rate):
        mark_doubts(table, column)
    columns = [peak, *predicted, change, phase, step, ratio, rate, *sizes]
    return [column for column in columns if any(value is not None for value in column.values)]


def mark_doubts(table: Table, column: TableColumn) -> None:
    """A note at every figure of a run whose devices something else used meanwhile."""
    for place, row in enumerate(table.rows):
        if not isinstance(column.values[place], Estimate):
            continue
        records = [result.record for result in row.group.measured]
        doubts = [
            table.note(f"In doubt: {row.name}, seed {r.cell.seed}: {one_line(doubt)}.")
            for r in records
            for doubt in r.contaminated
        ]
        column.marks[place] += tuple(doubts)


def _predicted(table: Table) -> list[TableColumn]:
    """What was predicted before the run, also where the run failed, and how far off it was."""
    peak = TableColumn("predicted_peak_bytes", "Predicted peak", "cost", [])
    for row in table.rows:
        peak.values.append(None if row.reference else estimates.predicted_peak_bytes(row.group))
        peak.marks.append(())
    peak.unit, peak.style = bytes_style(peak.estimates)
    error = figure_column(
        table, "prediction_error", "Predicted vs measured", "cost", estimates.prediction_error
    )
    error.style = Style(scale=100, decimals=2, suffix=" %", signed=True)
    # A prediction repeats exactly: an n would say nothing.
    peak.show_n = error.show_n = False
    return [peak, error]


def _sizes(table: Table) -> list[TableColumn]:
    def parameters(item: Group) -> Estimate | None:
        return estimates.exact(item, lambda record: record.artifacts.trainable_parameters)

    def adapter(item: Group) -> Estimate | None:
        return estimates.exact(item, lambda record: record.artifacts.adapter_bytes)

    trained = figure_column(table, "trainable_parameters", "Trainable", "cost", parameters)
    trained.unit, trained.style = "million parameters", Style(scale=1e-6, decimals=2)
    stored = figure_column(table, "adapter_bytes", "Adapter file", "cost", adapter, "lower")
    stored.unit, stored.style = bytes_style(stored.estimates)
    # Counted, not measured: an n would say nothing.
    trained.show_n = stored.show_n = False
    return [trained, stored]


def _peak_phase(item: Group) -> str | None:
    phases = {result.record.memory.peak_phase for result in item.measured}
    named = sorted(phase.replace("_", " ") for phase in phases if phase)
    return " or ".join(named) or None


def quality_columns(
    table: Table,
    baselines: Baselines,
    roles: Sequence[str],
    newest: Index,
    metrics: Sequence[str] = (),
) -> list[TableColumn]:
    """For each task and metric: the score, and its difference to the base models and to the
    baseline. The intervals of a column of differences hold together (`joint_confidence`)."""
    groups = [row.group for row in table.rows if not row.reference]
    to_base = {role: joint_confidence(_judged(groups, role, newest)) for role in roles}
    to_baseline = joint_confidence(_compared(table, baselines))
    columns = []
    for task, metric in metrics_shown(groups, metrics).pairs:
        better = _direction(groups, task, metric)
        name, unit = f"{task}.{metric}", metric_text(metric)

        def value(item: Group, task: str = task, metric: str = metric) -> Estimate | None:
            return estimates.quality(item, task, metric)

        columns.append(figure_column(table, name, task, "quality", value, better, references=True))
        comparisons = [
            (f"vs {role} base", _to_base(role, newest, task, metric, confidence))
            for role, confidence in to_base.items()
        ]
        gap = _quality_gap(task, metric, to_baseline)
        comparisons.append(("vs baseline", _against(baselines, gap)))
        for heading, compare in comparisons:
            column = figure_column(table, f"{name}.{heading}", heading, "quality", compare, better)
            column.style = Style(signed=True)
            columns.append(column)
        for column in columns:
            column.unit, column.part = column.unit or unit, column.part or task
    # A column of refusals says why by its notes.
    return [c for c in columns if any(value is not None for value in c.values) or any(c.marks)]


def precision_column(table: Table) -> list[TableColumn]:
    """In which dtype the log-likelihoods of each row were taken, where rows differ in that."""
    column = TableColumn("softmax_dtype", "Log-likelihoods in", "setting", [])
    for row in table.rows:
        found = {softmax_dtype(result.record) for result in row.group.measured} - {None}
        column.values.append(", ".join(sorted(map(str, found))) or None)
    return [column] if len(set(column.values) - {None}) > 1 else []


def _direction(groups: Sequence[Group], task: str, metric: str) -> Better | None:
    for item in groups:
        for result in item.results:
            score = result.record.quality.tasks.get(task)
            if score is not None and metric in score.higher_is_better:
                return "higher" if score.higher_is_better[metric] else "lower"
    return None


def _quality_gap(task: str, metric: str, confidence: float) -> Comparison:
    return lambda ours, theirs: estimates.quality_difference(ours, theirs, task, metric, confidence)


def _to_base(role: str, newest: Index, task: str, metric: str, confidence: float) -> Figure:
    def compare(item: Group) -> Estimate | None:
        base = bases(item.results[0], newest).get(role)
        return estimates.base_difference(item, base, task, metric, confidence)

    return compare


def _judged(groups: Sequence[Group], role: str, newest: Index) -> int:
    """How many rows are compared with the base model of this role."""
    return sum(role in bases(item.results[0], newest) for item in groups if item.measured)


def _compared(table: Table, baselines: Baselines) -> int:
    """How many rows of the table are compared with a baseline."""
    return sum(
        row.group not in baselines.rows and _has_baseline(row.group, baselines)
        for row in table.rows
        if row.group.measured and not row.reference
    )


def _has_baseline(item: Group, baselines: Baselines) -> bool:
    try:
        found = baselines.of(item)
    except NotComparable:
        return False
    return found is not None and bool(found.measured)


def _against(baselines: Baselines, compare: Comparison) -> Figure:
    def against(item: Group) -> Estimate | str | None:
        baseline = baselines.of(item)
        if baseline is item:
            return "baseline"
        if baseline is None:
            return None
        if not baseline.measured:
            raise NotComparable("the baseline did not end ok")
        return compare(item, baseline)

    return against


def figure_column(
    table: Table,
    name: str,
    heading: str,
    panel: str,
    figure: Figure,
    better: Better | None = None,
    references: bool = False,
) -> TableColumn:
    """One figure for every row; only columns for `references` have one for base models. A refused
    comparison becomes a dash with a note; an estimate brings its own."""
    column = TableColumn(name, heading, panel, [], better=better)
    for row in table.rows:
        value: Value = None
        marks: tuple[int, ...] = ()
        if row.group.measured and (references or not row.reference):
            try:
                value = figure(row.group)
            except NotComparable as refusal:
                marks = (table.note(f"Not compared: {refusal}."),)
        if isinstance(value, Estimate) and value.note:
            marks = (table.note(_remark(value)),)
        column.values.append(value)
        column.marks.append(marks)
    return column


def _remark(value: Estimate) -> str:
    if value.low is None:
        return f"No interval: {value.note}."
    return f"{value.note[:1].upper()}{value.note[1:]}."


def status_column(table: Table) -> TableColumn:
    """How the runs of each row ended; the reasons become notes."""
    column = TableColumn("status", "Status", "status", [])
    for row in table.rows:
        records = [result.record for result in row.group.results]
        counts = Counter(record.status for record in records)
        texts = [f"{number} {status}" for status, number in counts.items()]
        column.values.append(texts[0].split()[1] if len(counts) == 1 else ", ".join(texts))
        bad = [record for record in records if record.status != "ok"]
        column.marks.append(tuple(table.note(failure_text(row, record)) for record in bad))
    return column


def failure_text(row: Row, record: Record) -> str:
    """`lora r64 qv, seed 1: oom in backward, 2.00 GiB asked for: reason`."""
    text = f"{row.name}, seed {record.cell.seed}: {record.status}"
    failure = record.failure
    phase = (failure.phase if failure else None) or record.phase
    if phase:
        text += f" in {phase.replace('_', ' ')}"
    if failure and failure.requested_bytes is not None:
        text += f", {bytes_text(failure.requested_bytes)} asked for"
    reason = record.reason or (failure.message if failure else None)
    return f"{text}: {one_line(reason)}" if reason else f"{text}."
