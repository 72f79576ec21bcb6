"""Where the rows of one table ran, when that is not one and the same place.

A table holds one model in one environment: the same versions of what is measured, on one kind of
device. Its rows may still come from several machines, drivers or settings; then each is marked with
a letter, and the caption says what the letters stand for.
"""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_lowercase

from harness.records import provenance
from harness.records.record import Record
from reports.tables.model import Row, TableColumn
from reports.text import DASH, bytes_text

# Which of the devices, not of what kind; threads are a fact of the whole cell.
IGNORED = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


def facts(record: Record) -> dict[str, str]:
    """What is known of where a record was made, by name, as text."""
    hardware, placed = record.hardware, record.placement
    found = {
        "host": ", ".join(placed.hosts),
        "CPU": hardware.cpu,
        "CPUs": str(hardware.cpu_count),
        "memory": bytes_text(hardware.host_memory_bytes),
        "GPU": hardware.accelerator or "",
        "GPU memory": bytes_text(hardware.accelerator_memory_bytes),
        "driver": hardware.driver or "",
        "python": record.stack.python,
        **record.stack.packages,
    }
    threads = provenance.recorded_threads(record)
    if threads is not None:
        # Processes of one machine share out its processors.
        found["threads"] = str(threads * record.cell.ranks_per_node)
    environment = {**record.provenance.environment, **record.memory.allocator_settings}
    return found | {name: value for name, value in environment.items() if name not in IGNORED}


def mark(rows: Sequence[Row]) -> tuple[TableColumn | None, str]:
    """The column with the letters of the rows, and the sentence that explains them; none and
    nothing when all records of all rows ran on the same."""
    facts_of_rows = [[facts(result.record) for result in row.group.results] for row in rows]
    everything = [each for group in facts_of_rows for each in group]
    names = dict.fromkeys(name for each in everything for name in each)
    differ = [name for name in names if len({each.get(name) for each in everything}) > 1]
    if not differ:
        return None, ""
    letters: dict[tuple[str, ...], str] = {}
    texts: list[str] = []
    for group in facts_of_rows:
        kinds = [tuple(each.get(name) or DASH for name in differ) for each in group]
        for kind in kinds:
            letters.setdefault(kind, _letter(len(letters)))
        texts.append(", ".join(sorted({letters[kind] for kind in kinds})))
    meanings = [
        f"{letter}: {', '.join(map(' '.join, zip(differ, kind, strict=True)))}"
        for kind, letter in letters.items()
    ]
    sentence = f"Not all rows ran on the same; ran on {'; '.join(meanings)}."
    return TableColumn("ran_on", "Ran on", "setting", list(texts)), sentence


def _letter(number: int) -> str:
    more, last = divmod(number, len(ascii_lowercase))
    return (_letter(more - 1) if more else "") + ascii_lowercase[last]
