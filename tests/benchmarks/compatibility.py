"""Which parallelism works with which method, as observed, in Markdown.

`python -m compatibility RESULTS` prints it. Everything is read from records: a combination
nobody has run is a dash, one that a rule has refused says why in the rule's words.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from harness.records.record import Record
from matrices.cell import Method, Parallelism
from matrices.errors import UserError
from reports.output.render import escape_markdown
from reports.records.derived import global_batch
from reports.records.load import index, load_records
from reports.tables.captions import hardware_text, software_text
from reports.tables.groups import settings
from reports.tables.parallelism import AXES
from reports.text import DASH, bytes_text, one_line, setting_text, short_name

METHODS = tuple(method for method in get_args(Method) if method != "base")
HEADER = """\
# Parallelism and method, as observed

Generated from the records of real runs by `python -m compatibility`; do not edit it.
**ok** trained to its end on as many processes as it has devices, and was measured. **invalid** was
refused before it started, for the reason in the note. A dash has not been tried.
"""
LOSSES = """
## The same training

Losses of cells that differ in nothing but how the same samples of each step were spread. The
difference is the largest of any step, relative to one process. Share: of the model's parameters,
what a rank holds once prepared. ZeRO trains fp32 copies of QLoRA's adapters, which TRL turns to
bf16, and the others do not.

