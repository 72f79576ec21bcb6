"""The columns of a report: one declared table, from a record to a frame and to a reader's eye."""

from __future__ import annotations

import functools
import json
import shlex
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from harness.evaluation.score_precision import softmax_dtype
from harness.ranks.launch_command import CURRENT_DIRECTORY, command_of_record
from harness.records.memory import CATEGORIES
from harness.records.part import PHASES
from harness.records.record import Record
from matrices.cell import SECTIONS
from reports.records.derived import (
    communication_bytes,
    expected_share,
    parameter_bytes,
    parameter_share,
    phase_peak_bytes,
    rank_imbalance,
    smallest_rank_peak,
    timed_seconds,
)
from reports.text import short_name

Better = Literal["lower", "higher"]
Source = str | Callable[[Record], Any]

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "lm-eval")


@dataclass(frozen=True)
class Column:
    """`source` is a dotted path in the record or a function of it; `name` carries the unit
    (`_bytes`, `_seconds`); `dtype` is pandas'."""

    name: str
    source: Source
    dtype: Literal["string", "Int64", "Float64", "boolean"]
    display: str
    description: str
    unit: str = ""
    better: Better | None = None

    def value(self, record: Record) -> Any:
        """The figure in this record; none when it was not measured or does not apply."""
        if isinstance(self.source, str):
            return _at(record, self.source)
        return self.source(record)


def _at(item: Any, path: str) -> Any:
    for part in _parts(path):
        if item is None:
            return None
        item = item.get(part) if isinstance(item, dict) else getattr(item, part)
    return item


@functools.cache
def _parts(path: str) -> list[str]:
    return path.split(".")


def _plain(value: Any) -> Any:
    return json.dumps(value, sort_keys=True) if isinstance(value, list | tuple | dict) else value


def _setting(name: str) -> Callable[[Record], Any]:
    return lambda record: _plain(_at(record.cell, name))


def _pandas_dtype(annotation: Any) -> Literal["string", "Int64", "Float64", "boolean"]:
    options = set(typing.get_args(annotation)) if _is_union(annotation) else {annotation}
    options.discard(type(None))
    if options == {bool}:
        return "boolean"
    if options == {int}:
        return "Int64"
    return "Float64" if options == {float} else "string"


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _settings() -> list[Column]:
    columns = [
        Column("method", "cell.method", "string", "method", "full, lora, qlora, or base"),
        Column("seed", "cell.seed", "Int64", "seed", "seed of data order, dropout, adapter init"),
        Column(
            "parallelism", "cell.parallelism", "string", "parallelism", "single, ddp, fsdp, ..."
        ),
        Column("devices", "cell.devices", "Int64", "devices", "devices of one cell"),
        Column("nodes", "cell.nodes", "Int64", "machines", "machines of one cell"),
        Column(
            "profile",
            lambda record: _plain(record.cell.profile),
            "string",
            "profile",
            "a user's accelerate profile; empty for the shipped one",
        ),
    ]
    for section, model in SECTIONS.items():
        for leaf, field in model.model_fields.items():
            name = f"{section}.{leaf}"
            dtype = _pandas_dtype(field.annotation)
            columns.append(
                Column(name, _setting(name), dtype, short_name(name), field.description or "")
            )
    return columns


def _version(package: str) -> Column:
    return Column(
        f"version.{package}",
        lambda record: record.stack.packages.get(package),
        "string",
        package,
        f"version of {package}",
    )


