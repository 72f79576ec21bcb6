"""All pairs of settings and model families, in one process."""

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
    packed,
    sweep,
)
from tiny_families import FAMILIES, FUSED, make_family

from harness.models import packaged

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

FAMILY: Factors = {
    "family": {name: {"model.name": f"./{name}"} for name in FAMILIES},
    "method": {
        "qlora": {"method": "qlora"},
        "lora": {"method": "lora"},
        "full": {"method": "full"},
        "qlora fp4": {
            "method": "qlora",
            "quantization.quant_type": "fp4",
            "quantization.double_quant": True,
            "quantization.kbit_preparation": False,
        },
    },
    "targets": each("adapter.target_modules", "attention", "qv", "all-linear"),
    "dtypes": {name: DTYPES[name] for name in ("bf16", "fp32", "fp32 in bf16")},
    "checkpointing": {
        "none": {},
        "non-reentrant": {"train.gradient_checkpointing": True},
        "reentrant": {"train.gradient_checkpointing": True, "train.use_reentrant": True},
    },
    "data": {"text": TEXT, "completions": COMPLETIONS},
    "packing": PACKING | {"bfd_split": packed("bfd_split")},
    "attention": ATTENTION,
}


def test_each_pair_is_in_a_row_unless_something_refuses_it() -> None:
    each_pair_is_in_a_row_unless_refused(FAMILY)


def test_all_pairs_of_settings_and_families(
    tunebench: Any, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNEBENCH_CACHE", str(cache))
    tokenizer = packaged.ensure_model("tiny-llama")
    for name in FAMILIES:
        make_family(name, tmp_path / name, tokenizer)
    swept = sweep(tunebench, tmp_path, FAMILY)
    assert swept.others_than("ok", swept.cells) == {}
    assert swept.others_than("invalid", swept.refused) == {}
    assert impossible(swept) == {("family", name, "targets", "all-linear") for name in FUSED}