| model | method | parallelism | first loss | last loss | difference | share | peak of a rank |
|---|---|---|---|---|---|---|---|
"""
# What the settings of a combination are about, if several of them ended differently.
UNTOLD = (*AXES, "method")


def compatibility_text(records: Sequence[Record]) -> str:
    """The observed statuses by parallelism and method, in Markdown, with reasons as footnotes.

    `records` are those in force. Raises UserError without a record of a trained cell.
    """
    trained = [record for record in records if record.cell.method != "base"]
    if not trained:
        raise UserError("no record of a trained cell: there is nothing to tell of parallelism")
    notes: list[str] = []
    rows = [
        [name, *[_entry(_of(trained, name, method), notes) for method in METHODS]]
        for name in get_args(Parallelism)
    ]
    lines = [HEADER, *[f"* {line}" for line in _where(trained)], ""]
    lines += ["| parallelism | " + " | ".join(METHODS) + " |", "|---" * (len(METHODS) + 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", *[f"{number}. {escape_markdown(note)}" for number, note in enumerate(notes, 1)]]
    return "\n".join(lines).rstrip() + "\n"


def losses_text(records: Sequence[Record]) -> str:
    """What was trained, beside one process with the same samples in every step: losses of the
    first and the last step, the largest relative difference of any step, what a rank held.

    Empty where no cell of one process was measured.
    """
    measured = [record for record in records if record.status == "ok" and record.cell.train]
    rows = []
    for record in sorted(measured, key=_order):
        alone = _alone(record, measured)
        losses = record.quality.train_loss
        if alone is None or not losses:
            continue
        shares = [rank.parameter_share for rank in record.ranks if rank.parameter_share]
        rows.append(
            [
                escape_markdown(record.cell.model.name),
                record.cell.method,
                record.cell.parallelism,
                _loss(losses[0]),
                _loss(losses[-1]),
                DASH if alone is record else _difference(record, alone),
                f"{max(shares):.1%}" if shares else DASH,
                bytes_text(record.memory.peak_bytes),
            ]
        )
    if not rows:
        return ""
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"{LOSSES}{table}\n"


def _order(record: Record) -> tuple[str, int, int]:
    names = get_args(Parallelism)
    return (
        record.cell.model.name,
        METHODS.index(record.cell.method),
        names.index(record.cell.parallelism),
    )


def _alone(record: Record, measured: Sequence[Record]) -> Record | None:
    """The cell of one process that differs in nothing but how the same samples are spread."""
    wanted = _but_spread(record)
    return next(
        (
            other
            for other in measured
            if not other.cell.strategy.several_devices and _but_spread(other) == wanted
        ),
        None,
    )


def _but_spread(record: Record) -> dict[str, Any]:
    told = settings(record.cell)
    return {"samples": global_batch(record.cell)} | {
        name: value for name, value in told.items() if name not in AXES
    }


def _loss(loss: float | None) -> str:
    return DASH if loss is None else f"{loss:.5f}"


def _difference(record: Record, alone: Record) -> str:
    pairs = zip(record.quality.train_loss, alone.quality.train_loss, strict=True)
    known = [(mine, other) for mine, other in pairs if mine is not None and other is not None]
    if not known or record.verified.loss_normalization != alone.verified.loss_normalization:
        return DASH
    return f"{max(abs(mine - other) / abs(other) for mine, other in known):.0e}"


def _of(records: Sequence[Record], parallelism: str, method: str) -> list[Record]:
    return [r for r in records if (r.cell.parallelism, r.cell.method) == (parallelism, method)]


def _entry(records: Sequence[Record], notes: list[str]) -> str:
    """`ok (2 devices)`, or what ended how where that was not all the same."""
    if not records:
        return DASH
    told: dict[str, list[int]] = {}
    several = len({record.status for record in records}) > 1
    for record in records:
        text: str = record.status
        said = _spread(record) + (_telling(record, records) if several else [])
        text += f" ({', '.join(said)})" if said else ""
        marks = told.setdefault(text, [])
        if record.status != "ok":
            mark = _note(notes, record)
            marks += [mark] if mark not in marks else []
    return "<br>".join(
        text + (f" [{', '.join(map(str, marks))}]" if marks else "") for text, marks in told.items()
    )


def _spread(record: Record) -> list[str]:
    """The processes it was found to run in, else the devices it was meant for."""
    cell = record.cell
    if not cell.strategy.several_devices:
        return []
    machines = f" on {cell.nodes} machines" if cell.nodes > 1 else ""
    ranks = record.verified.world_size
    if ranks is not None:
        return [f"{ranks} process{'es' if ranks > 1 else ''}{machines}"]
    return [f"{cell.devices} devices{machines}"]


def _telling(record: Record, among: Sequence[Record]) -> list[str]:
    """The settings in which a record differs from another that ended otherwise."""
    mine = settings(record.cell)
    others = [settings(other.cell) for other in among if other.status != record.status]
    return [
        f"{short_name(name)} {setting_text(name, value)}"
        for name, value in mine.items()
        if name not in UNTOLD and any(_differs(name, value, other) for other in others)
    ]


def _differs(name: str, value: Any, other: dict[str, Any]) -> bool:
    return name in other and bool(other[name] != value)


def _note(notes: list[str], record: Record) -> int:
    reason = record.reason or (record.failure.message if record.failure else None)
    phase = f" in {record.phase.replace('_', ' ')}" if record.phase else ""
    text = f"{record.status}{phase if record.status != 'invalid' else ''}: "
    text += one_line(reason, longest=600) if reason else "no reason was recorded"
    if text not in notes:
        notes.append(text)
    return notes.index(text) + 1


def _where(records: Sequence[Record]) -> list[str]:
    """The machine, what the processes talk through, and the versions; a line for each that there
    was."""
    lines: dict[str, None] = {}
    for record in records:
        # torch picks the backend by the device: gloo for the CPU, NCCL for CUDA
        # (torch/distributed/distributed_c10d.py, Backend.default_device_backend_map).
        talk = "gloo" if record.hardware.accelerator is None else "NCCL"
        also = [
            f"{name} {record.stack.packages[name]}"
            for name in ("deepspeed",)
            if name in record.stack.packages
        ]
        software = ", ".join([software_text([record]), *also])
        lines[f"On {hardware_text(record)}; processes talk through {talk}."] = None
        lines[f"With {software}."] = None
    return [escape_markdown(line) for line in lines]


def main(arguments: Sequence[str]) -> int:
    """Print the matrix for a results directory; the exit code."""
    if len(arguments) != 1:
        print("usage: python -m compatibility RESULTS", file=sys.stderr)
        return 2
    try:
        newest = index(load_records(Path(arguments[0])))
        found = [result.record for result in newest.values()]
        print(compatibility_text(found) + losses_text(found), end="")
    except UserError as error:
        print(f"tunebench: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
