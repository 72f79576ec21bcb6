"""One record as a person reads it: `tunebench show CELL`. Plain text, no colours."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from harness.ranks.launch_command import accelerate, command_of_record
from harness.records.memory import CATEGORIES, Memory
from harness.records.part import PHASES
from harness.records.record import Record
from harness.records.verified import PassedThrough
from matrices.cell import SECTIONS, flatten, label
from reports.records.derived import METERS, phase_peak_bytes, precision_text, timed_seconds
from reports.records.load import Result
from reports.records.samples import difference, score
from reports.records.steps_text import data_facts, loss_facts, step_facts
from reports.records.verified_text import adapter_text, behaviour_text, share_text
from reports.show.ranks import rank_facts, rank_rows
from reports.statistics.intervals import Estimate, NotComparable
from reports.statistics.step_times import step_seconds, tokens_per_second
from reports.tables.metric_choice import metric_text
from reports.text import (
    DASH,
    bytes_text,
    count_text,
    harmless,
    printable,
    seconds_text,
    setting_text,
    signed,
    text_table,
)

WIDTH = 100
BAR = 30


def show(result: Result, judged: Mapping[str, Result]) -> str:
    """A record in full; `judged` are the base models to judge it against, by role (`untouched`,
    `quantized`), as `reports.records.load.bases` finds them."""
    parts = [
        _head(result),
        _settings(result.record),
        _verified(result.record),
        _facts("Data, as it was prepared", data_facts(result.record)),
        _memory(result.record),
        _ranks(result.record),
        _facts("Steps, as they were counted", step_facts(result.record)),
        _speed(result.record),
        _facts("Training loss", loss_facts(result.record)),
        _quality(result, judged),
        _generations(result.record, judged.get("untouched")),
        _missing(result.record),
        _section("Run again", [f"  {shlex.join(_command(result))}"]),
    ]
    return harmless("\n".join(part for part in parts if part))


def _command(result: Result) -> list[str]:
    """To be called in the directory that the record's path starts in."""
    output = Path(f"{result.directory.name}.by-hand")
    return command_of_record(result.record, result.directory, output, accelerate())


def _section(title: str, lines: Iterable[str]) -> str:
    printed = list(lines)
    return "\n".join([title, *printed, ""]) if printed else ""


def _facts(title: str, facts: Mapping[str, str]) -> str:
    known = {name: text for name, text in facts.items() if text}
    return _section(title, [line for item in known.items() for line in _wrapped(*item)])


def _wrapped(name: str, text: str) -> list[str]:
    start = f"  {name:<14}"
    return textwrap.wrap(
        start + printable(text), WIDTH, subsequent_indent=" " * len(start), break_on_hyphens=False
    )


def _head(result: Result) -> str:
    record = result.record
    lines = [f"{printable(label(record.cell))}, seed {record.cell.seed}", ""]
    facts = {
        "status": _status(record),
        "cell": record.cell_id,
        "stack": record.stack_id,
        "started": f"{record.started}, attempt {record.attempt}",
        "ended": record.ended or "not ended",
        "on": _placed(record),
        "in doubt": "; ".join(record.contaminated),
        "record": str(result.path),
    }
    printed = [line for item in facts.items() if item[1] for line in _wrapped(*item)]
    return "\n".join([*lines, *printed, ""])


def _placed(record: Record) -> str:
    """The machines and the engine that started it there, where that was not this command line."""
    placed = record.placement
    parts = [", ".join(placed.hosts)] if placed.hosts else []
    if placed.engine in ("slurm", "ray"):
        parts.append(f"by {placed.engine}" + (f", job {placed.job}" if placed.job else ""))
    if placed.exclusive is False:
        parts.append("other cells may have run beside it")
    return "; ".join(parts)


def _status(record: Record) -> str:
    text: str = record.status
    failure = record.failure
    if record.status != "ok" and record.phase:
        text += f" in {record.phase.replace('_', ' ')}"
    if failure and failure.requested_bytes is not None:
        text += f", {bytes_text(failure.requested_bytes)} asked for"
    if record.reason:
        text += f": {record.reason}"
    return f"{text} ({failure.type}: {failure.message})" if failure else text


def _settings(record: Record) -> str:
    flat = flatten(record.cell)
    lines = _wrapped("method", record.cell.method)
    if record.cell.strategy.several_devices:
        machines = f" of {record.cell.nodes} machines" if record.cell.nodes > 1 else ""
        spread = f"{record.cell.parallelism} over {record.cell.devices} devices{machines}"
        lines += _wrapped("spread", spread)
    for section in SECTIONS:
        own = {name: value for name, value in flat.items() if name.startswith(f"{section}.")}
        texts = [
            f"{name.partition('.')[2]} {setting_text(name, value)}"
            for name, value in own.items()
            if (value is not None and value != {}) or name == "evaluate.limit"
        ]
        lines += _wrapped(section, "; ".join(texts)) if texts else []
    return _section("Settings", lines)