def _provenance() -> list[Column]:
    return [
        Column("status", "status", "string", "status", "how the run ended"),
        Column("reason", "reason", "string", "reason", "why it did not end ok"),
        Column("phase", "phase", "string", "phase", "what the worker was doing last"),
        Column("failure_type", "failure.type", "string", "failure", "kind of failure"),
        Column(
            "requested_bytes", "failure.requested_bytes", "Int64", "asked for",
            "bytes asked for when memory ran out", "bytes",
        ),
        Column("cell_id", "cell_id", "string", "cell", "identity of the configuration"),
        Column("stack_id", "stack_id", "string", "stack", "identity of software and hardware kind"),
        Column("attempt", "attempt", "Int64", "attempt", "counts runs of one cell on one stack"),
        Column("started", "started", "string", "started", "ISO 8601, UTC"),
        Column("ended", "ended", "string", "ended", "ISO 8601, UTC"),
        Column(
            "command",
            lambda record: shlex.join(command_of_record(record, CURRENT_DIRECTORY)),
            "string",
            "command",
            "reproduces this cell by hand, called in the record's directory",
        ),
        Column("commit", "stack.commit", "string", "commit", "of a tunebench checkout"),
        Column("dirty", "stack.dirty", "boolean", "dirty", "the checkout had local changes"),
        Column("version.python", "stack.python", "string", "python", "version of python"),
        *[_version(package) for package in PACKAGES],
        Column("hardware.cpu", "hardware.cpu", "string", "CPU", "processor model"),
        Column("hardware.cpu_count", "hardware.cpu_count", "Int64", "CPUs", "logical processors"),
        Column(
            "hardware.host_memory_bytes", "hardware.host_memory_bytes", "Int64", "host memory",
            "memory of the machine", "bytes",
        ),
        Column("hardware.accelerator", "hardware.accelerator", "string", "GPU", "device name"),
        Column("hardware.accelerator_count", "hardware.accelerator_count", "Int64", "GPUs", "used"),
        Column(
            "hardware.accelerator_memory_bytes", "hardware.accelerator_memory_bytes", "Int64",
            "GPU memory", "memory of one device", "bytes",
        ),
        Column("hardware.driver", "hardware.driver", "string", "driver", "of the GPU"),
    ]  # fmt: skip


def _phase(phase: str, field: str | None, word: str) -> Column:
    return Column(
        f"memory.{phase}.{word}_bytes",
        lambda record: phase_peak_bytes(record, phase, field),
        "Int64",
        f"{phase.replace('_', ' ')} {word.replace('_', ' ')}",
        f"{word.replace('_', ' ')} during {phase}, the largest of all ranks",
        "bytes",
        "lower",
    )


def _category(part: str, category: str, moment: str) -> Column:
    def source(record: Record) -> int | None:
        held: dict[str, int] = getattr(record.memory, part)
        # A ledger that ran lists what it saw; a category it did not see held nothing.
        return held.get(category, 0) if held else None

    word = "at_peak" if part == "by_category" else "resident"
    return Column(
        f"memory.{category}.{word}_bytes", source, "Int64", category.replace("_", " "),
        f"{category.replace('_', ' ')} {moment}", "bytes", "lower",
    )  # fmt: skip


def _memory() -> list[Column]:
    return [
        Column("memory.headline", "memory.headline", "string", "meter", "meter behind the peak"),
        Column(
            "memory.peak_bytes", "memory.peak_bytes", "Int64", "peak memory",
            "peak of the training phases by the headline meter", "bytes", "lower",
        ),
        Column("memory.peak_phase", "memory.peak_phase", "string", "peak in", "sets the peak"),
        Column(
            "memory.ledger_peak_phase", "memory.ledger_peak_phase", "string", "ledger peak in",
            "where the categories are taken",
        ),
        Column(
            "memory.timed_peak_bytes", "memory.timed_peak_bytes", "Int64", "peak of timed steps",
            "torch's CUDA peak over the timed steps", "bytes", "lower",
        ),
        Column(
            "memory.rank_imbalance", rank_imbalance, "Float64", "imbalance",
            "largest over smallest training peak of a rank, minus 1", "ratio", "lower",
        ),
        *[_phase(phase, None, "peak") for phase in PHASES],
        *[_phase(phase, "reserved_peak_bytes", "reserved_peak") for phase in PHASES],
        *[_phase(phase, "process_bytes", "process") for phase in PHASES],
        *[_category("by_category", name, "at the ledger's training peak") for name in CATEGORIES],
        *[_category("resident", name, "held before the first step") for name in CATEGORIES],
        Column(
            "memory.host_peak_rss_bytes", "memory.host_peak_rss_bytes", "Int64", "host peak RSS",
            "resident set of the process, at its largest over the timed steps", "bytes", "lower",
        ),
    ]  # fmt: skip


