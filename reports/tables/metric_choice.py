"""Which metrics of which tasks a table and a figure show, and what is said of the rest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from harness.records.record import Record
from matrices.errors import UserError, nearest
from reports.records.derived import quality_keys
from reports.tables.groups import Group

MAXIMUM_TASKS = 6
MAXIMUM_NAMES = 6


class Shown(NamedTuple):
    """`pairs` of task and metric that are shown; `hidden` names the tasks, and the metrics of shown
    tasks, that are not."""

    pairs: list[tuple[str, str]]
    hidden: list[str]


def metrics_shown(groups: Sequence[Group], chosen: Sequence[str] = ()) -> Shown:
    """Of each task the `chosen` metrics it has; where it has none of them, bits per byte if there
    is one, else the task's first. The tasks of a group follow it when all of them fit."""
    records = [result.record for item in groups for result in item.results]
    metrics: dict[str, list[str]] = {}
    for task, metric in quality_keys(records):
        metrics.setdefault(task, []).append(metric)
    tasks = _tasks_shown(list(metrics), _subtasks(records))
    pairs, hidden = [], []
    for task in tasks:
        default = "bits_per_byte" if "bits_per_byte" in metrics[task] else metrics[task][0]
        wanted = [name for name in metrics[task] if _is_chosen(name, chosen)] or [default]
        pairs += [(task, name) for name in wanted]
        hidden += [f"{task} {metric_text(name)}" for name in metrics[task] if name not in wanted]
    return Shown(pairs, hidden + [task for task in metrics if task not in tasks])


def check_metrics(records: Iterable[Record], chosen: Sequence[str]) -> None:
    """Raise UserError for a chosen metric that no record has."""
    known = dict.fromkeys(metric for _, metric in quality_keys(records))
    for name in chosen:
        if not any(_is_chosen(metric, [name]) for metric in known):
            known_text = f"there are {', '.join(known)}" if known else "nothing was scored"
            raise UserError(
                f"no record has a metric {name!r}{nearest(name, known)}; {known_text}",
                key="--metric",
            )


def metric_text(metric: str) -> str:
    """`bits_per_byte,none` as `bits per byte`; the filter is said when lm-eval applied one."""
    name, _, applied = metric.partition(",")
    text = name.replace("_", " ")
    return text if applied in ("", "none") else f"{text} ({applied})"


def hidden_text(hidden: Sequence[str]) -> str:
    """A sentence that names what is not shown; empty when all is."""
    if not hidden:
        return ""
    named = ", ".join(hidden[:MAXIMUM_NAMES])
    more = len(hidden) - MAXIMUM_NAMES
    named += f" and {more} more" if more > 0 else ""
    return f"Not shown here but in records.csv (--metric chooses): {named}."


def _is_chosen(metric: str, chosen: Sequence[str]) -> bool:
    """A metric is chosen by its name, with the filter that lm-eval applied or without."""
    return metric in chosen or metric.partition(",")[0] in chosen


def _subtasks(records: Iterable[Record]) -> dict[str, list[str]]:
    return {
        task: score.subtasks
        for record in records
        for task, score in record.quality.tasks.items()
        if score.subtasks
    }


def _tasks_shown(tasks: Sequence[str], subtasks: dict[str, list[str]]) -> list[str]:
    """What stands in no group first; then, level by level, what is in the groups shown."""
    inside = {child for children in subtasks.values() for child in children}
    level = [task for task in tasks if task not in inside] or list(tasks)
    shown = level[:MAXIMUM_TASKS]
    while level:
        level = [child for task in level for child in subtasks.get(task, []) if child in tasks]
        if len(shown) + len(level) > MAXIMUM_TASKS:
            break
        shown += [task for task in level if task not in shown]
    return shown
