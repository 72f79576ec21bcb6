"""Tokens counted by hand, and counts that stay with their batch wherever it goes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.utils.data import DataLoader
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from harness.meters.batches import CountingCollator, count_of, count_tokens, total
from harness.meters.rates import TokenCount

# Rows of 3 and 5 tokens, the first two of each a prompt that carries no label.
ROWS = [
    {"input_ids": [4, 5, 6], "labels": [-100, -100, 6]},
    {"input_ids": [4, 5, 6, 7, 8], "labels": [-100, -100, 6, 7, 8]},
]


def test_tokens_of_a_padded_batch() -> None:
    """Two rows of 5, the second with 2 of padding: 10 tokens, 8 of them text. The first label of a
    row predicts nothing, so 4 + 2 carry a loss."""
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        "labels": torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, -100, -100]]),
    }
    assert total([count_tokens(batch, 2)]) == TokenCount(all=10, non_padding=8, loss=6, samples=2)


def test_tokens_of_prompt_and_completion() -> None:
    """Labels on the completion alone: 3 prompt tokens, 2 of completion, 1 of padding."""
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 9, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]]),
        "labels": torch.tensor([[-100, -100, -100, 8, 9, -100]]),
    }
    assert total([count_tokens(batch, 1)]) == TokenCount(all=6, non_padding=5, loss=2, samples=1)


def test_tokens_without_a_mask_are_all_text() -> None:
    batch = {"input_ids": torch.ones(1, 7), "labels": torch.ones(1, 7)}
    assert total([count_tokens(batch, 3)]) == TokenCount(all=7, non_padding=7, loss=6, samples=3)


def test_counts_through_trls_own_collator() -> None:
    texts: list[dict[str, Any]] = [{"input_ids": row["input_ids"]} for row in ROWS]
    padded = CountingCollator(DataCollatorForLanguageModeling(pad_token_id=0))
    assert count_of(padded(ROWS)) == TokenCount(10, 8, 1 + 3, 2)
    assert count_of(padded(ROWS[:1])) == TokenCount(3, 3, 1, 1)
    assert count_of(padded(texts)) == TokenCount(10, 8, 2 + 4, 2)
    # Flattened into one row: no padding, and neither row's first token is predicted.
    flat = CountingCollator(DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True))
    assert count_of(flat(texts)) == TokenCount(8, 8, 2 + 4, 2)


def test_a_count_goes_where_its_batch_goes() -> None:
    """Through a loader's worker, which collates in another process, and on to another device; a
    batch that somebody makes anew is counted again."""
    collator = CountingCollator(DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True))
    # torch's stubs say that a loader takes a Dataset; a list of rows is one.
    loader: DataLoader[Any] = DataLoader(ROWS, 2, num_workers=1, collate_fn=collator)  # type: ignore[arg-type]
    [batch] = loader
    assert count_of(batch) == TokenCount(8, 8, 4, 2)
    # As torch pins a batch of its own type.
    assert count_of(copy.copy(batch)) == TokenCount(8, 8, 4, 2)
    moved = batch.to(torch.device("meta"), non_blocking=True)
    assert moved["input_ids"].device.type == "meta"
    assert moved["max_length_q"] == 5
    assert count_of(moved) == TokenCount(8, 8, 4, 2)
    # Where two rows are one, nothing tells how many there were.
    assert total([count_of(dict(batch))]) == TokenCount(8, 8, 4, 1)


def test_total() -> None:
    counts = [TokenCount(8, 6, 5, 1), TokenCount(10, 10, 9, 2), TokenCount(4, 1, 0, 1)]
    assert total(counts) == TokenCount(22, 17, 14, 4, 3)
    assert total([]) == TokenCount(0, 0, 0, 0, 0)
