"""TRL's preparation of the rows, with counts of what it kept, truncated and dropped.

TRL tokenizes, truncates, drops and packs in one call. Here it is called twice: first to tokenize,
then for the rest. It does the same work, and the tokenized rows in between can be counted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from harness.records.speed import Preparation
from matrices.errors import UserError

BATCH_ROWS = 10_000


class Labels(NamedTuple):
    """The concatenated labels of some rows: where each row starts, its length, and for each
    position the number of labels before it that are not -100."""

    starts: Any
    lengths: Any
    before: Any

    def within(self, starts: Any, ends: Any) -> Any:
        """Labels in each of the spans; an empty or backward one has none."""
        return self.before[np.maximum(starts, ends)] - self.before[starts]


def prepare_and_count(
    prepare: Callable[..., Dataset],
    rows: Dataset,
    processing_class: Any,
    args: Any,
    packing: bool,
    *rest: Any,
) -> tuple[Dataset, Preparation | None]:
    """The result of TRL's `_prepare_dataset` for `rows`, and its counts; None for a TRL whose
    collator makes the labels.

    Raises UserError when no token with a loss remains.
    """
    only_tokenize = copy.copy(args)
    only_tokenize.max_length = None
    only_tokenize.shuffle_dataset = False
    tokenized: Dataset | None = prepare(rows, processing_class, only_tokenize, False, *rest)
    if tokenized is None or not {"input_ids", "labels"} <= set(tokenized.column_names):
        tokenized = None
    start = rows if tokenized is None else tokenized
    prepared = prepare(start, processing_class, args, packing, *rest)
    if "labels" not in prepared.column_names:
        return prepared, None
    counted = _count_prepared(len(rows), prepared)
    if tokenized is not None:
        strategy = args.packing_strategy if packing else None
        _count_truncated(counted, tokenized, args, strategy)
        if strategy is None:
            _count_dropped(counted, prepared)
    _check_loss_tokens(counted, args.max_length)
    return prepared, counted


def _count_prepared(read: int, prepared: Dataset) -> Preparation:
    """Sequences, tokens and predicted tokens of the data that is trained on."""
    tokens = loss_tokens = 0
    for labels, documents in _batches(prepared):
        tokens += int(labels.lengths.sum())
        starts = np.concatenate([[0], documents.cumsum()[:-1]]).astype(np.int64)
        # Labels are shifted: the first token of a row, or of a document kept apart, is predicted
        # by nothing.
        loss_tokens += int(labels.within(starts + (documents > 0), starts + documents).sum())
    return Preparation(
        rows_read=read, sequences=len(prepared), tokens=tokens, loss_tokens=loss_tokens
    )


def _batches(rows: Dataset) -> Iterator[tuple[Labels, Any]]:
    """Labels of the rows, and the lengths of the documents that they are prepared of."""
    if len(rows) == 0:
        return
    apart = "seq_lengths" in rows.column_names
    columns = rows.select_columns(["labels", "seq_lengths"] if apart else ["labels"])
    for batch in columns.with_format("arrow").iter(BATCH_ROWS):
        lists = batch["labels"].combine_chunks()
        lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64)
        labelled = pc.list_flatten(lists).to_numpy(zero_copy_only=False) != -100
        starts = np.concatenate([[0], lengths.cumsum()[:-1]]).astype(np.int64)
        labels = Labels(starts, lengths, np.concatenate([[0], labelled.cumsum()]))
        if apart:
            documents = pc.list_flatten(batch["seq_lengths"].combine_chunks())
            yield labels, documents.to_numpy(zero_copy_only=False).astype(np.int64)
        else:
            yield labels, lengths


def _count_truncated(
    counted: Preparation, tokenized: Dataset, args: Any, strategy: str | None
) -> None:
    """Count the rows longer than max_length, and those of them that lose all their labels."""
    longest = args.max_length
    counted.tokens_read = counted.rows_truncated = counted.rows_cut_off = counted.rows_kept = 0
    for labels, _ in _batches(tokenized):
        counted.tokens_read += int(labels.lengths.sum())
        long = np.zeros(len(labels.lengths), bool) if longest is None else labels.lengths > longest
        counted.rows_kept += int((labels.lengths > 0).sum())
        if strategy in ("wrapped", "bfd_split"):
            continue  # these split long rows and keep all parts
        starts, ends = labels.starts, labels.starts + labels.lengths
        if getattr(args, "truncation_mode", "keep_start") == "keep_end" and strategy is None:
            labels_left = labels.within(np.where(long, ends - (longest or 0), starts), ends)
        else:
            labels_left = labels.within(starts, np.where(long, starts + (longest or 0), ends))
        cut_off = long & (labels_left == 0) & (labels.within(starts, ends) > 0)
        counted.rows_cut_off += int(cut_off.sum())
        # Packed rows are kept even without labels.
        counted.rows_truncated += int(
            (long & (labels_left > 0) if strategy is None else long).sum()
        )
    counted.rows_dropped = counted.rows_read - counted.rows_kept


def _count_dropped(counted: Preparation, prepared: Dataset) -> None:
    """Count dropped rows: without packing every prepared row is a row of the data."""
    counted.rows_kept = len(prepared)
    counted.rows_dropped = counted.rows_read - len(prepared)


def _check_loss_tokens(counted: Preparation, max_length: int | None) -> None:
    if counted.loss_tokens:
        return
    cut_off, read = counted.rows_cut_off, counted.rows_read
    if cut_off:
        others = "" if cut_off == read else " and no other row has any"
        raise UserError(
            f"no token carries a loss: {cut_off} of {read} rows lose what is to be learnt (the "
            f"completion) at {max_length} tokens{others}; raise max_length or "
            "shorten the prompts",
            key="data.max_length",
        )
    raise UserError(
        f"no token carries a loss: none of the {read} rows has a labelled token after its first "
        "one, which nothing predicts",
        key="data.source",
    )
