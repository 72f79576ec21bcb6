"""What is counted while it trains, against a bare TRL trainer's own loop and its own log."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    TrainerCallback,
)
from trl import SFTTrainer

from harness.meters import losses, speed
from harness.meters.batches import CountingCollator
from harness.meters.steps import StepClock
from harness.records.provenance import new_record
from harness.records.record import Record
from harness.train import TrainingSchedule, build_trainer, sft_config
from matrices.cell import Cell, Data, Train

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "num_key_value_heads": 2}


class BaseBehaviour(NamedTuple):
    """One micro batch as a bare trainer hands it to its model, in plain lists."""

    ids: list[list[int]]
    labels: list[list[int]]
    mask: list[list[int]] | None


class Bare(SFTTrainer):
    """Notes down what it is given, and changes nothing."""

    seen: list[BaseBehaviour]

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        mask = inputs["attention_mask"].tolist() if "attention_mask" in inputs else None
        self.seen.append(
            BaseBehaviour(inputs["input_ids"].tolist(), inputs["labels"].tolist(), mask)
        )
        return super().training_step(model, inputs, *args, **kwargs)


class Steps(TrainerCallback):
    """The micro batches of each step."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.of_steps: list[list[BaseBehaviour]] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        taken = sum(map(len, self.of_steps))
        self.of_steps.append(self.trainer.seen[taken:])


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


def model(tokenizer: Any, kind: str = "llama") -> Any:
    torch.manual_seed(0)
    size = SIZES | {"vocab_size": len(tokenizer)}
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**size, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**size, intermediate_size=16, **EXPERTS))
    return LlamaForCausalLM(LlamaConfig(**size, intermediate_size=16))


def cell(train: dict[str, Any], data: dict[str, Any]) -> Cell:
    settings = {"steps": 3, "warmup_steps": 1, "micro_batch_size": 2, "learning_rate": 1e-2}
    made = Cell(
        method="full",
        data=Data(**({"max_length": 16, "packing": False} | data)),
        train=Train(**(settings | train)),
    )
    fp32 = made.model.model_copy(update={"weight_dtype": "fp32", "compute_dtype": "fp32"})
    return made.model_copy(update={"model": fp32})


def texts(*lengths: int) -> Dataset:
    return Dataset.from_dict({"text": ["ab"[n % 2] * length for n, length in enumerate(lengths)]})


def counted(cell: Cell, network: Any, tokenizer: Any, rows: Dataset, place: Path) -> Record:
    """As a worker trains and counts it."""
    assert cell.train is not None
    clock = StepClock(1, lambda *_: None)
    course = TrainingSchedule(cell.train.steps, cell.train.learning_rate)
    trainer = build_trainer(
        cell, network, tokenizer, rows, course, output_dir=place, observer=clock
    )
    trainer.data_collator = CountingCollator(trainer.data_collator)
    trainer.train()
    record = new_record(cell, [])
    record.verified.loss_terms = losses.extra_loss_terms(trainer)
    record.preparation = trainer.preparation
    speed.fill_speed(record, clock)
    return record


def bare(
    cell: Cell, network: Any, tokenizer: Any, rows: Dataset, place: Path
) -> tuple[Bare, list[list[BaseBehaviour]]]:
    """The same by TRL alone, which logs every step."""
    assert cell.train is not None
    logged = {"logging_strategy": "steps", "logging_steps": 1}
    train = cell.train.model_copy(update={"sft_config": cell.train.sft_config | logged})
    course = TrainingSchedule(cell.train.steps, cell.train.learning_rate)
    config = sft_config(cell.model_copy(update={"train": train}), rows, course, place)
    steps = Steps()
    trainer = Bare(
        model=network,
        args=config,
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[steps],
    )
    trainer.seen, steps.trainer = [], trainer
    trainer.train()
    return trainer, steps.of_steps


