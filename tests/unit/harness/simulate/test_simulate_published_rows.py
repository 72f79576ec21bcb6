"""Published rows as cells; the vocabulary that no column tells, by hand from the steady figure."""

from __future__ import annotations

from pathlib import Path

import published
import pytest
import yaml

from matrices.cell import Adapter, Quantization
from matrices.errors import UserError

DATA = Path(__file__).parents[3] / "data" / "published_measurements"
ROWS = {row.row_id[-3:]: row for row in published.read(DATA.with_suffix(".csv"))}
MISTRAL = [
    f"model.layers.0.{name}"
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                 "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
]  # fmt: skip


def test_there_are_the_24_rows() -> None:
    assert len(ROWS) == 24
    assert sum(row.devices == 2 for row in ROWS.values()) == 12


def test_full_fine_tuning_is_pure_bf16_with_reentrant_checkpointing() -> None:
    cell = published.cell(ROWS["009"], 32001, MISTRAL)
    assert (cell.method, cell.parallelism, cell.devices) == ("full", "single", 1)
    assert cell.model.weight_dtype == "bf16"
    assert cell.model.config_overrides == {"vocab_size": 32001}
    assert cell.train is not None
    assert not cell.train.autocast
    assert cell.train.gradient_checkpointing
    assert cell.train.use_reentrant
    assert (cell.train.micro_batch_size, cell.train.optimizer) == (4, "adamw_torch")
    assert cell.data is not None
    assert cell.data.max_length == 4096
    assert cell.adapter is None


def test_targets_of_other_architectures_are_left_out() -> None:
    cell = published.cell(ROWS["077"], 32001, MISTRAL)
    assert cell.adapter == Adapter(
        rank=16, alpha=16, dropout=0.1, target_modules=("k_proj", "o_proj", "q_proj", "v_proj")
    )
    santacoder = published.cell(ROWS["069"], None, ["transformer.h.0.attn.c_attn"])
    assert santacoder.adapter is not None
    assert santacoder.adapter.target_modules == ("c_attn",)
    assert santacoder.model.config_overrides == {}


@pytest.mark.parametrize(
    ("row_id", "storage", "prepared"),
    [("057", "uint8", True), ("077", "uint8", False), ("058", "bf16", False)],
)
def test_4_bit_storage_and_preparation(row_id: str, storage: str, prepared: bool) -> None:
    cell = published.cell(ROWS[row_id], 32001, MISTRAL)
    assert cell.quantization == Quantization(
        quant_type="nf4",
        double_quant=True,
        quant_storage=storage,  # type: ignore[arg-type]
        kbit_preparation=prepared,
    )
    assert cell.train is not None
    assert cell.train.autocast


def test_two_gpus_ran_the_older_fsdp() -> None:
    cell = published.cell(ROWS["034"], 32001, MISTRAL)
    assert (cell.parallelism, cell.devices) == ("fsdp1", 2)


def test_what_no_cell_can_express_is_refused() -> None:
    row = ROWS["009"]
    told = published.Measurement({**row.columns, "attn": "flash_attention_3"}, 1, 1)
    with pytest.raises(UserError, match=r"flash_attention_3.*did you mean 'flash_attention_2'"):
        published.cell(told, None, MISTRAL)
    told = published.Measurement({**ROWS["033"].columns, "target_modules": "Wqkv"}, 1, 1)
    with pytest.raises(UserError, match="none of Wqkv is a linear layer"):
        published.cell(told, None, MISTRAL)


def test_a_file_without_a_column_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("row_id,models\n1,x\n")
    with pytest.raises(UserError, match="gpu: no such column"):
        published.read(file)


def test_the_unrecorded_vocabulary_follows_from_the_steady_figure() -> None:
    """Row 003: 6 bytes a parameter, two cuBLAS workspaces, the batch (three int64 a token), the
    causal mask, and scalars in blocks of 512 bytes. One token more or less is 12,288 bytes."""
    told = yaml.safe_load(DATA.with_suffix(".yaml").read_text())["vocabulary"]
    vocabulary = told["bigcode/gpt_bigcode-santacoder"]["size"]
    width, inner, head = 2048, 8192, 128
    norms = 2 * 2 * width
    attention = width * (width + 2 * head) + (width + 2 * head) + width * width + width
    mlp = width * inner + inner + inner * width + width
    parameters = vocabulary * width + 2048 * width + 24 * (norms + attention + mlp) + 2 * width
    held = 6 * parameters + 2 * 8_519_680 + 8 * 2048 * 3 * 8 + 2048 * 2048
    left = ROWS["003"].steady_allocated_bytes - held
    assert left == 3 * 512