def _verified() -> list[Column]:
    return [
        Column(
            "verified.quantized_share", "verified.quantized_share", "Float64", "share in 4 bit",
            "of the base model's weights, those in 4 bit, by number",
        ),
        Column(
            "verified.documents_isolated", "verified.documents_isolated", "boolean",
            "documents isolated",
            "whether documents packed into one row see nothing of each other",
        ),
        Column(
            "verified.causal", "verified.causal", "boolean", "causal",
            "no later token changes an earlier logit",
        ),
        Column(
            "verified.adapter_starts_at_base", "verified.adapter_starts_at_base", "boolean",
            "adapter starts at base", "before training the logits with the adapter are the base's",
        ),
    ]  # fmt: skip


def _ranks() -> list[Column]:
    return [
        Column(
            "verified.world_size", "verified.world_size", "Int64", "ranks",
            "processes found when it trained",
        ),
        Column(
            "verified.distributed_type", "verified.distributed_type", "string", "distributed type",
            "accelerate's, as found when it trained",
        ),
        Column(
            "ranks.peak_min_bytes", smallest_rank_peak, "Int64", "smallest rank peak",
            "training peak of the rank that needs least", "bytes", "lower",
        ),
        Column(
            "ranks.parameter_bytes", parameter_bytes, "Int64", "parameters per rank",
            "parameters held once prepared for training, the largest of all ranks", "bytes",
            "lower",
        ),
        Column(
            "ranks.parameter_share", parameter_share, "Float64", "share held",
            "of the parameters, by number, the largest of all ranks", "ratio", "lower",
        ),
        Column(
            "ranks.expected_share",
            lambda record: expected_share(record.cell) if record.ranks else None,
            "Float64", "expected share", "of the parameters, as the parallelism divides them",
            "ratio",
        ),
        Column(
            "ranks.communication_bytes", communication_bytes, "Int64", "communication per step",
            "through collectives in one optimizer step, the largest of all ranks", "bytes",
            "lower",
        ),
    ]  # fmt: skip


def _placement() -> list[Column]:
    return [
        Column("placement.engine", "placement.engine", "string", "engine", "what started it"),
        Column(
            "placement.hosts", lambda record: ", ".join(record.placement.hosts) or None, "string",
            "hosts", "machines it ran on",
        ),
        Column("placement.job", "placement.job", "string", "job", "the engine's name of the job"),
        Column(
            "contaminated", lambda record: "; ".join(record.contaminated) or None, "string",
            "in doubt", "why its speed and memory are in doubt",
        ),
    ]  # fmt: skip


def _prediction() -> list[Column]:
    return [
        Column(
            "predicted_peak_bytes", "prediction.peak_allocated_bytes", "Int64", "predicted peak",
            "peak of the training phases as predicted before the run; not measured", "bytes",
            "lower",
        ),
        Column(
            "prediction_error", "prediction.error", "Float64", "prediction error",
            "predicted / measured peak, minus 1", "ratio",
        ),
        Column(
            "prediction_engine", "prediction.engine", "string", "predicted on",
            "fake-cuda or fake-cpu tensors",
        ),
    ]  # fmt: skip


def _seconds(name: str, source: str, display: str, description: str) -> Column:
    return Column(name, source, "Float64", display, description, "seconds", "lower")


def _rate(kind: str, description: str) -> Column:
    return Column(
        f"speed.tokens_per_second_{kind}", f"speed.tokens_per_second.{kind}", "Float64",
        f"{kind.replace('_', '-')} tokens/s", description, "tokens/s", "higher",
    )  # fmt: skip


