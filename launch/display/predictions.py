"""Predictions in plain text: a table of all cells, and all figures of one cell.

Every text says that its figures are predicted.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence

from harness.records.part import PHASES
from harness.records.prediction import Prediction
from harness.records.verified import MOSTLY_IN_4BIT
from launch.display.tables import counted, verdict_text
from reports.text import DASH, bytes_text, count_text, one_line, seconds_text, text_table

FOOTER_PACKAGES = ("transformers", "peft", "trl", "accelerate", "bitsandbytes", "torch")
EXPLAINED_TENSORS = 8
WIDTH = 120


def floor_text(prediction: Prediction) -> str:
    return seconds_text(prediction.speed.floor_seconds)


def expected_text(prediction: Prediction) -> str:
    speed = prediction.speed
    if speed.expected_seconds is None:
        return DASH
    low, high = speed.expected_seconds_low, speed.expected_seconds_high
    interval = f" [{seconds_text(low)}, {seconds_text(high)}]" if low and high else ""
    return f"{seconds_text(speed.expected_seconds)}{interval}"


def predictions_text(predictions: Sequence[Prediction], names: Mapping[str, str]) -> str:
    """A row for every cell, then what the figures depend on."""
    gpus = list(dict.fromkeys(v.gpu for p in predictions for v in p.verdicts))
    calibrated = any(p.speed.expected_seconds is not None for p in predictions)
    headers = ["cell", "peak", "reserved", "peak in", "steady", *gpus, "step at least"]
    headers += ["expected"] if calibrated else []
    rows = [_row(p, gpus, calibrated, names[p.cell_id]) for p in predictions]
    table = "\n".join(text_table([[*headers, "configuration"], *rows]))
    states = counted(p.status for p in predictions)
    return f"{table}\n\n{states}; every figure is predicted, none measured\n{footer(predictions)}"


def _row(prediction: Prediction, gpus: list[str], calibrated: bool, name: str) -> list[str]:
    memory = prediction.memory
    reason = one_line(prediction.reason or "")
    if prediction.status != "predicted":
        name = f"{name}: {prediction.status}, {reason}"
    verdicts = {verdict.gpu: verdict_text(verdict) for verdict in prediction.verdicts}
    return [
        prediction.cell_id[:12],
        bytes_text(memory.peak_allocated_bytes),
        bytes_text(memory.peak_reserved_bytes),
        (memory.peak_phase or DASH).replace("_", " "),
        bytes_text(memory.steady_allocated_bytes),
        *(verdicts.get(gpu, DASH) for gpu in gpus),
        floor_text(prediction),
        *([expected_text(prediction)] if calibrated else []),
        name,
    ]


def footer(predictions: Iterable[Prediction]) -> str:
    """What was executed, on which device, and what is assumed for every figure."""
    made = [p for p in predictions if p.status == "predicted"]
    if not made:
        return "nothing was predicted"
    stacks = list(dict.fromkeys(stack_text(p.stack) for p in made))
    devices = dict.fromkeys(device_text(p) for p in made)
    shared = [a for a in made[0].assumptions if all(a in p.assumptions for p in made)]
    more = " (more with --explain)" if any(len(p.assumptions) > len(shared) for p in made) else ""
    lines = [f"executed: {'; '.join(stacks)} · on {', '.join(devices)}"]
    lines += _wrapped(f"assumptions: {'; '.join(shared)}{more}") if shared else []
    lines += four_bit_notes(made)
    notes = dict.fromkeys(p.speed.note for p in made if p.speed.note)
    lines += _wrapped(f"step time: {'; '.join(notes)}") if notes else []
    return "\n".join(lines)


def four_bit_notes(predictions: Iterable[Prediction]) -> list[str]:
    """A line for every model with less than half of its weights in 4 bit."""
    shares = {
        p.cell.model.config or p.cell.model.name: p.quantized_share
        for p in predictions
        if p.quantized_share is not None and p.quantized_share < MOSTLY_IN_4BIT
    }
    return [
        f"note: qlora holds {share:.0%} of the weights of {name} in 4 bit: transformers converts "
        "plain linear layers only, and k-bit preparation turns the rest to fp32"
        for name, share in shares.items()
    ]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def stack_text(stack: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {stack[name]}" for name in FOOTER_PACKAGES if name in stack)


def device_text(prediction: Prediction) -> str:
    """The simulated device, and the expected error of the figures."""
    if prediction.engine == "fake-cpu":
        name = "tensors of a simulated CPU"
    else:
        name = f"a simulated {prediction.device or 'CUDA device'}"
    margin = f" (±{100 * prediction.margin:.2g} %)" if prediction.margin else ""
    return name + margin


def explanation(prediction: Prediction, name: str) -> str:
    """All figures of one cell: by phase, by category, the tensors at the peak, the assumptions."""
    head = f"{prediction.cell_id[:12]} {name}"
    if prediction.status != "predicted":
        return f"{head}\n  {prediction.status}: {prediction.reason}"
    memory = prediction.memory
    phases: dict[str, int] = {
        phase: memory.by_phase[phase] for phase in PHASES if phase in memory.by_phase
    }
    phases |= memory.by_phase
    parts = [
        head,
        _bytes_block("peak allocated within each phase", phases),
        _bytes_block(
            f"live at the training peak, in {(memory.peak_phase or DASH).replace('_', ' ')}",
            memory.by_category,
        ),
        _bytes_block("held before the first step", memory.resident),
        _tensors(prediction),
        _ranks(prediction),
        _verdicts(prediction),
        _counts(prediction),
        _list("assumed", prediction.assumptions),
        _list("modelled, not executed", prediction.modelled),
    ]
    return "\n".join(part for part in parts if part)


def _bytes_block(title: str, figures: Mapping[str, int]) -> str:
    if not figures:
        return ""
    # Figures have the same width in every block, so that they stand below each other.
    rows = [
        (name.replace("_", " "), f"{bytes_text(figure):>11}", f"{figure:>15,} B")
        for name, figure in figures.items()
    ]
    return "\n".join([f"  {title}", *text_table(rows, indent="    ")])


def _tensors(prediction: Prediction) -> str:
    top = prediction.memory.top_tensors[:EXPLAINED_TENSORS]
    if not top:
        return ""
    rows = [
        (
            bytes_text(tensor.bytes),
            tensor.category.replace("_", " "),
            f"{tensor.dtype}[{', '.join(map(str, tensor.shape))}]",
            tensor.op,
            tensor.module or DASH,
        )
        for tensor in top
    ]
    header = ("bytes", "category", "tensor", "made by", "in")
    return "\n".join(["  largest tensors at the peak", *text_table([header, *rows], indent="    ")])


def _ranks(prediction: Prediction) -> str:
    if len(prediction.per_rank) < 2:
        return ""
    rows = [
        (
            str(rank.rank),
            bytes_text(rank.peak_allocated_bytes),
            bytes_text(rank.peak_reserved_bytes),
            bytes_text(rank.steady_allocated_bytes),
            bytes_text(rank.host_bytes) if rank.host_bytes else DASH,
        )
        for rank in prediction.per_rank
    ]
    header = ("rank", "peak", "reserved", "steady", "host")
    return "\n".join(["  ranks", *text_table([header, *rows], indent="    ")])


def _verdicts(prediction: Prediction) -> str:
    lines = []
    for verdict in prediction.verdicts:
        lines.append(
            f"    {verdict.gpu}: {verdict_text(verdict)} in {bytes_text(verdict.capacity_bytes)} "
            f"({bytes_text(verdict.context_bytes)} more assumed for the CUDA context)"
        )
        if verdict.oom is not None:
            oom = verdict.oom
            lines.append(
                f"      at {oom.op} in {oom.module or 'no module'}: asked for "
                f"{bytes_text(oom.requested_bytes)} with {bytes_text(oom.allocated_bytes)} "
                f"allocated and {bytes_text(oom.reserved_bytes)} reserved"
            )
    return "\n".join(["  verdicts", *lines]) if lines else ""


def _counts(prediction: Prediction) -> str:
    speed = prediction.speed
    facts = [
        f"{count_text(prediction.trainable_parameters)} of "
        f"{count_text(prediction.total_parameters)} parameters trained",
        f"{prediction.quantized_share:.0%} of the base in 4 bit"
        if prediction.quantized_share is not None
        else "",
        f"{speed.flops_per_step:.4g} FLOPs a step" if speed.flops_per_step else "",
        f"step at least {floor_text(prediction)} on {speed.gpu}" if speed.floor_seconds else "",
        f"simulated in {seconds_text(prediction.simulation_seconds)}"
        if prediction.simulation_seconds
        else "",
    ]
    return "  " + " · ".join(fact for fact in facts if fact)


def _list(title: str, items: Sequence[str]) -> str:
    return "\n".join([f"  {title}", *(f"    - {item}" for item in items)]) if items else ""


def failures(predictions: Iterable[Prediction]) -> list[str]:
    """The distinct reasons of the predictions that failed."""
    reasons = (p.reason or "no reason given" for p in predictions if p.status == "failed")
    return list(dict.fromkeys(reasons))