def _verified(record: Record) -> str:
    found = record.verified
    dtypes = ", ".join(f"{count_text(n)} {dtype}" for dtype, n in found.weight_dtypes.items())
    modules = found.adapter_module_count
    facts = {
        "optimizer": found.optimizer,
        "attention": found.attn_implementation,
        "weights": dtypes,
        "not in use": _unexpected(record.provenance.unexpected_weights),
        "4-bit modules": _modules(found.quantized_modules, found.quant_types),
        "in 4 bit": share_text(found.quantized_share),
        "adapters": _modules(modules, found.adapter_modules),
        "adapter": adapter_text(found.adapter),
        "behaviour": behaviour_text(found),
        "instead": "; ".join(found.substitutions),
        "passed through": "; ".join(_passed(*item) for item in found.passed_through.items()),
        "trainable": count_text(record.artifacts.trainable_parameters)
        + f" of {count_text(record.artifacts.total_parameters)} parameters",
        "adapter file": bytes_text(record.artifacts.adapter_bytes),
    }
    if record.artifacts.total_parameters is None:
        del facts["trainable"]
    known = {name: text for name, text in facts.items() if text and text != DASH}
    lines = [line for name, text in known.items() for line in _wrapped(name, text)]
    return _section("Verified on the loaded model", lines)


def _unexpected(weights: Mapping[str, int]) -> str:
    """Tensors of the checkpoint that the model has no place for."""
    if not weights:
        return ""
    first = ", ".join(list(weights)[:3]) + (", ..." if len(weights) > 3 else "")
    return f"{sum(weights.values())} tensors of the checkpoint ({first})"


def _passed(name: str, argument: PassedThrough) -> str:
    default = "the default" if argument.held == argument.default else f"default {argument.default}"
    unknown = "" if argument.classified else ", unknown to this release of tunebench"
    return f"{name} {argument.held} ({default}{unknown})"


def _modules(number: int | None, names: Sequence[str]) -> str:
    return "" if number is None else f"{number} ({', '.join(names)})"


def _bar(figure: int | None, largest: int) -> str:
    return "█" * round(BAR * (figure or 0) / largest) if largest else ""


def _bars(figures: Mapping[str, int | None], mark: str = "") -> list[str]:
    largest = max((figure or 0 for figure in figures.values()), default=0)
    rows = [
        (
            name.replace("_", " "),
            bytes_text(figure),
            _bar(figure, largest) + (" ← peak" if name == mark else ""),
        )
        for name, figure in figures.items()
    ]
    return text_table(rows, right=(1,), indent="  ")


def _predicted(record: Record) -> list[str]:
    """The peak as it was predicted before the run, and how far off it was."""
    prediction = record.prediction
    if prediction is None or prediction.peak_allocated_bytes is None:
        return []
    peak = bytes_text(prediction.peak_allocated_bytes)
    text = f"{peak}, simulated on {prediction.engine} tensors"
    text += f" of {prediction.device}" if prediction.device else ""
    if prediction.error is not None:
        text += f"; {signed(100 * prediction.error, 2)} % from what was measured"
    return _wrapped("predicted", text)


def _memory(record: Record) -> str:
    memory = record.memory
    lines = []
    if memory.headline:
        where = f" in {memory.peak_phase.replace('_', ' ')}" if memory.peak_phase else ""
        lines += _wrapped("peak", f"{bytes_text(memory.peak_bytes)}{where}")
        lines += _wrapped("meter", METERS[memory.headline])
    if memory.timed_peak_bytes is not None and memory.timed_peak_bytes > (memory.peak_bytes or 0):
        text = f"{bytes_text(memory.timed_peak_bytes)}: higher, in a phase that is not known"
        lines += _wrapped("timed steps", text)
    lines += _predicted(record)
    if memory.host_peak_rss_bytes is not None:
        lines += _wrapped("host peak RSS", bytes_text(memory.host_peak_rss_bytes))
    phases: dict[str, int | None] = {
        phase: phase_peak_bytes(record, phase) for phase in PHASES if phase in memory.phases
    }
    if any(figure is not None for figure in phases.values()):
        lines += ["", "  peak of each phase, the largest of all ranks"]
        lines += _bars(phases, memory.peak_phase or "")
    for title, held in (
        (_ledger_moment(memory), memory.by_category),
        ("held before the first step", memory.resident),
    ):
        if held:
            known = {name: held.get(name) for name in CATEGORIES if name in held}
            lines += ["", f"  {title}", *_bars(known)]
    if memory.top_tensors:
        lines += ["", "  largest tensors live at that peak of the ledger"]
        lines += text_table(
            [
                (
                    bytes_text(tensor.bytes),
                    tensor.category.replace("_", " "),
                    f"{tensor.dtype} {tensor.shape}",
                    printable(tensor.op),
                    printable(tensor.module),
                )
                for tensor in memory.top_tensors
            ],
            right=(0,),
            indent="  ",
        )
    return _section("Memory", lines)


