"""In which precision log-likelihoods are taken, now and in older records."""

from __future__ import annotations

from harness.records.record import Record

# lm-eval's `softmax_dtype`. In bfloat16, the default with bf16 weights, the sum over a document is
# rounded to multiples of 2 nats above 256 and of 4 above 512.
SOFTMAX_DTYPE = "float32"
# What lm-eval takes without the argument: the dtype of the logits, which is that of the weights.
WITHOUT_ARGUMENT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def softmax_dtype(record: Record) -> str | None:
    """The dtype of the log-likelihoods behind a record's scores; none without scores."""
    if not record.quality.tasks:
        return None
    if record.quality.recipe is not None:
        return record.quality.recipe.softmax_dtype
    return WITHOUT_ARGUMENT[record.cell.model.weight_dtype]
