"""What leaves the room: Markdown, CSV, LaTeX, text, the page, `show`; hostile text in all of it."""

from __future__ import annotations

import csv
import html.parser
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import synthetic_results as made
from plotly.offline import get_plotlyjs

from harness.records.ranks import Failure
from matrices.errors import UserError
from reports.output.page import page
from reports.output.render import FORMATS, escape_latex, escape_markdown, render
from reports.output.write import write_report
from reports.records.frame import read_csv
from reports.records.load import Result, bases, index, load_records
from reports.show.record import show
from reports.tables.build import build, build_all

EVIL = '<script>alert(1)</script>|`*"&\x1b[2J](javascript:x)'
SCRIPT = re.compile(r"<script>alert", re.IGNORECASE)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    """A sweep whose every text that a stranger could choose is hostile."""
    root = tmp_path_factory.mktemp("hostile")
    cell = made.trained("lora", target_modules=(EVIL, "q_proj"), source=EVIL)
    cell = cell.model_copy(update={"model": cell.model.model_copy(update={"name": EVIL})})
    good = made.record(cell, command=["tunebench", EVIL])
    good.quality.tasks = {EVIL: next(iter(good.quality.tasks.values()))}
    good.quality.generations[0].text = EVIL
    good.missing = {EVIL: EVIL}
    failure = Failure(type=EVIL, message=EVIL)
    bad = cell.model_copy(update={"seed": 1})
    made.write(root, good)
    made.write(root, made.record(bad, "failed", reason=EVIL, phase=EVIL, failure=failure))
    return load_records(root)


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_has_every_row_and_the_caption(results: list[Result], format: str) -> None:
    for table in build_all(results):
        text = render(table, format)
        assert "all-linear" in text
        assert "invalid" in text
        if format != "csv":
            assert "Baseline" in text
            assert "–" in text or "--" in text


def test_unknown_format_names_the_nearest(results: list[Result]) -> None:
    [table] = build(results, "methods")
    with pytest.raises(UserError, match="did you mean 'html'"):
        render(table, "htlm")


def test_markdown_tables_are_rectangular(results: list[Result], tmp_path: Path) -> None:
    for table in build_all(results):
        lines = render(table, "md", tmp_path).splitlines()
        blocks = "\n".join(lines).split("\n\n")
        grids = [block.splitlines() for block in blocks if block.startswith("|")]
        assert grids
        for grid in grids:
            pipes = {len(re.findall(r"(?<!\\)\|", line)) for line in grid}
            assert len(pipes) == 1, grid


def test_markdown_links_lead_to_the_records(results: list[Result], results_directory: Path) -> None:
    [table] = build(results, "methods")
    text = render(table, "md", results_directory.parent)
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links
    assert all((results_directory.parent / link).is_file() for link in links)


def test_csv_has_raw_figures_with_their_intervals(results: list[Result]) -> None:
    [table] = build(results, "methods")
    rows = list(csv.DictReader(io.StringIO(render(table, "csv"))))
    assert len(rows) == len(table.rows)
    full = next(row for row in rows if row["method"] == "full")
    assert float(full["peak_bytes"]) == int(1834.5 * 2**20)
    assert (full["step_seconds_n"], full["step_seconds_over"]) == ("3", "processes")
    assert float(full["step_seconds_low"]) < float(full["step_seconds"])
    invalid = next(row for row in rows if row["status"] == "invalid")
    assert invalid["peak_bytes"] == ""
    assert "rank 4096" in invalid["notes"]


def test_latex_is_booktabs_with_escaped_text(results: list[Result]) -> None:
    [table] = build(results, "methods")
    text = render(table, "latex")
    assert text.count(r"\begin{tabular}") == text.count(r"\bottomrule") == 2
    assert r"python\_reference\_bpb" in text
    assert text.isascii()
    assert escape_latex("50% of a_b & {c}") == r"50\% of a\_b \& \{c\}"


def test_markdown_escapes_what_would_be_markup() -> None:
    assert escape_markdown("a|b\nc <i> x_y _z_ [1, 2]") == (r"a\|b c &lt;i&gt; x_y \_z\_ [1, 2]")
    assert escape_markdown("[a](b)") == r"[a\](b)"