def _ledger_moment(memory: Memory) -> str:
    """The moment that the categories are of."""
    if memory.ledger_peak_phase is None or memory.ledger_peak_bytes is None:
        return "at the training peak, by the ledger"
    phase = memory.ledger_peak_phase.replace("_", " ")
    return f"at the ledger's training peak, {bytes_text(memory.ledger_peak_bytes)} in {phase}"


def _ranks(record: Record) -> str:
    rows = rank_rows(record)
    width = len(rows[0]) if rows else 0
    lines = text_table(rows, right=(0, *range(3, width)), indent="  ")
    for fact in rank_facts(record):
        lines += textwrap.wrap(f"  {fact}", WIDTH, subsequent_indent="      ")
    return _section("Ranks: peak memory by phase, parameters held, tokens, bytes a step", lines)


def _interval(estimate: Estimate, decimals: int, sign: bool = False) -> str:
    def number(figure: float) -> str:
        return signed(figure, decimals) if sign else f"{figure:,.{decimals}f}"

    text = number(estimate.value)
    if estimate.low is not None and estimate.high is not None:
        text += f" [{number(estimate.low)}, {number(estimate.high)}]"
    return text


def _speed(record: Record) -> str:
    speed, timed = record.speed, timed_seconds(record)
    lines = []
    if timed:
        found = step_seconds([timed])
        step = f"{_interval(found, 4)} s, median of {len(timed)} timed steps"
        step += f", no interval: {found.note}" if found.note else ""
        lines += _wrapped("step", f"{step} ({speed.warmup_steps} of warm-up left out)")
    if timed and speed.tokens is not None:
        for kind, number in speed.tokens.model_dump().items():
            rate = _interval(tokens_per_second([number], [timed]), 1)
            lines += _wrapped("tokens/s", f"{rate} {kind.replace('_', '-')}")
    figures = {
        "samples/s": speed.samples_per_second,
        "TFLOP/s": speed.tflops_per_second,
        "MFU": speed.mfu,
        "energy, J": speed.energy_joules,
    }
    for name, figure in figures.items():
        lines += _wrapped(name, f"{figure:,.4g}") if figure is not None else []
    durations = {
        "load": speed.load_seconds,
        "train": speed.train_seconds,
        "behaviour": speed.behaviour_seconds,
        "ledger steps": speed.memory_steps_seconds,
        "evaluation": speed.evaluation_seconds,
    }
    for name, seconds in durations.items():
        lines += _wrapped(name, seconds_text(seconds)) if seconds is not None else []
    return _section("Speed", lines)


def _quality(result: Result, found: Mapping[str, Result]) -> str:
    limit = result.record.cell.evaluate.limit
    notes = [f"  partial: first {limit} documents of each task"] if limit else []
    if precision := precision_text(result.record):
        notes.append(f"  log-likelihoods in {precision}")
    rows = [("task", "metric", "score", *[f"vs {role} base" for role in found], "n")]
    for task, scores in result.record.quality.tasks.items():
        for metric in scores.metrics:
            estimate = score([result], task, metric)
            against = [_against(result, base, task, metric) for base in found.values()]
            estimate_text = DASH if estimate is None else _interval(estimate, 4)
            name = printable(metric_text(metric))
            title = printable(task) + (" (group)" if scores.subtasks else "")
            rows.append((title, name, estimate_text, *against, f"{scores.n} documents"))
    lines = notes + (text_table(rows, indent="  ") if len(rows) > 1 else [])
    if len(rows) > 1:
        lines.append(
            "  [95 % interval over documents, of a group over its tasks; differences pair them]"
        )
        absent = [role for role in result.record.base_cell_ids if role not in found]
        lines += [f"  the {role} base was not scored on this stack" for role in absent]
    return _section("Quality", lines)


def _against(result: Result, base: Result, task: str, metric: str) -> str:
    try:
        return _interval(difference([(result, base)], task, metric), 4, sign=True)
    except NotComparable as refusal:
        return f"{DASH} ({refusal})"


def _generations(record: Record, base: Result | None) -> str:
    before = {g.prompt: g.text for g in base.record.quality.generations} if base else {}
    lines = []
    for generation in record.quality.generations:
        lines += _wrapped("prompt", generation.prompt)
        if generation.prompt in before:
            lines += _wrapped("  before", before[generation.prompt])
        lines += _wrapped("  after" if before else "  text", generation.text)
    return _section("Generations", lines)


def _missing(record: Record) -> str:
    lines = [line for item in record.missing.items() for line in _long(*item)]
    return _section("Not measured", lines)


def _long(name: str, reason: str) -> list[str]:
    text = f"  {name}: {printable(reason)}"
    return textwrap.wrap(text, WIDTH, subsequent_indent="      ", break_on_hyphens=False)
