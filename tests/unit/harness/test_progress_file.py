"""The file by which a worker tells what it is doing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.ranks.progress_file import PROGRESS, Progress, read_progress


@pytest.mark.parametrize("progress", [Progress(), Progress("train", 3, 9, 2.5, 1234.0, "a\tb")])
def test_what_is_written_is_read(progress: Progress, tmp_path: Path) -> None:
    progress.write(tmp_path)
    assert read_progress(tmp_path) == progress


def test_what_an_earlier_and_a_later_worker_wrote_is_read(tmp_path: Path) -> None:
    assert read_progress(tmp_path) == Progress()
    later = {"phase": "train", "step": 3, "mood": "good", "updated": 1.0}
    (tmp_path / PROGRESS).write_text(json.dumps(later))
    assert read_progress(tmp_path) == Progress("train", 3)


def test_a_torn_file_is_none(tmp_path: Path) -> None:
    (tmp_path / PROGRESS).write_text('{"phase": "tr')
    assert read_progress(tmp_path) == Progress()
