"""The README's table is what the stored records say, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

from typer.testing import CliRunner

from launch.cli import app
from reports.output.render import render
from reports.records.load import load_records
from reports.tables.build import build

BLOCK = re.compile(r"<!-- table: .* -->\n(.*?)<!-- end of table -->", re.DOTALL)


def readme_table(repository: Path) -> str:
    records = load_records(repository / "tests/data/quickstart")
    return "\n\n".join(render(table, "md").strip() for table in build(records, "methods")) + "\n"


def test_the_table_is_that_of_the_stored_records(repository: Path) -> None:
    found = BLOCK.search((repository / "README.md").read_text())
    assert found is not None
    assert found.group(1) == readme_table(repository)


def test_training_helped_in_every_stored_cell(repository: Path) -> None:
    """Held-out bits per byte are below the base's (the quantized base's for qlora)."""
    records = {
        r.record.cell_id: r.record for r in load_records(repository / "tests/data/quickstart")
    }
    trained = [r for r in records.values() if r.cell.method != "base"]
    assert len(trained) == 8
    for record in trained:
        own = "quantized" if record.cell.method == "qlora" else "untouched"
        base = records[record.base_cell_ids[own]]
        task = "python_reference_bpb"
        before = base.quality.tasks[task].metrics["bits_per_byte"].value
        assert record.quality.tasks[task].metrics["bits_per_byte"].value < before


def test_every_command_of_the_readme_exists(repository: Path) -> None:
    text = (repository / "README.md").read_text()
    used = set(re.findall(r"^tunebench (\w+)", text, re.MULTILINE))
    assert {"doctor", "plan", "run", "report", "show", "rerun"} <= used
    for command in used:
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0, command
