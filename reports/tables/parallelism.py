"""The table of parallelism x method: what dividing a cell over devices costs, and that it trains
the same.

Rows are comparable when they differ in nothing but how the same number of samples per optimizer
step is spread: parallelism, devices, machines, micro batch and accumulation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from harness.records.record import Record
from reports.records.derived import (
    communication_bytes,
    expected_share,
    global_batch,
    parameter_bytes,
    parameter_share,
    rank_imbalance,
)
from reports.statistics.intervals import Estimate, NotComparable
from reports.tables import estimates
from reports.tables.baseline import Baselines
from reports.tables.groups import Group
from reports.tables.metric_columns import figure_column
from reports.tables.model import Style, Table, TableColumn, bytes_style

AXES = (
    "parallelism",
    "devices",
    "nodes",
    "profile",
    "train.micro_batch_size",
    "train.gradient_accumulation_steps",
    "train.global_batch_size",
)
# Shown whether they differ or not.
ALWAYS_SHOWN = ("parallelism", "devices")
LOSS = "training loss"


@dataclass(frozen=True)
class OneProcess(Baselines):
    """Each row's baseline is the cell of one process with the same samples in a step."""

    def choose(self, item: Group) -> Group | str:
        """Of several, the one with the micro batch of the row, else with the largest."""
        found = self.comparable_rows.comparable(item)
        if not found:
            names = self.comparable_rows.fewest_differences(item)
            return f"the cell of one process differs in {', '.join(names)} too"
        wanted = global_batch(item.cell)
        same = [other for other in found if global_batch(other.cell) == wanted]
        if not same:
            return f"no cell of one process has its {wanted} samples in an optimizer step"
        return max(same, key=lambda other: (_micro(other) == _micro(item), _micro(other)))


def _micro(item: Group) -> int:
    return item.cell.train.micro_batch_size if item.cell.train else 0


def one_process(groups: Sequence[Group], axes: tuple[str, ...]) -> Baselines:
    """The measured cells of one process."""
    alone = [item for item in groups if not item.cell.strategy.several_devices]
    rows = [item for item in alone if item.measured]
    return OneProcess(
        rows,
        axes,
        "Baseline: the cell of one process that has the same samples in an optimizer step and "
        "differs in nothing but how they are spread.",
    )


def batch_column(table: Table) -> TableColumn:
    """Samples of one optimizer step, over all devices."""
    counts = [global_batch(row.group.cell) for row in table.rows]
    texts = [None if count is None else str(count) for count in counts]
    return TableColumn("global_batch", "Samples per step", "setting", [*texts])


def rank_columns(table: Table) -> list[TableColumn]:
    """What each rank holds and sends; a column nobody has a figure for is left out."""
    held = figure_column(
        table, "parameter_bytes", "Parameters per rank", "cost",
        lambda item: estimates.exact(item, parameter_bytes), "lower",
    )  # fmt: skip
    held.unit, held.style = bytes_style(held.estimates)
    share = figure_column(table, "parameter_share", "Share held", "cost", _share, "lower")
    expected = figure_column(table, "expected_share", "Expected share", "cost", _expected)
    uneven = figure_column(table, "rank_imbalance", "Imbalance", "cost", _imbalance, "lower")
    sent = figure_column(
        table, "communication_bytes", "Communication per step", "cost",
        lambda item: estimates.exact(item, communication_bytes), "lower",
    )  # fmt: skip
    sent.unit, sent.style = bytes_style(sent.estimates)
    for column in (share, expected, uneven):
        column.style = Style(scale=100, decimals=1, suffix=" %")
    columns = [held, share, expected, uneven, sent]
    for column in columns:
        column.part, column.show_n = "ranks", False  # counted, not sampled
    return [column for column in columns if column.estimates]


def _known(item: Group, figures: Sequence[float | None]) -> Estimate | None:
    known = [figure for figure in figures if figure is not None]
    return Estimate(max(known), None, None, len(item.measured), "runs") if known else None


def _share(item: Group) -> Estimate | None:
    return _known(item, [parameter_share(result.record) for result in item.measured])


def _expected(item: Group) -> Estimate | None:
    if _share(item) is None:
        return None
    return _known(item, [expected_share(item.cell)])


def _imbalance(item: Group) -> Estimate | None:
    return _known(item, [rank_imbalance(result.record) for result in item.measured])


def loss_columns(table: Table, baselines: Baselines) -> list[TableColumn]:
    """The loss of the last step, and how far the curve is from that of one process at most."""
    final = figure_column(table, "train_loss_final", "Final loss", "quality", _final, "lower")
    final.style = Style(decimals=4)

    def gap(item: Group) -> str | None:
        baseline = baselines.of(item)
        if baseline is None or baseline is item:
            return None if baseline is None else "baseline"
        return f"{loss_gap(item, baseline):.1e}"

    largest = figure_column(
        table, "train_loss_gap", "Largest difference from one process", "quality", gap, "lower"
    )
    for column in (final, largest):
        column.unit, column.part = "nats/token", LOSS
    return [column for column in (final, largest) if any(v is not None for v in column.values)]


def _final(item: Group) -> Estimate | None:
    losses = [result.record.quality.train_loss for result in item.measured]
    last = [each[-1] for each in losses if each and each[-1] is not None]
    if not last:
        return None
    mean = math.fsum(last) / len(last)
    return Estimate(mean, None, None, len(last), "runs")


def loss_gap(ours: Group, theirs: Group) -> float:
    """The largest absolute difference of two loss curves at one step, over all seeds in common.

    Raises NotComparable when there is no such seed or the curves are not of the same steps.
    """
    others = {result.record.cell.seed: result.record for result in theirs.measured}
    pairs = [
        (result.record, others[result.record.cell.seed])
        for result in ours.measured
        if result.record.cell.seed in others
    ]
    if not pairs:
        raise NotComparable("no seed in common with the cell of one process")
    return max(_gap(mine, other) for mine, other in pairs)


def _gap(ours: Record, theirs: Record) -> float:
    mine, other = ours.quality.train_loss, theirs.quality.train_loss
    if not mine or len(mine) != len(other):
        raise NotComparable("the loss curves are not of the same steps")
    if ours.verified.loss_normalization != theirs.verified.loss_normalization:
        raise NotComparable("the losses are not divided by the same number of tokens")
    if [a is None for a in mine] != [b is None for b in other]:
        raise NotComparable("a step without any label in one has some in the other")
    gaps = [abs(a - b) for a, b in zip(mine, other, strict=True) if a is not None and b is not None]
    # max() would drop a NaN or not, as it stands.
    return math.nan if any(map(math.isnan, gaps)) else max(gaps, default=0.0)
