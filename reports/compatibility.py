"""Which parallelism works with which method, as observed, in Markdown.

`python -m reports.compatibility RESULTS` prints it. Everything is read from records: a combination
nobody has run is a dash, one that a rule has refused says why in the rule's words.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from harness.record import Record
from matrices.cell import Method, Parallelism
from matrices.errors import UserError
from reports.captions import hardware_text, software_text
from reports.display import DASH, one_line, setting_text, short_name
from reports.groups import settings
from reports.parallelism import AXES
from reports.render import escape_markdown
from reports.results import index, load_records

METHODS = tuple(method for method in get_args(Method) if method != "base")
HEADER = """\
# Parallelism and method, as observed

Generated from the records of real runs by `python -m reports.compatibility`; do not edit it.
**ok** trained to its end on as many processes as it has devices, and was measured. **invalid** was
refused before it started, for the reason in the note. A dash has not been tried.
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
    if cell.parallelism == "single":
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
        print("usage: python -m reports.compatibility RESULTS", file=sys.stderr)
        return 2
    try:
        newest = index(load_records(Path(arguments[0])))
        print(compatibility_text([result.record for result in newest.values()]), end="")
    except UserError as error:
        print(f"tunebench: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
