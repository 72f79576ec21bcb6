"""What configurations are called in reports, and what `show` tells of what was passed through."""

from __future__ import annotations

from pathlib import Path

import synthetic_results as made

from harness.records.record import Record
from harness.records.verified import PassedThrough, Verified
from matrices.cell import Data
from reports.records.load import Result
from reports.show.record import show
from reports.tables.build import _data_names
from reports.tables.groups import group, names
from reports.tables.model import Row, Table


def trained_on(source: str, fingerprint: str, seed: int = 0) -> Record:
    cell = made.trained("lora", seed=seed)
    data = Data(source=source, fingerprint=fingerprint * 64)
    cell = cell.model_copy(update={"data": data})
    return made.record(cell)


def results(*records: Record) -> list[Result]:
    return [Result(record, Path("there")) for record in records]


def test_configurations_are_called_by_what_differs_but_not_by_seed_path_or_hash() -> None:
    found = group(
        results(
            trained_on("/home/somebody/a.jsonl", "a"),
            trained_on("/home/somebody/a.jsonl", "a", seed=1),
            trained_on("/home/somebody/b.jsonl", "b", seed=1),
        )
    )
    assert names(found) == ["a.jsonl", "b.jsonl"]


def test_a_table_names_local_data_by_its_file_and_a_changed_one_by_its_hash_too() -> None:
    def column(*records: Record) -> list[object]:
        groups = group(results(*records))
        table = Table("t", "T", rows=[Row(item, "") for item in groups])
        return list(_data_names(table))

    first, second = trained_on("/x/a.jsonl", "a"), trained_on("/y/a.jsonl", "b")
    assert column(first, second) == ["x/a.jsonl", "y/a.jsonl"]
    changed = trained_on("/x/a.jsonl", "c")
    assert column(first, changed) == [f"a.jsonl ({letter * 12})" for letter in "ac"]


def test_show_tells_what_was_passed_through() -> None:
    record = made.record(made.trained("lora"))
    record.verified = Verified(
        passed_through={
            "adam_beta1": PassedThrough(asked=0.8, held=0.8, default=0.9),
            "bias": PassedThrough(asked="none", held="none", default="none"),
            "newest": PassedThrough(asked=1, held=1, default=None, classified=False),
        }
    )
    text = " ".join(show(Result(record, Path("there")), {}).split())
    assert "adam_beta1 0.8 (default 0.9); bias none (the default); newest 1 (default None, " in text
    assert "unknown to this release of tunebench" in text