def by_hand(step: Sequence[BaseBehaviour]) -> tuple[int, int, int]:
    """Tokens with padding, without, and predicted ones."""
    everything = text = labelled = 0
    for batch in step:
        for at, row in enumerate(batch.ids):
            everything += len(row)
            text += len(row) if batch.mask is None else sum(batch.mask[at])
            labelled += sum(label != -100 for label in batch.labels[at][1:])
    return everything, text, labelled


PAIRS = Dataset.from_list([{"prompt": "ab" * 2, "completion": "c" * n} for n in range(1, 7)])
TWELVE = texts(*range(3, 15))
# Settings, rows, and the micro batches and samples of each step as they follow from them.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], Dataset, list[int], list[int]]] = {
    "whole steps": ({"gradient_accumulation_steps": 2}, {}, TWELVE, [2] * 3, [4] * 3),
    "gradients not clipped": ({"max_grad_norm": 0.0}, {}, TWELVE, [1] * 3, [2] * 3),
    "an epoch ends within a step": (
        {"gradient_accumulation_steps": 4}, {}, TWELVE, [4, 2, 4], [8, 4, 8],
    ),
    "every step is an epoch": (
        {"gradient_accumulation_steps": 4}, {}, texts(5, 9, 3, 7, 8), [3] * 3, [5] * 3,
    ),
    "a row alone": ({"micro_batch_size": 4}, {}, texts(6), [1] * 3, [1] * 3),
    "the last batch dropped": (
        {"sft_config": {"dataloader_drop_last": True}, "gradient_accumulation_steps": 2},
        {}, texts(5, 9, 3, 7, 8, 6, 4), [2, 1, 2], [4, 2, 4],
    ),
    "a loader that dispatches": (
        {"sft_config": {"accelerator_config": {"dispatch_batches": True}}},
        {}, texts(5, 9, 3, 7, 8), [1] * 3, [2, 2, 1],
    ),
    "completions": ({"gradient_accumulation_steps": 2}, {"completion_only_loss": True}, PAIRS,
                    [2, 1, 2], [4, 2, 4]),
    "packed, documents apart": (
        {"gradient_accumulation_steps": 2}, {"packing": True, "packing_strategy": "bfd"},
        texts(3, 9, 12, 14, 4, 2, 13), [2, 1, 2], [4, 1, 4],
    ),
    "packed, wrapped": (
        {"gradient_accumulation_steps": 2}, {"packing": True, "packing_strategy": "wrapped"},
        texts(*range(3, 12)), [2, 1, 2], [4, 1, 4],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_counts_are_what_a_bare_trainer_was_given(
    name: str, tokenizer: Any, tmp_path: Path
) -> None:
    """Tokens of every step from the tensors of a bare trainer, counted in a plain loop; loss,
    norm, rate and epoch from TRL's log."""
    train, data, rows, micro_batches, samples = CASES[name]
    asked, network = cell(train, data), model(tokenizer)
    record = counted(asked, copy.deepcopy(network), tokenizer, rows, tmp_path)
    trainer, of_steps = bare(asked, network, tokenizer, rows, tmp_path)
    steps = record.steps
    assert (steps.micro_batches, steps.samples) == (micro_batches, samples)
    assert steps.micro_batches == [len(step) for step in of_steps]
    found = list(zip(steps.tokens_all, steps.tokens_non_padding, steps.tokens_loss, strict=True))
    assert found == [by_hand(step) for step in of_steps]
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert record.quality.train_loss == pytest.approx([e["loss"] for e in log], rel=1e-6)
    assert steps.gradient_norm == [e["grad_norm"] for e in log]
    assert steps.learning_rate == [e["learning_rate"] for e in log]
    assert steps.epoch == pytest.approx([e["epoch"] for e in log], abs=1e-4)  # logged rounded
    assert record.verified.loss_normalization is None
    assert record.preparation is not None
    assert record.preparation.sequences == len(trainer.train_dataset)


def test_gpt2s_loss_is_said_to_be_another_quantity(tokenizer: Any, tmp_path: Path) -> None:
    """Rows of 10 tokens each: unpacked, 9 predictions are divided by 10 labels. Packed one by one
    the same rows are divided by 9, at the same weights: the loss is 10/9 of it."""
    rows = texts(*[9] * 8)  # and the end of each
    network = model(tokenizer, "gpt2")
    training = {"micro_batch_size": 1, "learning_rate": 1e-12}
    length = len(tokenizer(rows[0]["text"])["input_ids"])
    plain, packed = (
        counted(cell(training, data), copy.deepcopy(network), tokenizer, rows, tmp_path)
        for data in (
            {"max_length": length + 4},
            {"max_length": length + 1, "packing": True, "packing_strategy": "bfd"},
        )
    )
    [divided] = set(plain.steps.loss_divisor)
    [predicted] = set(plain.steps.tokens_loss)
    assert divided is not None
    assert divided == predicted + 1 == packed.steps.loss_divisor[0] + 1  # type: ignore[operator]
    told = plain.verified.loss_normalization
    assert told is not None
    assert f"{predicted / divided:.4f}" in told
    assert packed.verified.loss_normalization is None


def test_what_the_loss_holds_beside(tokenizer: Any, tmp_path: Path) -> None:
    """Mixtral's loss is not the cross entropy alone: recomputed from its logits, the rest is the
    load balancing, times the factor that is told."""
    rows = texts(9, 9)
    network = model(tokenizer, "mixtral")
    ids = tokenizer([text + tokenizer.eos_token for text in rows["text"]], return_tensors="pt")
    with torch.no_grad():
        plain = network.eval()(**ids, labels=ids["input_ids"], output_router_logits=True)
        logits = plain.logits[:, :-1].flatten(0, 1)
        entropy = torch.nn.functional.cross_entropy(logits, ids["input_ids"][:, 1:].flatten())
    record = counted(
        cell({"learning_rate": 1e-12, "steps": 1}, {}), network, tokenizer, rows, tmp_path
    )
    [term] = record.verified.loss_terms
    assert term.startswith("load balancing of the experts, times ")
    factor = float(term.rpartition(" ")[2])
    [loss] = record.quality.train_loss
    assert loss is not None
    assert loss - float(entropy) == pytest.approx(factor * float(plain.aux_loss), rel=1e-3)


def test_a_step_without_a_label_has_no_loss(tokenizer: Any, tmp_path: Path) -> None:
    """One document of three has all of its labels beyond the length; packed, it stays."""
    rows = Dataset.from_list(
        [
            {"prompt": "a", "completion": "b" * 6},
            {"prompt": "x" * 30, "completion": "b"},
            {"prompt": "a", "completion": "b" * 5},
        ]
    )
    data = {"completion_only_loss": True, "packing": True, "packing_strategy": "bfd"}
    asked = cell({"micro_batch_size": 1, "steps": 3}, data | {"max_length": 10})
    record = counted(asked, model(tokenizer), tokenizer, rows, tmp_path)
    without = [at for at, tokens in enumerate(record.steps.tokens_loss) if not tokens]
    assert len(without) == 1
    losses_of_steps = record.quality.train_loss
    assert [at for at, loss in enumerate(losses_of_steps) if loss is None] == without
    assert f"step {without[0] + 1}" in record.missing["quality.train_loss"]


def test_seeds_change_the_order_and_nothing_else(tokenizer: Any, tmp_path: Path) -> None:
    def tokens(seed: int) -> list[int]:
        asked = cell({"steps": 6}, {}).model_copy(update={"seed": seed})
        found = counted(asked, model(tokenizer), tokenizer, TWELVE, tmp_path)
        assert found.steps.epoch[-1] == 1.0
        return found.steps.tokens_non_padding

    first, again, other = tokens(0), tokens(0), tokens(1)
    assert first == again != other
    assert sum(first) == sum(other)
