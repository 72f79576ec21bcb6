"""What `tunebench status` says of a results directory, from its files."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from harness.records.provenance import new_record
from harness.records.ranks import Placement, RankState
from harness.records.reading import read_record
from harness.records.record import Record
from harness.records.store import Store, record_key
from launch.cli import app
from launch.engines.results_watch import is_held
from launch.engines.status import read_state, status_text, statuses
from matrices.cell import Cell


def cell(seed: int) -> Cell:
    return Cell(method="base", seed=seed)


def begin(store: Store, seed: int, **changes: object) -> Path:
    """A working directory as a runner makes it."""
    record = new_record(cell(seed), ["true"]).model_copy(update=changes)
    key = record_key(record.cell_id, record.stack_id)

    def first(place: Path, attempt: int) -> Record:
        return record.model_copy(update={"attempt": attempt})

    return store.start(first, key)


def publish(
    store: Store, seed: int, status: str, ended: str = "2026-01-01T00:00:09.000+00:00"
) -> None:
    working = begin(store, seed, started="2026-01-01T00:00:00.000+00:00")
    record = read_record(working / "record.json")
    store.publish(working, record.model_copy(update={"status": status, "ended": ended}))


def claim(store: Store, working: Path) -> int:
    """Hold a claim as another runner does: the lock of an open file."""
    lock = store.claims / f"{working.name.split('.')[0]}.lock"
    held = os.open(lock, os.O_RDWR | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_EX)
    return held


def write_ranks(working: Path, *ranks: RankState) -> None:
    (working / "ranks").mkdir()
    for rank in ranks:
        path = working / "ranks" / f"rank-{rank.rank}.json"
        path.write_text(rank.model_dump_json())


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "results")
    made.prepare()
    return made


def test_every_state_is_told(store: Store) -> None:
    publish(store, 0, "ok")
    publish(store, 1, "oom")
    dead = begin(store, 2)
    runs = begin(store, 3, placement=Placement(engine="ray", job="77", hosts=["n7"]))
    held = claim(store, runs)
    progress = {"phase": "train", "step": 3, "steps": 9, "loss": 2.5}
    (runs / "progress.json").write_text(json.dumps(progress))
    write_ranks(
        runs,
        RankState(rank=0, host="n7", phase="train", step=3),
        RankState(rank=1, host="n8", phase="train", step=2),
    )
    try:
        found = statuses(read_state(store.root), [cell(seed) for seed in range(5)])
    finally:
        os.close(held)
    assert [each.state for each in found] == [
        "done",
        "done",
        "left behind",
        "running",
        "not started",
    ]
    assert [each.status for each in found] == ["ok", "oom", None, None, None]
    assert (found[3].hosts, found[3].engine, found[3].job) == (("n7", "n8"), "ray", "77")
    text = status_text(found, store.root)
    head, _, *rows = text.splitlines()
    assert head == f"{store.root}: 1 ok, 1 oom, 1 left behind, 1 running, 1 not started"
    assert "train 3/9, loss 2.5, rank 0 in train 3, rank 1 in train 2" in rows[1]
    assert "n7, n8 (ray 77)" in rows[1]
    assert "left behind: its runner died" in text
    assert dead.exists()
    assert os.listdir(store.claims) == [f"{runs.name.split('.')[0]}.lock"], "looking leaves nothing"


def test_the_attempt_in_force_is_told(store: Store) -> None:
    publish(store, 0, "ok")
    publish(store, 0, "interrupted", "2026-01-02T00:00:00.000+00:00")
    [found] = statuses(read_state(store.root))
    assert (found.status, found.seconds) == ("ok", 9.0)


def test_a_directory_that_is_not_there_yet_has_cells_of_its_matrix(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text("name: m\nmethod: base\nmodel: tiny-llama\n")
    ran = CliRunner().invoke(
        app, ["status", str(tmp_path / "m.yaml"), "--results", str(tmp_path / "no"), "--json"]
    )
    assert ran.exit_code == 0, ran.output
    assert [each["state"] for each in json.loads(ran.output)] == ["not started"]
    assert not (tmp_path / "no").exists()
    assert statuses(read_state(tmp_path / "no")) == []


def test_what_is_begun_or_published_at_that_moment_is_passed_over(store: Store) -> None:
    publish(store, 0, "ok")
    begun = begin(store, 1)
    (begun / "record.json").unlink()  # made, and nothing in it yet
    torn = begin(store, 2)
    (torn / "progress.json").write_text("")
    gone = store.running / f"{begun.name.split('.')[0]}.9-gone"
    gone.symlink_to(store.root / "published meanwhile")
    found = {each.state for each in statuses(read_state(store.root))}
    assert found == {"done", "left behind"}


def test_a_look_is_never_in_the_way_of_a_claim(store: Store) -> None:
    """A runner's attempts at a claim all succeed, however often somebody looks meanwhile."""
    key = begin(store, 0).name.split(".")[0]
    with store.claim(key):
        pass  # both locks are there to be looked at
    ended = threading.Event()

    def looks() -> None:
        while not ended.is_set():
            is_held(store, key)

    watchers = [threading.Thread(target=looks) for _ in range(3)]
    for watcher in watchers:
        watcher.start()
    try:
        for _ in range(300):
            with store.claim(key) as claimed:
                assert claimed
                assert is_held(store, key)
    finally:
        ended.set()
        for watcher in watchers:
            watcher.join()
    assert not is_held(store, key)
