"""All pairs of the settings and the kinds of parallelism, on two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pairs import (
    ATTENTION,
    COMPLETIONS,
    DTYPES,
    PACKING,
    TEXT,
    Factors,
    each,
    each_pair_is_in_a_row_unless_refused,
    impossible,
    sweep,
)

from matrices.cell import Cell

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

# ZeRO-1 is the optimizer of ZeRO-2 with whole gradients; test_parallelism trains a cell of it.
ZERO = ("zero2", "zero3", "zero3-offload")
SPREAD: Factors = {
    "parallelism": {
        "single": {"parallelism": "single", "devices": 1},
        **{kind: {"parallelism": kind, "devices": 2} for kind in ("ddp", "fsdp", *ZERO)},
    },
    "method": each("method", "qlora", "lora", "full"),
    "dtypes": DTYPES,
    "quant_type": each("quantization.quant_type", "nf4", "fp4"),
    "double_quant": each("quantization.double_quant", False, True),
    "quant_storage": each("quantization.quant_storage", "uint8", "bf16", "fp32"),
    "kbit_preparation": each("quantization.kbit_preparation", True, False),
    "rank": each("adapter.rank", 4, 16),
    "dropout": each("adapter.dropout", 0.0, 0.1),
    "targets": each("adapter.target_modules", "attention", "qv", "mlp", "all-linear"),
    "optimizer": each(
        "train.optimizer",
        "adamw_torch",
        "adamw_8bit",
        "lion_32bit",
        "adafactor",
        "sgd",
    ),
    "checkpointing": each("train.gradient_checkpointing", False, True),
    "use_reentrant": each("train.use_reentrant", False, True),
    "accumulation": each("train.gradient_accumulation_steps", 1, 2),
    "data": {"text": TEXT, "completions": COMPLETIONS},
    "packing": PACKING,
    "attention": ATTENTION,
    "scheduler": each("train.lr_scheduler_type", "linear", "cosine", "polynomial"),
    "max_grad_norm": each("train.max_grad_norm", 1.0, 0.0),
    "weight_decay": each("train.weight_decay", 0.0, 0.1),
}


def test_each_pair_is_in_a_row_unless_something_refuses_it() -> None:
    each_pair_is_in_a_row_unless_refused(SPREAD)


def may_diverge(cell: Cell) -> bool:
    """Adam in fp16 divides 0 by 0 where a gradient is 0: its epsilon of 1e-8 is 0 there."""
    in_fp16 = cell.method == "full" and cell.model.weight_dtype == "fp16"
    return in_fp16 and cell.train is not None and "adamw" in cell.train.optimizer


def test_all_pairs_of_settings_on_two_ranks(tunebench: Any, tmp_path: Path) -> None:
    swept = sweep(tunebench, tmp_path, SPREAD)
    steady = [cell for cell in swept.cells if not may_diverge(cell)]
    assert swept.others_than("ok", steady) == {}
    for cell in filter(may_diverge, swept.cells):
        record = swept.records[cell.cell_id]
        assert record.status in ("ok", "diverged"), record.reason
    assert swept.others_than("invalid", swept.refused) == {}
    assert impossible(swept) == {
        *(("parallelism", kind, "dtypes", "fp32 in bf16") for kind in ZERO),
        *(("parallelism", kind, "optimizer", "adafactor") for kind in ("fsdp", *ZERO)),
        *(("parallelism", kind, "scheduler", "polynomial") for kind in ZERO),
        *(("parallelism", "fsdp", "optimizer", name) for name in ("adamw_8bit", "lion_32bit")),
        ("parallelism", "fsdp", "quant_storage", "uint8"),
    }
