"""Which attempt is in force: one rule, whoever asks and in whatever order the records are read."""

from __future__ import annotations

import itertools
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.records.attempts import in_force, in_force_by
from harness.records.part import Status
from harness.records.provenance import new_record
from harness.records.record import Record
from harness.records.store import Entry, Store
from launch.engines.results_watch import PublishedRecords
from launch.engines.status import read_state
from launch.planning.plan import plan_jobs
from matrices.cell import Cell
from matrices.rules.machine import Machine
from reports.records.load import index, load_records

CELL = Cell(method="base")
BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
FIRST = new_record(CELL, [])


class Made(NamedTuple):
    """An attempt: its status, the stack it was made on, and when it ended by its machine's clock
    (hours; none: it has no end)."""

    status: Status
    stack: int = 0
    hour: int | None = 0


def entries(made: list[Made], root: Path = Path("results")) -> list[Entry]:
    """PublishedRecords attempts, those on one stack numbered in this order."""
    counts = {stack: itertools.count(1) for stack in {each.stack for each in made}}
    return [entry(each, next(counts[each.stack]), root) for each in made]


def entry(made: Made, attempt: int, root: Path) -> Entry:
    stack_id = f"{made.stack:064x}"[::-1]
    ended = None if made.hour is None else (BEGAN + timedelta(hours=made.hour)).isoformat()
    changes = {"status": made.status, "stack_id": stack_id, "attempt": attempt, "ended": ended}
    record = FIRST.model_copy(update={**changes, "started": BEGAN.isoformat()})
    name = f"{record.cell_id[:12]}-{stack_id[:8]}" + f".{attempt}" * (attempt > 1)
    return Entry(root / name, record)


def number(made: list[Made]) -> int:
    """Which of these is in force."""
    known = entries(made)
    found = in_force(known)
    assert found is not None
    return known.index(found)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        ([Made("failed"), Made("ok"), Made("interrupted"), Made("skipped")], 1),
        ([Made("interrupted"), Made("interrupted")], 1),
        # The clock was put back, or another machine's is slow: the number tells the order.
        ([Made("oom", hour=9), Made("ok", hour=5)], 1),
        # Of an older tunebench, whose stack has another name and so a count of its own.
        ([Made("failed", 1, 1), Made("ok", 1, 2), Made("ok", 2, 8)], 2),
        ([Made("failed", 1, 1), Made("ok", 1, 9), Made("ok", 2, 8)], 1),
        ([Made("ok", 1, 1), Made("interrupted", 2, 8)], 0),
        # A record without an end counts from its start.
        ([Made("ok", 1, 1), Made("ok", 2, None)], 0),
    ],
)
def test_examples(made: list[Made], expected: int) -> None:
    assert number(made) == expected


def test_results_directories_side_by_side_count_for_themselves() -> None:
    monday = entries(
        [Made("failed", hour=1), Made("failed", hour=2), Made("ok", hour=3)], Path("a")
    )
    [friday] = entries([Made("ok", hour=99)], Path("b"))
    assert in_force([*monday, friday]) is friday


def test_of_none_there_is_none() -> None:
    assert in_force([]) is None
    assert in_force_by([], lambda each: each.directory) == {}


attempts = st.lists(
    st.builds(
        Made,
        st.sampled_from([each for each in get_args(Status) if each != "predicted"]),
        st.integers(0, 2),
        st.none() | st.integers(0, 3),
    ),
    min_size=1,
    max_size=7,
)


@given(attempts, st.data())
def test_the_order_of_reading_does_not_matter(made: list[Made], data: st.DataObject) -> None:
    known = entries(made)
    # Copied in under another name, equal in all else: still one of them is in force.
    known.append(Entry(known[0].directory.with_name("copied"), known[0].record))
    shuffled = data.draw(st.permutations(known))
    assert in_force(shuffled) == in_force(known)
    assert in_force(entry for entry in known if entry != in_force(known)) != in_force(known)


@given(attempts)
def test_an_attempt_of_its_own_end_is_in_force_if_there_is_one(made: list[Made]) -> None:
    conclusive = [each.status not in ("interrupted", "skipped") for each in made]
    assert conclusive[number(made)] == any(conclusive)


@settings(max_examples=40, deadline=None)
@given(attempts)
def test_runner_plan_status_and_report_agree(made: list[Made]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        store = Store(Path(scratch))
        known = entries(made, store.root)
        for each in known:
            each.directory.mkdir()
            (each.directory / "record.json").write_text(each.record.to_json())
        expected = in_force(known)
        assert expected is not None

        latest = store.latest()
        assert all(store.latest_of(key) == found for key, found in latest.items())
        published = {each.directory.name: each for each in PublishedRecords(store).new()}
        assert len(published) == len(known)
        assert planned(latest) == planned(published) == expected.directory
        assert read_state(store.root).entries[CELL.cell_id].directory == expected.directory
        [shown] = index(load_records(store.root)).values()
        assert shown.directory == expected.directory


def planned(present: dict[str, Entry]) -> Path:
    def counts(record: Record, threads: int) -> bool:
        return True

    [job] = plan_jobs([CELL], present, machine=Machine(has_gpu=False), counts=counts)
    assert job.entry is not None
    return job.entry.directory