def _speed() -> list[Column]:
    return [
        _seconds("speed.step_seconds_median", "speed.step_seconds_median", "step", "median step"),
        _seconds("speed.step_seconds_q1", "speed.step_seconds_q1", "step q1", "first quartile"),
        _seconds("speed.step_seconds_q3", "speed.step_seconds_q3", "step q3", "third quartile"),
        Column(
            "speed.timed_steps", lambda record: len(timed_seconds(record)) or None, "Int64",
            "timed steps", "steps after the warm-up",
        ),
        _rate("all", "with padding"),
        _rate("non_padding", "without padding: the headline"),
        _rate("loss", "tokens that carry a label"),
        Column(
            "speed.samples_per_second", "speed.samples_per_second", "Float64", "samples/s",
            "sequences per second", "samples/s", "higher",
        ),
        Column(
            "speed.tflops_per_second", "speed.tflops_per_second", "Float64", "TFLOP/s",
            "executed operations, recomputation included", "TFLOP/s", "higher",
        ),
        Column("speed.mfu", "speed.mfu", "Float64", "MFU", "of the peak", "ratio", "higher"),
        _seconds("speed.load_seconds", "speed.load_seconds", "load", "loading the model"),
        _seconds("speed.train_seconds", "speed.train_seconds", "train", "all training steps"),
        _seconds(
            "speed.evaluation_seconds", "speed.evaluation_seconds", "evaluation", "scoring"
        ),
        Column(
            "speed.energy_joules", "speed.energy_joules", "Float64", "energy",
            "over the timed steps", "J", "lower",
        ),
    ]  # fmt: skip


def _rows(name: str, description: str) -> Column:
    return Column(
        f"preparation.{name}", f"preparation.{name}", "Int64", name.replace("_", " "), description,
    )  # fmt: skip


def _counted() -> list[Column]:
    return [
        _rows("rows_read", "rows that the preparation was given"),
        _rows("rows_kept", "rows that are trained on"),
        _rows("rows_truncated", "kept, but longer than max_length"),
        _rows("rows_dropped", "left out by the preparation"),
        _rows("rows_cut_off", "rows all of whose labels are beyond max_length"),
        _rows("sequences", "rows of the prepared data; packed rows where it packs"),
        Column(
            "steps.epochs", lambda record: record.steps.epoch[-1] if record.steps.epoch else None,
            "Float64", "epochs", "passes over the data", "epochs",
        ),
        Column(
            "steps.samples", lambda record: sum(record.steps.samples) or None, "Int64", "samples",
            "sequences of all steps", "samples",
        ),
        Column(
            "verified.loss_normalization", "verified.loss_normalization", "string", "loss is",
            "what the loss is, where it is not the mean over predicted tokens",
        ),
    ]  # fmt: skip


def _other() -> list[Column]:
    return [
        Column(
            "quality.train_loss_final",
            lambda record: record.quality.train_loss[-1] if record.quality.train_loss else None,
            "Float64", "final train loss",
            "mean loss of the last step; none without a label", "nats/token", "lower",
        ),
        Column(
            "quality.softmax_dtype", softmax_dtype, "string", "log-likelihoods in",
            "dtype of the softmax behind the scores",
        ),
        Column(
            "quality.logits_dtype", "quality.recipe.logits_dtype", "string", "logits in",
            "dtype of the logits that the model gave",
        ),
        Column(
            "artifacts.trainable_parameters", "artifacts.trainable_parameters", "Int64",
            "trainable parameters", "parameters that are trained",
        ),
        Column(
            "artifacts.total_parameters", "artifacts.total_parameters", "Int64", "parameters",
            "all parameters",
        ),
        Column(
            "artifacts.adapter_bytes", "artifacts.adapter_bytes", "Int64", "adapter file",
            "size of the saved adapter", "bytes", "lower",
        ),
    ]  # fmt: skip


COLUMNS: tuple[Column, ...] = (
    *_settings(), *_provenance(), *_placement(), *_memory(), *_verified(), *_ranks(),
    *_prediction(), *_speed(), *_counted(), *_other(),
)  # fmt: skip
