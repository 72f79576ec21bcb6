"""How right the predictions were: their errors, family by family.

A relative error is predicted / measured - 1: above zero the prediction was too high.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from harness.records.record import Record
from matrices.cell import Cell
from matrices.errors import UserError
from reports.records.load import Result, index
from reports.text import DASH, text_table

if TYPE_CHECKING:
    import pandas as pd

# Ends the family's name within a model's: `llama-3.1-8b-instruct` is of the family `llama-3.1`.
SIZE = re.compile(r"[-_.]?(\d+x)?\d+(\.\d+)?[bm](?=$|[-_.])", re.IGNORECASE)
FAMILY = ("model", "method", "four_bit", "optimizer", "parallelism", "checkpointing", "device")


@dataclass(frozen=True)
class Errors:
    """Relative errors of one figure: `worst` is the one farthest from zero, sign kept."""

    n: int
    median: float | None = None
    worst: float | None = None


@dataclass(frozen=True)
class Family:
    """Runs that are alike in what decides memory, and how far off they were predicted."""

    model: str
    method: str
    four_bit: str
    optimizer: str
    parallelism: str
    checkpointing: str
    device: str
    memory: Errors
    step_time: Errors
    within_margin: int = 0
    records: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def families(results: Sequence[Result]) -> list[Family]:
    """Errors of the predictions in records in force, one entry per family and one over all.

    Raises UserError when no record carries a prediction beside a measured peak.
    """
    table = errors_frame(results)
    if table.empty:
        raise UserError(
            "no record here carries a prediction and a measured peak; 'tunebench run' predicts "
            "what it runs unless --no-predict says otherwise"
        )
    found = [
        _family({name: str(part[name].iloc[0]) for name in FAMILY}, part)
        for _, part in table.groupby(list(FAMILY), sort=True)
    ]
    if len(found) > 1:
        found.append(_family(dict.fromkeys(FAMILY, "all"), table))
    return found


def errors_frame(results: Sequence[Result]) -> pd.DataFrame:
    """One row per record in force with a memory error: its family, errors and margin."""
    import pandas as pd

    rows = [
        {
            **family_of(result.record),
            "memory": prediction.error,
            "step_time": prediction.expected_seconds_error,
            "margin": prediction.margin,
            "record": result.path.as_posix(),
        }
        for result in index(results).values()
        if (prediction := result.record.prediction) is not None and prediction.error is not None
    ]
    figures = {"memory": "Float64", "step_time": "Float64", "margin": "Float64"}
    names = [*FAMILY, *figures, "record"]
    return pd.DataFrame(rows, columns=names).astype(figures)


def _family(key: Mapping[str, str], part: pd.DataFrame) -> Family:
    inside = (part["memory"].abs() <= part["margin"]).sum()
    return Family(
        **key,
        memory=_errors(part["memory"]),
        step_time=_errors(part["step_time"]),
        within_margin=int(inside),
        records=part["record"].tolist(),
    )


def _errors(column: pd.Series[Any]) -> Errors:
    known = column.dropna()
    if known.empty:
        return Errors(0)
    worst = max(known, key=abs)
    return Errors(len(known), float(known.median()), float(worst))


def family_of(record: Record) -> dict[str, str]:
    """What decides the memory of a run, in words."""
    cell = record.cell
    train = cell.train
    return {
        "model": model_family(cell),
        "method": cell.method,
        "four_bit": four_bit(cell),
        "optimizer": train.optimizer if train else DASH,
        "parallelism": cell.parallelism + (f" x{cell.devices}" if cell.devices > 1 else ""),
        "checkpointing": "yes" if train and train.gradient_checkpointing else "no",
        "device": record.hardware.accelerator or "CPU",
    }


def model_family(cell: Cell) -> str:
    """`meta-llama/Llama-3.1-8B-Instruct` is of `llama-3.1`."""
    name = (cell.model.config or cell.model.name).rstrip("/").removesuffix("/config.json")
    name = name.rpartition("/")[2].removesuffix(".json").lower()
    size = SIZE.search(name)
    return name[: size.start()] if size and size.start() else name


def four_bit(cell: Cell) -> str:
    if cell.quantization is None:
        return DASH
    return cell.quantization.quant_type + ("+dq" if cell.quantization.double_quant else "")


def calibration_text(found: Sequence[Family]) -> str:
    """The errors as a table for people, the families with the largest first and all runs last."""
    ordered = sorted(found, key=lambda one: (one.model == "all", -abs(one.memory.worst or 0)))
    headers = (
        "model", "method", "4-bit", "optimizer", "spread", "checkpointing", "device",
        "n", "memory median", "worst", "within margin", "step time median", "worst",
    )  # fmt: skip
    rows = [
        (
            *(str(getattr(one, name)) for name in FAMILY),
            str(one.memory.n),
            percent(one.memory.median),
            percent(one.memory.worst),
            f"{one.within_margin} of {one.memory.n}",
            percent(one.step_time.median),
            percent(one.step_time.worst),
        )
        for one in ordered
    ]
    lines = text_table([headers, *rows])
    return "\n".join([*lines, "", "error: predicted / measured - 1; + is predicted too high"])


def percent(error: float | None) -> str:
    """`+0.42 %`, `−3.1 %`, and `exact` only for no difference at all."""
    if error is None:
        return DASH
    if error == 0:
        return "exact"
    text = f"{100 * error:+.3g} %" if abs(error) >= 1e-5 else f"{100 * error:+.1e} %"
    return text.replace("-", "−", 1) if error < 0 else text
