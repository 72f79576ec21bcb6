"""Training steps: TRL's SFTTrainer, which tells an observer about each of its phases.

Nothing here reads a clock, a tensor's value or the state of the device, so the same code runs on a
simulated device.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from datasets import Dataset
from transformers import TrainerCallback

from harness import device
from harness.data import preparation
from harness.data.dataset import loss_arguments
from harness.models.lora_layers import base_model
from harness.records.speed import Preparation
from matrices.cell import Cell, Train
from matrices.rules.parallelism import reentrant

try:
    from trl import SFTConfig, SFTTrainer
except ImportError:
    # The stack of a prediction may lack a TRL that fits its transformers. SFTTrainer derives from
    # this Trainer.
    from transformers import Trainer as SFTTrainer
    from transformers import TrainingArguments as SFTConfig

# Arguments of TRL alone, or newer than some stacks that are predicted. Prepared rows need none of
# them.
OPTIONAL_ARGUMENTS = frozenset(
    {"max_length", "packing", "packing_strategy", "padding_free", "dataset_kwargs", "use_cpu"}
)


class StepFacts(NamedTuple):
    """What the Trainer knows about a step at its end. The norm may still be on the device, may be
    divided among ranks, or may be None where the engine computes none."""

    epoch: float
    learning_rate: float
    gradient_norm: Any
    skipped: bool


class Observer:
    """Receives the events of training. This one ignores them; meters override what they need."""

    def train_begin(self, optimizer: Any) -> None:
        """Training starts; the first batch is not fetched yet."""

    def phase(self, name: str) -> None:
        """`forward`, `backward` or `optimizer_step` starts."""

    def micro_batch(self, inputs: dict[str, Any]) -> None:
        """A micro batch starts, as the loader returned it."""

    def micro_batch_end(self, loss: Any, divisor: Any = None) -> None:
        """A micro batch was propagated back; `loss` is its share of the step's loss, a detached
        scalar tensor, and `divisor` the number of labels that the whole step is divided by."""

    def step_facts(self, facts: StepFacts) -> None:
        """The Trainer's figures of a step, right before `step_end`."""

    def step_end(self, step: int) -> None:
        """Optimizer step number `step`, counted from 1, is complete and gradients are gone."""


def inner_optimizer(optimizer: Any) -> Any:
    """torch's optimizer out of accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


class ObservedTrainer(SFTTrainer):
    """SFTTrainer that tells an observer about its phases and changes nothing else."""

    def __init__(self, *args: Any, observer: Observer, **kwargs: Any) -> None:
        self.observer = observer
        self.preparation: Preparation | None = None
        self._rate = math.nan
        self._gradient_norm: Any = None
        super().__init__(*args, callbacks=[_StepCallback(self)], **kwargs)

    def training_step(self, model: Any, inputs: Any, *divisor: Any, **named: Any) -> Any:
        self._observe_engine_step()
        # DeepSpeed's engine moves on to the next rate within the step.
        self._rate = float(self.optimizer.param_groups[0]["lr"])
        self.observer.micro_batch(inputs)
        self.observer.phase("forward")
        loss = super().training_step(model, inputs, *divisor, **named)
        # Clipping the gradients is part of the optimizer step.
        self.observer.phase("optimizer_step")
        self.observer.micro_batch_end(loss, *divisor, *named.values())
        return loss

    def _observe_engine_step(self) -> None:
        """Observe the step of DeepSpeed's engine, which accelerate calls within `backward`."""
        engine = getattr(self, "deepspeed", None)
        if engine is None or "step" in vars(engine):
            return
        step = engine.step

        def observed_step(*args: Any, **kwargs: Any) -> Any:
            self.observer.phase("optimizer_step")
            return step(*args, **kwargs)

        engine.step = observed_step

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.observer.phase("backward")
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        self._gradient_norm = super()._get_grad_norm(*args, **kwargs)
        return self._gradient_norm

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        prepare = super()._prepare_dataset
        if "args" not in inspect.signature(prepare).parameters:
            # An older TRL takes its settings as single arguments; its rows are not counted.
            return prepare(dataset, *args, **kwargs)
        made, self.preparation = preparation.prepare_and_count(prepare, dataset, *args, **kwargs)
        return made

    def end_step(self, state: Any) -> None:
        """Tell the observer about the step that `state` has just counted."""
        skipped = bool(self.accelerator.optimizer_step_was_skipped)
        facts = StepFacts(state.epoch, self._rate, self._gradient_norm, skipped)
        self._gradient_norm = None
        self.observer.step_facts(facts)
        self.observer.step_end(state.global_step)


