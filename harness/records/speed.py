"""The speed of a record: its data, its steps, their times. Times are `float` seconds."""

from __future__ import annotations

from pydantic import Field

from harness.records.part import Part


class Tokens(Part):
    """`all` with padding, `non_padding`, and `loss`: tokens that carry a label."""

    all: float
    non_padding: float
    loss: float


class Steps(Part):
    """What each optimizer step, warm-up too, was made of, as counted while it ran: one entry per
    step in every list. Of several ranks, counts are summed; the rest is rank 0's."""

    micro_batches: list[int] = Field(default_factory=list)
    samples: list[int] = Field(default_factory=list, description="rows of the prepared data")
    tokens_all: list[int] = Field(default_factory=list, description="with padding")
    tokens_non_padding: list[int] = Field(default_factory=list)
    tokens_loss: list[int] = Field(
        default_factory=list, description="tokens that carry a label and are predicted"
    )
    epoch: list[float] = Field(
        default_factory=list, description="passes over the data by the end of the step"
    )
    learning_rate: list[float] = Field(
        default_factory=list, description="that the step was taken with, of the first group"
    )
    gradient_norm: list[float | None] = Field(
        default_factory=list, description="before clipping, as the Trainer computed it"
    )
    loss_divisor: list[float | None] = Field(
        default_factory=list,
        description="the Trainer's num_items_in_batch, over all ranks unless it was told otherwise",
    )
    skipped_updates: list[int] = Field(
        default_factory=list,
        description="steps, counted from 1, whose gradients overflowed and changed no weight",
    )


class Preparation(Part):
    """What became of the rows on their way from the source to the model, counted on the data sets
    that TRL's own preparation made."""

    rows_read: int
    rows_kept: int | None = None
    rows_truncated: int | None = Field(None, description="kept, but longer than max_length")
    rows_dropped: int | None = Field(
        None, description="left out: no token with a label remains, or no token at all"
    )
    rows_cut_off: int | None = Field(
        None, description="rows all of whose labels are beyond max_length; dropped unless packed"
    )
    sequences: int = Field(description="rows of the prepared data: packed rows where it packs")
    tokens_read: int | None = Field(None, description="in all rows, before anything was cut")
    tokens: int = Field(description="in the prepared data")
    loss_tokens: int = Field(description="of these, those that carry a label and are predicted")


class Speed(Part):
    """Times of the training steps, ledger off. `step_seconds` holds every step, warm-up too;
    every figure derived from it leaves the first `warmup_steps` out."""

    step_seconds: list[float] = Field(default_factory=list)
    warmup_steps: int = 0
    step_seconds_median: float | None = None
    step_seconds_q1: float | None = None
    step_seconds_q3: float | None = None
    tokens: Tokens | None = Field(None, description="counts over the timed steps")
    tokens_per_second: Tokens | None = None
    samples_per_second: float | None = None
    flops_per_step: int | None = Field(
        None, description="executed floating point operations, recomputation included"
    )
    tflops_per_second: float | None = None
    mfu: float | None = None
    load_seconds: float | None = None
    train_seconds: float | None = None
    behaviour_seconds: float | None = Field(
        None, description="trying what the loaded model does, on a few tokens"
    )
    memory_steps_seconds: float | None = Field(None, description="the untimed ledger steps")
    meter_seconds: float | None = Field(
        None, description="spent by the step meter itself, between steps, in no step's time"
    )
    evaluation_seconds: float | None = None
    energy_joules: float | None = Field(None, description="over the timed steps")
    foreign_cpu_share: float | None = Field(
        None,
        description="share of all processor time that other processes used during the timed "
        "steps: near 0 on a quiet machine, and a reason to doubt the times when it is not",
    )
