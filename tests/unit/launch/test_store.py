"""The results directory: names, attempts, claims, publishing, recovery and disk errors."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.records import store as store_module
from harness.records.provenance import new_record
from harness.records.reading import read_record
from harness.records.record import SCHEMA_VERSION, Record
from harness.records.store import Store, record_key
from matrices.cell import Cell
from matrices.errors import SetAside, UserError


def record_of(status: str = "ok", seed: int = 0, **changes: object) -> Record:
    record = new_record(Cell(method="base", seed=seed), ["true"])
    return record.model_copy(update={"status": status, "ended": record.started, **changes})


def publish(store: Store, record: Record) -> store_module.Entry:
    key = record_key(record.cell_id, record.stack_id)

    def first(place: Path, attempt: int) -> Record:
        return record.model_copy(update={"attempt": attempt})

    working = store.start(first, key)
    return store.publish(working, read_record(working / "record.json"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "results")
    made.prepare()
    return made


def test_attempts_get_their_own_directories_and_nothing_is_overwritten(store: Store) -> None:
    record = record_of("failed")
    key = f"{record.cell_id[:12]}-{record.stack_id[:8]}"
    first = publish(store, record)
    before = (first.directory / "record.json").read_bytes()
    second = publish(store, record.model_copy(update={"status": "ok"}))
    assert [first.directory.name, second.directory.name] == [key, f"{key}.2"]
    assert (first.directory / "record.json").read_bytes() == before
    assert second.record.attempt == 2
    assert json.loads((second.directory / "cell.json").read_text())["method"] == "base"
    assert list(store.running.iterdir()) == []


def test_an_attempt_whose_name_was_copied_in_meanwhile_takes_the_next(store: Store) -> None:
    record = record_of()
    key = record_key(record.cell_id, record.stack_id)
    working = store.start(
        lambda place, attempt: record.model_copy(update={"attempt": attempt}),
        key,
    )
    (store.root / key).mkdir()
    entry = store.publish(working, read_record(working / "record.json"))
    assert entry.directory.name == f"{key}.2"
    on_disk = read_record(entry.directory / "record.json")
    assert on_disk.attempt == 2


def test_the_last_conclusive_attempt_is_in_force(store: Store) -> None:
    key = ""
    for status in ("failed", "ok", "interrupted"):
        entry = publish(store, record_of(status))
        key = record_key(entry.record.cell_id, entry.record.stack_id)
    assert store.latest()[key].record.status == "ok"
    found = store.latest_of(key)
    assert found is not None
    assert found.record.attempt == 2
    assert store.next_attempt(key) == 4


def test_reading_skips_what_is_running(store: Store) -> None:
    record = record_of()
    store.start(lambda place, attempt: record, record_key(record.cell_id, record.stack_id))
    assert store.latest() == {}
    assert store.latest_of(record_key(record.cell_id, record.stack_id)) is None


def test_a_newer_schema_is_set_aside(store: Store) -> None:
    entry = publish(store, record_of())
    path = entry.directory / "record.json"
    plain = json.loads(path.read_text())
    path.write_text(json.dumps(plain | {"schema_version": SCHEMA_VERSION + 1}))
    with pytest.warns(SetAside, match="newer tunebench") as told:
        assert store.latest() == {}
    assert str(told[0].message).startswith(f"{path}: ")
    again = publish(store, entry.record)
    assert again.record.attempt == 2, "what is set aside is not overwritten"
    with pytest.warns(SetAside):
        assert [each.directory for each in store.latest().values()] == [again.directory]


HOLD = """
import sys, time
from pathlib import Path
from harness.records.store import Store
with Store(Path(sys.argv[1])).claim(sys.argv[2]) as claimed:
    print(claimed, flush=True)
    sys.stdin.read()
"""


def test_a_claim_excludes_other_processes_and_dies_with_its_holder(store: Store) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(store.root), "a-b"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "True\n"
    with store.claim("a-b") as claimed:
        assert not claimed
    with store.claim("c-d") as other:
        assert other
    holder.kill()
    holder.wait()
    with store.claim("a-b") as claimed:
        assert claimed


def test_a_live_worker_keeps_its_key_claimed(store: Store) -> None:
    from filelock import FileLock

    with FileLock(store.worker_lock("a-b")), store.claim("a-b") as claimed:
        assert not claimed
    with store.claim("a-b") as claimed:
        assert claimed


def test_recovery_publishes_what_was_measured(store: Store) -> None:
    record = record_of("interrupted", ended=None, phase="forward")
    key = record_key(record.cell_id, record.stack_id)
    working = store.start(lambda place, attempt: record, key)
    (working / "log.txt").write_text("step 3\n")
    (working / ".part-abc").write_text("half a rec")
    [entry] = store.recover(key, lambda _, found: found.model_copy(update={"reason": "why"}))
    assert entry.directory == store.root / key
    assert (entry.record.status, entry.record.reason) == ("interrupted", "why")
    assert sorted(path.name for path in entry.directory.iterdir()) == [
        "cell.json",
        "log.txt",
        "record.json",
    ]
    assert store.abandoned() == []


def test_recovery_leaves_other_keys_alone(store: Store) -> None:
    record, other = record_of(seed=1), record_of(seed=2)
    key = record_key(record.cell_id, record.stack_id)
    other_key = record_key(other.cell_id, other.stack_id)
    store.start(lambda place, attempt: record, key)
    store.start(lambda place, attempt: other, other_key)
    assert len(store.recover(key, lambda _, found: found)) == 1
    assert [found for found, _ in store.abandoned()] == [other_key]


def test_check_makes_nothing(tmp_path: Path) -> None:
    Store(tmp_path / "a" / "b").check()
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_is_one_line_with_the_fix(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "results"):
        with pytest.raises(UserError, match=r"cannot write results here \(.+\); .*--results"):
            Store(root).prepare()


def test_a_directory_that_refuses_is_one_line_with_the_fix() -> None:
    with pytest.raises(UserError, match="cannot write results here"):
        Store(Path("/proc/tunebench")).prepare()


def test_a_nearly_full_disk_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    monkeypatch.setattr(store_module, "MINIMUM_FREE_BYTES", free * 2)
    with pytest.raises(UserError, match="MiB free on this disk"):
        Store(tmp_path / "results").prepare()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_no_directory_and_says_so(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = record_of()

    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(store_module, "write_atomically", full)
    with pytest.raises(UserError, match="no space left on this disk"):
        store.start(lambda place, attempt: record, "a-b")
    assert list(store.running.iterdir()) == []
