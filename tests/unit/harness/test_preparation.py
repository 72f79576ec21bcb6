"""What becomes of rows, counted by hand, on the very rows that TRL prepares by itself."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTTrainer

from harness.data import preparation
from harness.records.speed import Preparation
from harness.train import Observer, TrainingSchedule, build_trainer, sft_config
from matrices.cell import Cell, Data, Model, Train
from matrices.errors import UserError

# One token a letter, and one for the end.
LENGTH = 8
TEXTS = [{"text": "a" * n} for n in (3, 20, 7, 8, 0)]
# The second loses a part of its completion at 8 tokens, the third all of it.
PAIRS = [
    {"prompt": "aa", "completion": "bbb"},
    {"prompt": "aaa", "completion": "b" * 9},
    {"prompt": "a" * 12, "completion": "b"},
    {"prompt": "a", "completion": "b"},
]
COMPLETION = {"completion_only_loss": True}
# Settings, TRL's own further arguments, rows; then rows kept, truncated, dropped, cut off;
# sequences, tokens before and after, and predicted tokens.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], list[dict[str, str]], tuple[int, ...]]] = {
    # 4, 21, 8, 9 and 1 tokens.
    "texts": ({}, {}, TEXTS, (5, 2, 0, 0, 5, 43, 29, 3 + 7 + 7 + 7 + 0)),
    "texts, shuffled": (
        {}, {"shuffle_dataset": True}, TEXTS, (5, 2, 0, 0, 5, 43, 29, 3 + 7 + 7 + 7 + 0),
    ),
    "texts, the end kept": (
        {}, {"truncation_mode": "keep_end"}, TEXTS, (5, 2, 0, 0, 5, 43, 29, 3 + 7 + 7 + 7 + 0),
    ),
    # Cut at every 8th token: 5 rows of 8, one of 3, and the first of each is not predicted.
    "texts, wrapped": (
        {"packing": True, "packing_strategy": "wrapped"}, {}, TEXTS, (5, 0, 0, 0, 6, 43, 43, 37),
    ),
    # 8, 8, 8 and 4 + 1; a document's first token is not predicted.
    "texts, packed": (
        {"packing": True, "packing_strategy": "bfd"}, {}, TEXTS, (5, 2, 0, 0, 4, 43, 29, 24),
    ),
    # The second makes 8 + 8 + 5, the fourth 8 + 1.
    "texts, split and packed": (
        {"packing": True, "packing_strategy": "bfd_split"}, {}, TEXTS,
        (5, 0, 0, 0, 6, 43, 43, 43 - 8),
    ),
    # 6, 13, 14 and 3 tokens, of which 4, 10, 2 and 2 are learnt.
    "completions": (COMPLETION, {}, PAIRS, (3, 1, 1, 1, 3, 36, 6 + 8 + 3, 4 + 5 + 2)),
    "completions, the end kept": (
        COMPLETION, {"truncation_mode": "keep_end"}, PAIRS,
        (4, 2, 0, 0, 4, 36, 6 + 8 + 8 + 3, 4 + 7 + 2 + 2),
    ),
    "completions, packed": (
        COMPLETION | {"packing": True, "packing_strategy": "bfd"}, {}, PAIRS,
        (4, 2, 0, 1, 4, 36, 25, 4 + 5 + 0 + 2),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


def network(tokenizer: Any) -> Any:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    return LlamaForCausalLM(config)


def cell(data: dict[str, Any], further: dict[str, Any]) -> Cell:
    return Cell(
        method="full",
        model=Model(weight_dtype="fp32", compute_dtype="fp32"),
        data=Data(**({"max_length": LENGTH, "packing": False} | data)),
        train=Train(steps=1, sft_config=further),
    )


def prepared(asked: Cell, rows: Dataset, tokenizer: Any, place: Path) -> Any:
    return build_trainer(
        asked,
        network(tokenizer),
        tokenizer,
        rows,
        TrainingSchedule(1, 1e-3),
        output_dir=place,
        observer=Observer(),
    )


@pytest.mark.parametrize("name", CASES)
def test_rows_are_counted_and_prepared_as_trl_does(
    name: str, tokenizer: Any, tmp_path: Path
) -> None:
    data, further, listed, counts = CASES[name]
    asked, rows = cell(data, further), Dataset.from_list(listed)
    trainer = prepared(asked, rows, tokenizer, tmp_path)
    alone = SFTTrainer(
        model=network(tokenizer),
        args=sft_config(asked, rows, TrainingSchedule(1, 1e-3), tmp_path),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    assert trainer.train_dataset.to_list() == alone.train_dataset.to_list()
    kept, truncated, dropped, cut_off, sequences, before, tokens, predicted = counts
    assert trainer.preparation == Preparation(
        rows_read=len(listed),
        rows_kept=kept,
        rows_truncated=truncated,
        rows_dropped=dropped,
        rows_cut_off=cut_off,
        sequences=sequences,
        tokens_read=before,
        tokens=tokens,
        loss_tokens=predicted,
    )


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    ("listed", "told"),
    [
        ([{"prompt": "a" * 12, "completion": "b"}] * 3, "3 of 3 rows lose .* at 8 tokens"),
        ([{"text": ""}] * 3, "none of the 3 rows has a labelled token after its first"),
    ],
)
def test_nothing_to_learn_is_refused(
    listed: list[dict[str, str]], told: str, packing: bool, tokenizer: Any, tmp_path: Path
) -> None:
    data = {"packing": packing, "packing_strategy": "bfd"}
    asked = cell(data | (COMPLETION if "prompt" in listed[0] else {}), {})
    with pytest.raises(UserError, match=told):
        prepared(asked, Dataset.from_list(listed), tokenizer, tmp_path)


@pytest.mark.parametrize("labels", [True, False])
def test_a_trl_that_labels_elsewhere_prepares_at_once(labels: bool) -> None:
    """One that makes labels last, or leaves them to its collator, gets the rows as they are; what
    cannot be seen stays unknown."""
    asked: list[int | None] = []
    rows = Dataset.from_list(TEXTS)
    whole = Dataset.from_list([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}])

    def prepare(given: Dataset, _: Any, args: Any, packing: bool, *rest: str) -> Dataset:
        asked.append(args.max_length)
        assert given is rows
        return whole if args.max_length and labels else whole.remove_columns("labels")

    args = SimpleNamespace(max_length=LENGTH, shuffle_dataset=False)
    made, counted = preparation.prepare_and_count(prepare, rows, None, args, False, "train")
    assert asked == [None, LENGTH]
    assert made.column_names == (["input_ids", "labels"] if labels else ["input_ids"])
    if labels:
        assert counted is not None
        assert (counted.sequences, counted.loss_tokens) == (1, 2)
        assert counted.rows_truncated is counted.rows_dropped is None
    else:
        assert counted is None
