"""Control characters from outside reach no file and no terminal."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from harness.records.provenance import new_record
from harness.records.quality import Generation
from harness.records.reading import read_record
from harness.system.files import write_atomically
from matrices.cell import Cell
from matrices.errors import UserError
from matrices.files.text import visible
from matrices.load import load
from reports.output.write import write_report

BAD = "\x1b[31mred\x07\x9b2J\x7f"
CONTROL = re.compile(rb"[\x00-\x08\x0b-\x1f\x7f]|\xc2[\x80-\x9f]")


def test_control_characters_are_seen_and_the_rest_is_as_it_was() -> None:
    assert visible("a\tb\nc – ü") == "a\tb\nc – ü"
    assert visible("\x1b[31m\r") == "\\u001b[31m\\u000d"


def test_within_json_nothing_is_lost(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a.json", json.dumps({"a": BAD}, ensure_ascii=False))
    assert not CONTROL.search((tmp_path / "a.json").read_bytes())
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": BAD}


def test_no_file_of_a_record_or_a_report_holds_one(tmp_path: Path) -> None:
    record = new_record(Cell(method="lora"), [BAD]).model_copy(
        update={"status": "failed", "reason": BAD, "phase": BAD, "ended": "2026-01-01T00:00:00Z"}
    )
    record.quality.generations = [Generation(prompt="p", text=BAD)]
    place = tmp_path / "results/a"
    place.mkdir(parents=True)
    write_atomically(place / "record.json", record.to_json())
    assert read_record(place / "record.json") == record, "it is kept as it was"
    written, _ = write_report(tmp_path / "results", tmp_path / "out")
    for path in [place / "record.json", *written]:
        if path.suffix != ".parquet":
            # plotly's own script, in the page, holds some.
            content = re.sub(rb"<script.*?</script>", b"", path.read_bytes(), flags=re.DOTALL)
            assert not CONTROL.search(content), path.name


def test_a_matrix_may_not_hold_one(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text('model: "a\\x1b[31mb"\n')
    with pytest.raises(UserError, match=r"m\.yaml:1: .*control character, \\u001b") as caught:
        load(tmp_path / "m.yaml")
    assert "\x1b" not in str(caught.value)
