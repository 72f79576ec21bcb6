"""Which files of a results directory are its records."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.records.reading import record_files, records_in, set_aside
from matrices.errors import SetAside, UserError


def place(root: Path, *names: str) -> None:
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "record.json").write_text("{}")


def test_files_at_any_depth_each_once(tmp_path: Path) -> None:
    place(tmp_path, "b", "a/c", "a/c/repeated-by-hand", ".running/x", "a/.claims/y")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "b")
    found = [path.relative_to(tmp_path).as_posix() for path in record_files(tmp_path)]
    assert found == ["a/c/record.json", "again/record.json"], "b is there by another name"
    assert list(record_files(tmp_path / "absent")) == []


def test_a_record_that_is_not_there_needs_no_word(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    assert list(records_in(tmp_path)) == []
    assert list(records_in(tmp_path / "absent")) == []
    assert len(recwarn) == 0


def test_what_is_said_is_one_line_that_moves_no_terminal() -> None:
    with pytest.warns(SetAside) as told:
        set_aside(UserError("two\nlines \x1b[31m", where="a\tb"))
    assert str(told[0].message) == "a b: two lines \ufffd[31m; set aside"