class _StepCallback(TrainerCallback):
    def __init__(self, trainer: ObservedTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self._trainer.observer.train_begin(optimizer)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.end_step(state)


@dataclass(frozen=True)
class TrainingSchedule:
    """Number of steps and learning rate. `prepared` rows are already token ids and labels."""

    steps: int
    learning_rate: float
    prepared: bool = False


def build_trainer(
    cell: Cell,
    model: Any,
    tokenizer: Any,
    rows: Dataset,
    schedule: TrainingSchedule,
    *,
    output_dir: Path,
    observer: Observer,
) -> ObservedTrainer:
    """A trainer for `rows`, which tells `observer` of its phases."""
    config = sft_config(cell, rows, schedule, output_dir)
    arguments: dict[str, Any] = {"model": model, "args": config, "train_dataset": rows}
    accepted = inspect.signature(SFTTrainer.__init__).parameters
    # transformers 4.46 gave the tokenizer its new name.
    arguments["processing_class" if "processing_class" in accepted else "tokenizer"] = tokenizer
    if SFTTrainer is transformers.Trainer:
        # TRL used this collator for packed rows before it had its own.
        arguments["data_collator"] = transformers.DataCollatorForLanguageModeling(
            tokenizer, mlm=False
        )
    return ObservedTrainer(**arguments, observer=observer)


def sft_config(
    cell: Cell, rows: Dataset | None, schedule: TrainingSchedule, output_dir: Path
) -> SFTConfig:
    """The arguments of training. Every field that changes the run is explicit, because defaults
    differ between versions. `rows` may be None when the schedule says that they are prepared."""
    train, data = _train_and_data(cell)
    autocast = train.autocast
    arguments: dict[str, Any] = {
        "output_dir": str(output_dir),
        "max_steps": schedule.steps,
        "learning_rate": schedule.learning_rate,
        "per_device_train_batch_size": train.micro_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        # At a rate of 0 there is no schedule, and the polynomial one refuses it.
        "lr_scheduler_type": train.lr_scheduler_type if schedule.learning_rate else "constant",
        "warmup_steps": train.warmup_steps,
        "optim": train.optimizer,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "bf16": autocast and cell.model.compute_dtype == "bf16",
        "fp16": autocast and cell.model.compute_dtype == "fp16",
        "gradient_checkpointing": train.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": reentrant(cell)},
        "max_length": data.max_length,
        "packing": data.packing and not schedule.prepared,
        "packing_strategy": data.packing_strategy,
        "padding_free": data.packing and data.packing_strategy != "wrapped",
        "seed": cell.seed,
        "report_to": [],
        "logging_strategy": "no",
        "save_strategy": "no",
        "eval_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": not device.has_cuda(),
        "dataloader_pin_memory": device.has_cuda(),
        "dataloader_num_workers": 0,
    }
    if schedule.prepared:
        arguments["dataset_kwargs"] = {"skip_prepare_dataset": True}
        arguments["max_length"] = None
    else:
        assert rows is not None
        arguments |= loss_arguments(data, rows.column_names) | {"data_seed": cell.seed}
    further = dict(train.sft_config)
    if not schedule.learning_rate:
        further.pop("lr_scheduler_kwargs", None)
    known = {field.name for field in dataclasses.fields(SFTConfig)}
    arguments = {
        name: value
        for name, value in arguments.items()
        if name in known or name not in OPTIONAL_ARGUMENTS
    }
    return SFTConfig(**(arguments | further))


def _train_and_data(cell: Cell) -> tuple[Train, Any]:
    if cell.train is None or cell.data is None:
        raise ValueError(f"a {cell.method} cell does not train")
    return cell.train, cell.data


def worst_case_rows(cell: Cell, vocabulary: int, steps: int) -> Dataset:
    """Full-length rows for `steps` whole optimizer steps on every rank: no padding, a loss on every
    token.

    Memory does not depend on which tokens they are, so they count through the vocabulary.
    """
    train, data = _train_and_data(cell)
    rows = steps * train.micro_batch_size * train.gradient_accumulation_steps
    ids = [[(row + at) % vocabulary for at in range(data.max_length)] for row in range(rows)]
    columns: dict[str, Any] = {"input_ids": ids, "labels": ids}
    if data.packing and data.packing_strategy != "wrapped":
        columns["seq_lengths"] = [[data.max_length]] * rows
    made = Dataset.from_dict(columns)
    # An epoch is divided among the ranks: one epoch holds whole steps for all of them.
    return made if cell.ranks == 1 else made.select(list(range(rows)) * cell.ranks)


@contextmanager
def forward_restored(model: Any) -> Iterator[None]:
    """Restore the `forward` of a model afterwards.

    TRL patches the base model's forward with a fused head and accelerate wraps the outer one in
    autocast, once: it marks the model and would leave a second trainer without autocast. Scoring
    must not run under autocast either.
    """
    base = base_model(model)
    patched = ("forward", "_original_forward", "_is_accelerate_prepared")
    before = [(m, {k: vars(m)[k] for k in patched if k in vars(m)}) for m in (model, base)]
    try:
        yield
    finally:
        for module, attributes in before:
            for name in patched:
                vars(module).pop(name, None)
            vars(module).update(attributes)
