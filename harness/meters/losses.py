"""How the recorded loss of a step is normalized, and what else it contains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.records.speed import Steps


def labelled_losses(losses: Sequence[float], loss_tokens: Sequence[int]) -> list[float | None]:
    """The losses; None for a step without labelled tokens, whose loss TRL reports as 0.0."""
    return [loss if tokens else None for loss, tokens in zip(losses, loss_tokens, strict=True)]


def explain_missing_losses(losses: Sequence[float | None]) -> str | None:
    """The reason why some steps have no loss; None when all have one."""
    without = [str(step) for step, loss in enumerate(losses, start=1) if loss is None]
    if not without:
        return None
    first = f"step {without[0]}" if len(without) == 1 else f"the first is step {without[0]}"
    return (
        f"no token carries a label in {len(without)} of {len(losses)} steps ({first}): "
        "they have no loss"
    )


def normalization(ranks: Sequence[Steps]) -> str | None:
    """What the loss was divided by; None when it was the number of predicted tokens of the step
    over all ranks. `ranks` are the steps as each rank counted them."""
    tokens = [sum(counted) for counted in zip(*(each.tokens_loss for each in ranks), strict=True)]
    steps = [step for step, number in enumerate(tokens) if number]
    divisors = [[each.loss_divisor[step] for step in steps] for each in ranks]
    predicted = [tokens[step] for step in steps]
    if all(each == predicted for each in divisors):
        return None
    if all(divisor is None for each in divisors for divisor in each):
        several = any(sum(each.micro_batches[step] for each in ranks) > 1 for step in steps)
        return MICRO_BATCH_MEANS if several else None
    per_rank = [[each.tokens_loss[step] for step in steps] for each in ranks]
    if divisors == per_rank:
        return RANK_MEANS
    divided = sum(divisor for divisor in divisors[0] if divisor is not None)
    if divided <= sum(predicted):
        return f"divided by {divided:g} tokens where {sum(predicted)} are predicted"
    return (
        f"divided by {divided:g} labels where {sum(predicted)} are predicted: the Trainer counts "
        "the first label of each row too, which no token predicts, as it does not take this class "
        "for a causal language model; the loss and its gradients are "
        f"{sum(predicted) / divided:.4f} of those of the mean over predicted tokens"
    )


MICRO_BATCH_MEANS = (
    "the mean over micro batches of each one's mean over its predicted tokens: the Trainer does "
    "not count labels for a model whose forward takes no further arguments"
)
RANK_MEANS = "the mean over ranks of each one's mean over its predicted tokens"


def extra_loss_terms(trainer: Any) -> list[str]:
    """Terms of the loss other than the cross entropy, read from TRL's trainer."""
    terms = []
    if getattr(trainer, "aux_loss_enabled", False):
        terms.append(f"load balancing of the experts, times {trainer.router_aux_loss_coef:g}")
    if trainer.args.label_smoothing_factor:
        terms.append(f"label smoothing of {trainer.args.label_smoothing_factor:g}")
    if getattr(trainer.args, "loss_type", "nll") != "nll":
        terms.append(f"{trainer.args.loss_type} in the place of the cross entropy")
    return terms
