"""Captions: what all rows of a table share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from harness.evaluation.score_precision import softmax_dtype
from harness.records.record import Record
from matrices.cell import SECTIONS, TOP_LEVEL, Cell
from reports.records.columns import PACKAGES
from reports.records.derived import METERS, precision_text
from reports.records.load import Result
from reports.records.steps_text import data_text, loss_text
from reports.records.verified_text import verified_caption
from reports.tables.groups import Group, hashable
from reports.tables.metric_choice import hidden_text
from reports.text import bytes_text, setting_text, short_name

# Shown even at their default: no reader should have to guess them.
ALWAYS = (
    "data.source",
    "data.max_length",
    "data.packing",
    "train.steps",
    "train.micro_batch_size",
    "train.gradient_accumulation_steps",
    "train.learning_rate",
    "train.optimizer",
    "model.weight_dtype",
    "model.compute_dtype",
    "adapter.rank",
    "adapter.target_modules",
    "adapter.alpha_per_rank",
    "quantization.quant_type",
    "quantization.double_quant",
)
DEFAULTS = {
    f"{section}.{leaf}": field.get_default(call_default_factory=True)
    for section, model in SECTIONS.items()
    for leaf, field in model.model_fields.items()
} | {
    "adapter.alpha_per_rank": 2.0,
    **{name: Cell.model_fields[name].get_default(call_default_factory=True) for name in TOP_LEVEL},
}
# Other sentences or the heading name these.
IN_OTHER_SENTENCES = (
    "method",
    "model.name",
    "model.fingerprint",
    "evaluate.tasks",
    "evaluate.limit",
)


def values_by_setting(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """Every setting to its distinct values among the groups that have it."""
    found: dict[str, dict[Hashable, Any]] = {}
    for item in groups:
        for name, value in item.settings.items():
            found.setdefault(name, {}).setdefault(hashable(value), value)
    return {name: list(values.values()) for name, values in found.items()}


def model_text(record: Record) -> str:
    """The model as a reader knows it; of a local directory its name and content hash."""
    model = record.cell.model
    text = setting_text("model.name", model.name)
    if model.fingerprint:
        text += f" (local, sha256 {model.fingerprint[:12]})"
    return f"{text} at {model.revision}" if model.revision else text


def hardware_text(record: Record) -> str:
    """The machine, as far as it bears on figures."""
    hardware = record.hardware
    if hardware.accelerator is None:
        return (
            f"{hardware.cpu}, {hardware.cpu_count} CPUs, "
            f"{bytes_text(hardware.host_memory_bytes)} of memory, no GPU"
        )
    text = f"{hardware.accelerator_count} × {hardware.accelerator}"
    if hardware.accelerator_memory_bytes is not None:
        text += f" ({bytes_text(hardware.accelerator_memory_bytes)})"
    driver = f", driver {hardware.driver}" if hardware.driver else ""
    return f"{text}{driver}, {hardware.cpu}"


def software_text(records: Sequence[Record]) -> str:
    """Versions and the commits of tunebench."""
    stack = records[0].stack
    parts = [f"python {stack.python}"]
    parts += [f"{name} {stack.packages[name]}" for name in PACKAGES if name in stack.packages]
    commits = sorted(
        {
            record.stack.commit[:12] + (" with local changes" if record.stack.dirty else "")
            for record in records
            if record.stack.commit
        }
    )
    if commits:
        parts.append("tunebench " + " and ".join(commits))
    return ", ".join(parts)


def constants_text(
    groups: Sequence[Group], values_of: Mapping[str, Sequence[Any]], shown: Sequence[str]
) -> str:
    """Settings with one value in all rows that have them, unless they are a default nobody would
    ask about."""
    parts = []
    for name, values in values_of.items():
        if name in shown or name in IN_OTHER_SENTENCES or len(values) > 1:
            continue
        if name in ALWAYS or values[0] != DEFAULTS.get(name):
            parts.append(f"{short_name(name)} {setting_text(name, values[0])}")
    seeds = sorted({result.record.cell.seed for item in groups for result in item.results})
    parts.append(f"{'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))}")
    return "Same in all rows: " + "; ".join(parts) + "; every other setting at its default."


def memory_text(records: Sequence[Record]) -> str:
    """Which meter is behind the peaks."""
    meters = sorted({r.memory.headline for r in records if r.memory.headline})
    if not meters:
        return ""
    text = "Peak memory of training: " + "; or ".join(METERS[meter] for meter in meters)
    phases = {r.memory.peak_phase for r in records if r.status == "ok" and r.memory.peak_phase}
    if len(phases) == 1:
        text += f"; reached in {phases.pop().replace('_', ' ')} in every row"
    return text + "."


def prediction_text(records: Sequence[Record]) -> str:
    """What the predicted peaks rest on."""
    predictions = [record.prediction for record in records if record.prediction is not None]
    engines = sorted({each.engine for each in predictions if each.engine})
    if not engines:
        return ""
    devices = sorted({each.device for each in predictions if each.device})
    of = f" of {' or '.join(devices)}" if devices else ""
    return (
        "Predicted peak: predicted before the run, not measured, by simulating the training step "
        f"on {' or '.join(engines)} tensors{of}; predicted vs measured is predicted / measured - 1."
    )


def speed_text(records: Sequence[Record]) -> str:
    """How speed was timed."""
    warmups = sorted({r.speed.warmup_steps for r in records if r.speed.step_seconds})
    if not warmups:
        return ""
    first = " or ".join(map(str, warmups))
    return (
        f"Step: median of the timed steps, the first {first} left out. "
        "Tokens/s: non-padding tokens over time."
    )


def quality_text(records: Sequence[Record], hidden: Sequence[str]) -> str:
    """Few-shot, precision, documents, whether the evaluation was partial, and what is not shown."""
    shots = {
        task: score.num_fewshot
        for record in records
        for task, score in record.quality.tasks.items()
        if score.num_fewshot is not None
    }
    parts = []
    if shots:
        scored = ", ".join(f"{task} {number}-shot" for task, number in shots.items())
        taken = sorted({found for record in records if (found := precision_text(record))})
        several = len({softmax_dtype(record) for record in records} - {None}) > 1
        refused = ", which are not compared" if several else ""
        precision = f"log-likelihoods in {' or '.join(taken)}{refused}"
        parts.append(f"Scored by lm-eval: {scored}; {precision}.")
    if any(score.subtasks for record in records for score in record.quality.tasks.values()):
        parts.append("Documents of one subtask of a group are a cluster.")
    limits = {record.cell.evaluate.limit for record in records}
    if limits != {None}:
        documents = " or ".join("all" if limit is None else f"first {limit}" for limit in limits)
        parts.append(f"Scores are partial: {documents} documents of each task.")
    return " ".join([*parts, *filter(None, [hidden_text(hidden)])])


def runs_text(groups: Sequence[Group], superseded: int) -> str:
    """How many runs ended how."""
    counts = Counter(result.record.status for item in groups for result in item.results)
    runs = sum(counts.values())
    ended = ", ".join(f"{number} {status}" for status, number in counts.most_common())
    text = f"{len(groups)} configurations, {runs} runs: {ended}."
    if superseded:
        text += f" Older attempts, since repeated, left out: {superseded}."
    return text


def caption(
    groups: Sequence[Group],
    values_of: Mapping[str, Sequence[Any]],
    shown: Sequence[str],
    hidden: Sequence[str],
    superseded: int,
    where: str = "",
) -> list[str]:
    """The sentences under a table; what has nothing to say is left out. `where` tells how the
    machines of its rows differ from the first one's."""
    results: list[Result] = [result for item in groups for result in item.results]
    records = [result.record for result in results]
    lines = [
        constants_text(groups, values_of, shown),
        f"Measured on {hardware_text(records[0])}; {software_text(records)}.",
        where,
        memory_text(records),
        verified_caption(records),
        prediction_text(records),
        data_text(records),
        speed_text(records),
        loss_text(records),
        quality_text(records, hidden),
        "Brackets: 95 % interval over what n counts (documents and seeds, processes, or the steps "
        "of one process; for memory the range of the runs); those of a column of differences hold "
        "together with 95 %. n is that of the heading unless a cell says another. One seed says "
        "nothing about other seeds, one process nothing about other processes.",
        runs_text(groups, superseded),
    ]
    return [line for line in lines if line]
