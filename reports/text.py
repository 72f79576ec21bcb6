"""How settings and figures read; only here do bytes become MiB or GiB."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