@pytest.mark.parametrize("format", ["md", "html"])
def test_hostile_text_is_only_text(hostile: list[Result], format: str, tmp_path: Path) -> None:
    for table in build_all(hostile):
        text = render(table, format, tmp_path)
        assert "alert(1)" in text
        assert not SCRIPT.search(text)
        assert format == "html" or "](javascript" not in text.replace(r"\](", "")


def test_terminal_text_moves_no_cursor(hostile: list[Result]) -> None:
    text = "".join(render(table, "text") for table in build_all(hostile))
    text += "".join(show(one, {}) for one in hostile)
    assert "\x1b" not in text


class Tags(html.parser.HTMLParser):
    """Counts elements, and sees whether they are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.scripts = 0
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.links += [value or "" for name, value in attributes if name in ("href", "src")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_whole_needs_nothing_and_survives_hostile_text(
    results: list[Result], hostile: list[Result], tmp_path: Path
) -> None:
    for records in (results, hostile):
        tables = build_all(records)
        text = page(records, tables, tmp_path, EVIL)
        assert not SCRIPT.search(text)
        tags = Tags()
        assert text.count(get_plotlyjs()) == 1
        tags.feed(text.replace(get_plotlyjs(), ""))  # Its 5 MB are slow to parse.
        assert tags.open == []
        figures = text.count("<figure>")
        assert figures >= 4
        assert tags.scripts == 1 + figures  # plotly.js, and one call for each figure.
        assert tags.links
        assert all((tmp_path / link).resolve().is_file() for link in tags.links)
        assert all("://" not in link for link in tags.links)


def test_page_shows_status_reason_and_command(results: list[Result], tmp_path: Path) -> None:
    text = page(results, build_all(results), tmp_path, "sweep")
    assert "rank 4096 is above the width" in text
    assert "interrupted, superseded" in text
    place = Path(os.path.relpath(results[0].directory, tmp_path))
    assert f"harness.worker {place}/cell.json {place.name}.by-hand" in text
    assert str(results[0].directory) not in text, "right wherever page and results are moved"
    assert "tunebench cell cell.json" not in text, "what a record says is not for pasting"
    assert "prefers-color-scheme: dark" in text


def test_show_tells_the_whole_record(results: list[Result]) -> None:
    newest = index(results)
    [qlora] = [r for r in results if r.record.cell == made.trained("qlora", 0, rank=8)]
    text = show(qlora, bases(qlora, newest))
    for told in (
        "qlora nf4 r8 attention, seed 0",
        "vs untouched base",
        "vs quantized base",
        "backward",
        "← peak",
        "quantization state",
        "lm_head",
        "median of 36 timed steps",
        "speed.energy_joules: no energy counter",
        f"harness.worker {qlora.directory}/cell.json {qlora.directory.name}.by-hand",
        "before",
    ):
        assert told in text
    [oom] = [r for r in results if r.record.status == "oom"]
    assert "oom in backward, 2.00 GiB asked for: out of memory" in show(oom, {})


def test_write_report_writes_four_files_whole(results_directory: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "report"
    paths, _ = write_report(results_directory, output)
    assert sorted(path.name for path in output.iterdir()) == sorted(path.name for path in paths)
    table = pd.read_parquet(output / "records.parquet")
    pd.testing.assert_frame_equal(read_csv(output / "records.csv"), table)
    assert all((output / record).is_file() for record in table["record"])
    assert (output / "report.md").read_text().count("\n### ") == 3
    before = (output / "report.md").read_text()
    write_report(results_directory, output)
    assert (output / "report.md").read_text() == before


def test_an_output_that_cannot_be_is_the_users_error(
    results_directory: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the report"):
        write_report(results_directory, tmp_path / "file" / "report")


def test_importing_the_room_loads_nothing_heavy() -> None:
    code = (
        "import sys, reports.output.write, reports.tables.build, reports.show.record\n"
        "import reports.records.frame\n"
        "heavy = {'torch', 'pandas', 'numpy', 'scipy', 'plotly', 'rich', 'tabulate'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
