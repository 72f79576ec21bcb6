"""The ledger's questions, asked of hand-made event lists whose answers are plain to see."""

from __future__ import annotations

import pytest

from harness.meters.memory import ledger
from harness.meters.memory.ledger import MemoryEvent, Peak, Storage


def storage(
    nbytes: int,
    guess: str = "activations",
    category: str | None = None,
    phase: str = "forward",
    born: int = 1,
    died: int | None = None,
) -> Storage:
    return Storage(nbytes, "aten.mm", (1,), "float32", "m", phase, guess, category, born, died)


A, B, C = storage(512), storage(1000), storage(2048)
# Live bytes after each event, in blocks of 512: 1, 3 | 7, 6, 2 | 6, 0 | 1
STORY = [
    MemoryEvent(A, +512, "forward", 1),
    MemoryEvent(B, +1024, "forward", 1),
    MemoryEvent(C, +2048, "backward", 2),
    MemoryEvent(A, -512, "backward", 2),
    MemoryEvent(C, -2048, "backward", 2),
    MemoryEvent(C, +2048, "optimizer_step", 3),
    MemoryEvent(C, -2048, "optimizer_step", 3),
    MemoryEvent(B, -1024, "optimizer_step", 3),
    MemoryEvent(A, +512, "forward", 4),
]


@pytest.mark.parametrize(
    ("size", "blocks"),
    [(0, 0), (1, 512), (511, 512), (512, 512), (513, 1024), (4 * 10**9, 4 * 10**9)],
)
def test_block_bytes(size: int, blocks: int) -> None:
    assert ledger.block_bytes(size) == blocks


def test_phase_peaks_and_where_they_are() -> None:
    assert ledger.phase_peaks(STORY) == {
        "forward": Peak(1536, 1),
        "backward": Peak(3584, 2),
        "optimizer_step": Peak(3072, 5),
    }


def test_a_phase_starts_with_what_was_live_before_it() -> None:
    """Memory only falls in the backward: its peak is what it began with, and what was live then
    can be asked for."""
    events = [
        MemoryEvent(A, +512, "forward", 1),
        MemoryEvent(B, +1024, "forward", 1),
        MemoryEvent(A, -512, "backward", 2),
    ]
    peaks = ledger.phase_peaks(events)
    assert peaks["backward"] == Peak(1536, 1)
    assert ledger.live_at(events, peaks["backward"].at) == [B, A]


def test_a_phase_entered_twice_has_the_higher_peak_and_the_last_end() -> None:
    events = [
        MemoryEvent(A, +512, "forward", 1),
        MemoryEvent(A, -512, "backward", 2),
        MemoryEvent(C, +2048, "forward", 3),
        MemoryEvent(C, -2048, "backward", 4),
        MemoryEvent(B, +1024, "forward", 5),
    ]
    assert ledger.phase_peaks(events)["forward"] == Peak(2048, 2)
    assert ledger.phase_ends(events) == {"forward": 1024, "backward": 0}


def test_phase_ends() -> None:
    assert ledger.phase_ends(STORY) == {"forward": 512, "backward": 1024, "optimizer_step": 0}


def test_training_peak_leaves_other_phases_out() -> None:
    big = storage(10**6)
    loading = [
        MemoryEvent(big, +1000448, "load", 0),
        MemoryEvent(big, -1000448, "load", 0),
        *STORY,
        MemoryEvent(big, +1000448, "evaluation", 5),
    ]
    assert ledger.training_peak(loading) == ("backward", Peak(3584, 4))
    assert ledger.training_peak(loading[:2]) is None


def test_an_empty_run_has_no_figures() -> None:
    assert ledger.phase_peaks([]) == {}
    assert ledger.phase_ends([]) == {}
    assert ledger.training_peak([]) is None
    assert ledger.live_at([], -1) == []
    assert ledger.by_category([]) == {}


def test_live_at_is_sorted_by_size_and_knows_the_dead() -> None:
    assert ledger.live_at(STORY, 2) == [C, B, A]
    assert ledger.live_at(STORY, 4) == [B]
    assert ledger.live_at(STORY, 7) == []


def test_live_bytes_at_the_peak_are_the_peak() -> None:
    for peak in ledger.phase_peaks(STORY).values():
        assert sum(s.block for s in ledger.live_at(STORY, peak.at)) == peak.bytes


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (storage(1, category="gradients", guess="temporaries"), "gradients"),
        (storage(1, died=None), "activations"),
        # Made in the forward and still there in the backward: kept for it.
        (storage(1, born=1, died=2), "activations"),
        # Made and dropped within one forward.
        (storage(1, born=1, died=1), "temporaries"),
        # The same for one that somebody tagged, and for logits: the name stays.
        (storage(1, born=1, died=1, category="adapters"), "adapters"),
        (storage(1, born=1, died=1, guess="logits_and_loss"), "logits_and_loss"),
        # A checkpoint's recomputation is made and dropped in one backward.
        (storage(1, phase="backward", born=2, died=2), "activations"),
        (storage(1, phase="backward", guess="temporaries", born=2, died=2), "temporaries"),
    ],
)
def test_category(one: Storage, expected: str) -> None:
    assert ledger.category(one) == expected


def test_by_category_sums_blocks() -> None:
    held = [
        storage(1, category="weights"),
        storage(513, category="weights"),
        storage(512, died=1),
        storage(512, died=2),
    ]
    assert ledger.by_category(held) == {"weights": 1536, "temporaries": 512, "activations": 512}
