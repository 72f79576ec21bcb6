"""How settings, figures and tables read; only here do bytes become MiB or GiB."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from matrices.files.text import visible
from matrices.language.labels import PATHS

SHORT_NAMES = {
    "quantization": "4-bit",
    "model.name": "model",
    "data.source": "data",
    "adapter.target_modules": "targets",
    "adapter.alpha_per_rank": "alpha / rank",
    "quantization.quant_type": "4-bit type",
    "quantization.kbit_preparation": "k-bit preparation",
    "train.micro_batch_size": "micro batch",
    "train.gradient_accumulation_steps": "accumulation",
    "train.lr_scheduler_type": "schedule",
    "model.attn_implementation": "attention implementation",
    "model.fingerprint": "model fingerprint",
    "data.fingerprint": "data fingerprint",
    "data.revision": "data revision",
    "model.revision": "model revision",
    "evaluate.limit": "documents scored",
    "evaluate.batch_size": "evaluation batch",
}


def short_name(setting: str) -> str:
    """What a reader is shown for a dotted setting name."""
    return SHORT_NAMES.get(setting, setting.rpartition(".")[2].replace("_", " "))


def setting_text(setting: str, value: Any) -> str:
    """A setting's value for a reader; a dash where the setting does not apply."""
    if setting == "evaluate.limit":
        return "all" if value is None else f"first {value}"
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if setting in PATHS and Path(str(value)).is_absolute():
        return Path(value).name
    if setting.endswith(".fingerprint"):
        return str(value)[:12]
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value)
    return json.dumps(value, sort_keys=True) if isinstance(value, dict) else str(value)


DASH = "–"
MIB, GIB = 2**20, 2**30


def bytes_text(figure: int | None) -> str:
    """`1.25 GiB`, `130.4 MiB`, `12.0 KiB`; a dash for none."""
    if figure is None:
        return DASH
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", 2**10)):
        if abs(figure) >= size:
            return f"{figure / size:,.{2 if unit == 'GiB' else 1}f} {unit}"
    return f"{figure} B"


def seconds_text(figure: float | None) -> str:
    """`812 ms`, `3.25 s`, `4 min 05 s`, `1 h 02 min`; a dash for none."""
    if figure is None:
        return DASH
    if figure < 1:
        return f"{figure * 1000:.3g} ms"
    if figure < 60:
        return f"{figure:.2f} s"
    minutes, seconds = divmod(round(figure), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def count_text(figure: int | None) -> str:
    """`134,515,008`; a dash for none."""
    return DASH if figure is None else f"{figure:,}"


def signed(figure: float, decimals: int) -> str:
    """`+1.20`, `−0.30`, with a minus sign that is as wide as the plus."""
    return f"{figure:+,.{decimals}f}".replace("-", "−")


def printable(text: str) -> str:
    """Text from outside on one line, without the control characters that move a terminal."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))


def harmless(text: str) -> str:
    """Lines of text without the control characters that move a terminal."""
    plain = text.replace("\N{NO-BREAK SPACE}", " ")
    return "".join(c if c == "\n" or c.isprintable() else "\ufffd" for c in plain)


def one_line(text: str, longest: int = 300) -> str:
    """Text from outside on one line, cut where it gets too long to read in a table."""
    joined = printable(text)
    return joined if len(joined) <= longest else joined[: longest - 1] + "…"


# Between two columns of a table.
GAP = "  "
# A last column that has less room than this on a terminal is not folded.
LEAST_FOLDED = 20


def text_table(
    rows: Iterable[Sequence[str]],
    right: Collection[int] = (),
    indent: str = "",
    ruled: bool = False,
) -> list[str]:
    """A plain table: one string for each row, of several lines where a cell has several.

    A column is as wide as its widest cell, counted in columns of a terminal; those numbered in
    `right` are flush right. `ruled` puts dashes under the first row, two more than its words are
    wide. Control characters are escaped. On a terminal that is too narrow for the last column,
    that column is folded.
    """
    table = [[visible(cell).split("\n") for cell in row] for row in rows]
    widths = [
        max(_width(line) for cell in column for line in cell) for column in zip(*table, strict=True)
    ]
    if ruled:
        headings = (2 + max(map(_width, heading)) for heading in table[0])
        widths = [max(pair) for pair in zip(widths, headings, strict=True)]
    if widths and sys.stdout.isatty():
        taken = len(indent) + sum(len(GAP) + width for width in widths[:-1])
        table = [[*row[:-1], _folded(row[-1], taken)] for row in table]

    def padded(line: str, place: int) -> str:
        space = " " * (widths[place] - _width(line))
        return space + line if place in right else line + space

    def printed(cells: Iterable[str]) -> str:
        texts = [padded(line, place) for place, line in enumerate(cells)]
        return (indent + GAP.join(texts)).rstrip(" ")

    lines = ["\n".join(map(printed, zip_longest(*row, fillvalue=""))) for row in table]
    return [lines[0], printed("-" * width for width in widths), *lines[1:]] if ruled else lines


def _width(text: str) -> int:
    """Columns that a line takes on a terminal."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def _folded(lines: Sequence[str], taken: int) -> list[str]:
    """The lines of a last cell in what a terminal has left beside `taken` columns."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    room = console.width - taken
    if room < LEAST_FOLDED:
        return list(lines)
    return [part.plain for line in lines for part in Text(line).wrap(console, room)] or [""]
