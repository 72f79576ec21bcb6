"""The record: what is known about one cell after (or before) it ran. A versioned contract.

Light on purpose (no torch), so that launch and reports can read it quickly. Bytes are `int` bytes,
times are `float` seconds, moments are ISO 8601 in UTC. A figure nobody could measure is `None`, and
`Record.missing` says why under its dotted name.
"""

from __future__ import annotations

import json
import re
import stat
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from matrices.cell import SECTIONS, Cell, split_unknown
from matrices.errors import UserError

SCHEMA_VERSION = 1

Status = Literal[
    "ok", "predicted", "oom", "timeout", "failed", "diverged", "invalid", "skipped", "interrupted"
]
Phase = Literal["load", "kbit_preparation", "forward", "backward", "optimizer_step", "evaluation"]
PHASES: tuple[Phase, ...] = (
    "load",
    "kbit_preparation",
    "forward",
    "backward",
    "optimizer_step",
    "evaluation",
)
# Load and evaluation stand apart.
TRAINING_PHASES: tuple[Phase, ...] = ("forward", "backward", "optimizer_step")
CATEGORIES = (
    "weights",
    "quantized_weights",
    "quantization_state",
    "adapters",
    "gradients",
    "optimizer_states",
    "activations",
    "logits_and_loss",
    "temporaries",
    "workspaces",
)

# Of a model's weights: with less in 4 bit it is said that most of it is not.
MOSTLY_IN_4BIT = 0.5


class Part(BaseModel):
    # JSON has no NaN: a diverged loss is written as the string "NaN" and read back as a float.
    # Fields of a newer writer are kept, so that a record read and written again loses nothing.
    model_config = ConfigDict(extra="allow", ser_json_inf_nan="strings")


class PhaseMemory(Part):
    """One phase on one rank. Peaks are within the phase.

    `ledger_*` count live tensor storages in 512-byte blocks on the training device; `allocated_`
    and `reserved_` are torch's CUDA counters; `process_` and `device_` are NVML's.
    """

    ledger_peak_bytes: int | None = None
    ledger_end_bytes: int | None = None
    allocated_peak_bytes: int | None = None
    reserved_peak_bytes: int | None = None
    process_bytes: int | None = None
    device_bytes: int | None = None
    host_peak_rss_bytes: int | None = None


class LiveTensor(Part):
    """A storage that was live at the training peak."""

    bytes: int
    category: str
    op: str
    shape: list[int]
    dtype: str
    module: str
    phase: str


class Memory(Part):
    """`headline` names the meter behind `peak_bytes`: torch's CUDA counter where there is one,
    else the ledger. The peak is over the training phases of the untimed full-length steps; load
    and evaluation stand apart. `peak_bytes` and `peak_phase` are of one moment, and `by_category`,
    `top_tensors` and `ledger_peak_phase` are of another one where the headline is not the
    ledger's. On several ranks all of them are of the rank with the highest peak."""

    headline: Literal["cuda_allocated", "ledger"] | None = None
    peak_bytes: int | None = None
    peak_phase: Phase | None = None
    ledger_peak_bytes: int | None = Field(None, description="the ledger's training peak")
    ledger_peak_phase: Phase | None = Field(None, description="where the ledger has its peak")
    timed_peak_bytes: int | None = Field(
        None,
        description="torch's CUDA peak over the timed steps, whose phases are not told apart; on "
        "several ranks the largest",
    )
    phases: dict[Phase, list[PhaseMemory]] = Field(
        default_factory=dict, description="one entry per rank"
    )
    by_category: dict[str, int] = Field(
        default_factory=dict, description="ledger bytes by category at the ledger's training peak"
    )
    resident: dict[str, int] = Field(
        default_factory=dict,
        description="exact (unrounded) bytes by category held before the first step",
    )
    top_tensors: list[LiveTensor] = Field(default_factory=list)
    host_peak_rss_bytes: int | None = Field(None, description="over the timed steps")
    allocator_settings: dict[str, str] = Field(default_factory=dict)


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


class Metric(Part):
    value: float
    stderr: float | None = None


class TaskScore(Part):
    """One lm-eval task, or a group of them as lm-eval aggregates it; `version` is the task's,
    `hash` of its resolved configuration and its documents, so equal hashes mean equal questions."""

    metrics: dict[str, Metric]
    higher_is_better: dict[str, bool]
    n: int = Field(description="documents scored")
    num_fewshot: int | None = Field(0, description="none for a group whose tasks differ")
    version: str
    hash: str
    subtasks: list[str] = Field(
        default_factory=list, description="of a group: the tasks and groups it aggregates"
    )


class Recipe(Part):
    """How the log-likelihoods were taken: it may differ between two records of one cell."""

    softmax_dtype: str = Field(description="lm-eval's argument of this name")
    logits_dtype: str | None = Field(
        None, description="of the logits the model gave, which the softmax cannot make finer"
    )


class Generation(Part):
    prompt: str
    text: str


class Quality(Part):
    """lm-eval's scores of what was trained (or of the base, for a base cell)."""

    tasks: dict[str, TaskScore] = Field(default_factory=dict)
    train_loss: list[float | None] = Field(
        default_factory=list,
        description="loss of each optimizer step as the Trainer has it, unrounded: the mean over "
        "its predicted tokens unless verified.loss_normalization says otherwise; none without any",
    )
    generations: list[Generation] = Field(default_factory=list)
    samples_file: str | None = Field(
        None, description="parquet of per-document results, beside the record"
    )
    lm_eval_version: str | None = None
    recipe: Recipe | None = Field(
        None, description="none in older records: the softmax was taken in the logits' own dtype"
    )


class Artifacts(Part):
    trainable_parameters: int | None = None
    total_parameters: int | None = None
    adapter_bytes: int | None = Field(None, description="size of the saved adapter file")
    adapter_path: str | None = Field(None, description="relative to the record's directory")


class PassedThrough(Part):
    """An argument of sft_config or lora_config as the library's object held it, and the library's
    default. `classified` is false where tunebench's tables do not know the argument."""

    asked: Any = None
    held: Any = None
    default: Any = None
    classified: bool = True


class VerifiedAdapter(Part):
    """LoRA as it was found on the loaded model, one number for many modules: counts by value."""

    ranks: dict[str, int] = Field(default_factory=dict, description="adapted modules by rank")
    scalings: dict[str, int] = Field(
        default_factory=dict, description="adapted modules by scaling: alpha / rank, or / its root"
    )
    layers: list[int] = Field(default_factory=list, description="numbers of the adapted layers")
    parameters: list[str] = Field(
        default_factory=list, description="adapted without a layer of their own (fused experts)"
    )
    dora: int = Field(0, description="adapted modules with a magnitude of their own")
    init: str | None = Field(None, description="init_lora_weights")
    modules_to_save: list[str] = Field(
        default_factory=list, description="of which a copy is trained"
    )
    trained_tokens: dict[str, int] = Field(
        default_factory=dict, description="rows trained, by the embedding's name"
    )
    trained_biases: int = Field(0, description="bias vectors of the base that are trained")


class Verified(Part):
    """What was found on the loaded modules and objects, not what was asked for."""

    optimizer: str | None = Field(None, description="class that ran")
    quantized_modules: int | None = None
    quant_types: list[str] = Field(default_factory=list)
    quantized_share: float | None = Field(
        None, description="of the base model's weights, those in 4 bit, by number"
    )
    adapter: VerifiedAdapter | None = None
    causal: bool | None = Field(None, description="no later token changes an earlier logit")
    adapter_starts_at_base: bool | None = Field(
        None, description="before training the logits with the adapter are the base's"
    )
    documents_isolated: bool | None = Field(
        None,
        description="whether documents packed into one row see nothing of each other; none: rows "
        "hold one document each",
    )
    adapter_modules: list[str] = Field(default_factory=list)
    adapter_module_count: int | None = None
    attn_implementation: str | None = None
    distributed_type: str | None = Field(None, description="accelerate's, as found when it trained")
    world_size: int | None = Field(None, description="ranks found when it trained")
    weight_dtypes: dict[str, int] = Field(
        default_factory=dict, description="parameters by dtype before training"
    )
    loss_normalization: str | None = Field(
        None, description="what the loss is, where it is not the mean over predicted tokens"
    )
    loss_terms: list[str] = Field(
        default_factory=list, description="what the loss holds beside the cross entropy"
    )
    substitutions: list[str] = Field(
        default_factory=list, description="what ran instead of what was asked, and why"
    )
    passed_through: dict[str, PassedThrough] = Field(
        default_factory=dict, description="arguments of sft_config and lora_config, by their names"
    )


class RecordedPrediction(Part):
    """What was predicted for this cell on this device before it ran, and how far off it was.

    `stack` names the versions the prediction executed; `margin` is the relative error it allowed
    for. Seconds are of one optimizer step.
    """

    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    steady_allocated_bytes: int | None = None
    peak_phase: str | None = None
    by_phase: dict[str, int] = Field(default_factory=dict)
    engine: str | None = None
    device: str | None = None
    margin: float | None = None
    stack: dict[str, str] = Field(default_factory=dict)
    floor_seconds: float | None = None
    expected_seconds: float | None = None
    error: float | None = Field(
        None, description="predicted / measured - 1 of the training peak (memory.peak_bytes)"
    )
    expected_seconds_error: float | None = Field(
        None, description="predicted / measured - 1 of the median step time"
    )


class Failure(Part):
    """Why the status is not ok. For oom: the phase, and the bytes asked for where known."""

    type: str
    message: str
    phase: str | None = None
    requested_bytes: int | None = None


class Communication(Part):
    """Collectives that one rank called in one optimizer step, by name: how often, and the bytes of
    the tensors it handed over or received, whichever is more."""

    calls: dict[str, int] = Field(default_factory=dict)
    bytes: dict[str, int] = Field(default_factory=dict)


class RankState(Part):
    """One rank: where it is (written by itself while it runs), and what only it can know.

    `beat` is when the process last showed that it is alive, `progressed` when it last entered a
    phase or ended a step: both seconds since the epoch.
    """

    rank: int
    world_size: int = 1
    host: str = ""
    pid: int | None = None
    device: str | None = Field(None, description="GPU's UUID, or cpu")
    phase: str | None = None
    step: int | None = None
    beat: float | None = None
    progressed: float | None = None
    status: Status | None = Field(None, description="none until it ended")
    reason: str | None = None
    failure: Failure | None = None
    exit_code: int | None = Field(None, description="of its process; negative for a signal")
    parameter_bytes: int | None = Field(
        None, description="parameters it holds once the model is prepared for training"
    )
    whole_parameter_bytes: int | None = Field(
        None, description="all parameters of the model, as they were loaded"
    )
    parameter_share: float | None = Field(
        None,
        description="of the model's parameters, those it holds, by number: FSDP2 turns what is "
        "trained to fp32, so bytes alone do not tell whether it is sharded",
    )
    tokens: Tokens | None = Field(None, description="its share of speed.tokens")
    communication: Communication | None = None
    stack_file: str | None = Field(
        None, description="where each of its threads stood when it was killed, beside the record"
    )


class Placement(Part):
    """Who started the cell, and on what. `devices` are GPU UUIDs, or cpu:0, cpu:1..."""

    engine: Literal["by hand", "local", "slurm", "ray"] = "by hand"
    hosts: list[str] = Field(default_factory=list)
    devices: list[str] = Field(default_factory=list)
    job: str | None = Field(None, description="the engine's name of the job")
    exclusive: bool | None = Field(
        None, description="whether no other cell ran on the machine meanwhile"
    )


class Stack(Part):
    """Software: package versions, and the commit of a tunebench run from a checkout."""

    python: str
    packages: dict[str, str]
    commit: str | None = None
    dirty: bool | None = None


class Hardware(Part):
    cpu: str
    cpu_count: int
    host_memory_bytes: int
    accelerator: str | None = Field(None, description="device name; none on a CPU machine")
    accelerator_count: int = 0
    accelerator_memory_bytes: int | None = None
    driver: str | None = None


class Provenance(Part):
    """Which bytes were read: commits of hub models, hashes of files."""

    model: dict[str, str] = Field(default_factory=dict)
    data: dict[str, str] = Field(default_factory=dict)
    unexpected_weights: dict[str, int] = Field(
        default_factory=dict,
        description="tensors of the checkpoint that the model has no place for: names with * for "
        "numbers, and how many each",
    )
    environment: dict[str, str] = Field(
        default_factory=dict, description="variables that change results, as they were"
    )


class Record(Part):
    schema_version: int = SCHEMA_VERSION
    cell_id: str
    cell: Cell
    base_cell_ids: dict[str, str] = Field(
        default_factory=dict, description="untouched and quantized: the cells to judge against"
    )
    stack_id: str
    stack: Stack
    hardware: Hardware
    command: list[str] = Field(
        description="argv that reproduces this cell by hand, called in the record's directory"
    )
    status: Status
    reason: str | None = None
    phase: str | None = Field(None, description="what the worker was doing last")
    started: str
    ended: str | None = None
    attempt: int = 1
    preparation: Preparation | None = None
    memory: Memory = Field(default_factory=Memory)
    steps: Steps = Field(default_factory=Steps)
    speed: Speed = Field(default_factory=Speed)
    quality: Quality = Field(default_factory=Quality)
    artifacts: Artifacts = Field(default_factory=Artifacts)
    verified: Verified = Field(default_factory=Verified)
    prediction: RecordedPrediction | None = None
    ranks: list[RankState] = Field(default_factory=list)
    placement: Placement = Field(default_factory=Placement)
    contaminated: list[str] = Field(
        default_factory=list, description="why its figures are in doubt: what else used its devices"
    )
    failure: Failure | None = None
    provenance: Provenance = Field(default_factory=Provenance)
    missing: dict[str, str] = Field(
        default_factory=dict, description="dotted name of a None figure to the reason"
    )

    # Settings of the cell that only a newer writer knows; each has that writer's default, as any
    # other value would be part of `cell_id` (see `read_record`).
    _unknown_settings: dict[str, Any] = PrivateAttr(default_factory=dict)

    def to_json(self) -> str:
        text = self.model_dump_json(indent=1)
        if self._unknown_settings:
            plain = json.loads(text)
            for name, value in self._unknown_settings.items():
                known = plain["cell"].get(name)
                plain["cell"][name] = known | value if isinstance(known, dict) else value
            text = json.dumps(plain, indent=1, ensure_ascii=False)
        return text + "\n"


def read_record(path: Path) -> Record:
    """Read `record.json`; fields that this version does not know are kept.

    Raises UserError naming the file when it is not a record of this or an older schema, or when
    its cell does not hash to its `cell_id`: it was changed, or it has settings that this version
    does not know and that are not at their writer's defaults.
    """
    plain = _plain(path)
    unknown: dict[str, Any] = {}
    if isinstance(plain.get("cell"), dict):
        plain["cell"], unknown = split_unknown(plain["cell"])
    try:
        record = Record.model_validate_json(json.dumps(plain))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            first["msg"], where=str(path), key=".".join(str(part) for part in first["loc"])
        ) from error
    record._unknown_settings = unknown
    _check_identity(record, path)
    _check_forms(record, path)
    return record


def _plain(path: Path) -> dict[str, Any]:
    """The JSON object in a file, of a schema that this version reads."""
    try:
        # A pipe would be waited for.
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError("not a readable record: it is not a file", where=str(path))
        plain: Any = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"not a readable record: {why}", where=str(path)) from error
    version = plain.get("schema_version") if isinstance(plain, dict) else None
    if type(version) is not int:
        raise UserError("not a record: it has no schema_version", where=str(path))
    if version > SCHEMA_VERSION:
        raise UserError(
            f"written by a newer tunebench: {version} is above {SCHEMA_VERSION}, the newest this "
            "one reads; upgrade tunebench",
            where=str(path),
            key="schema_version",
        )
    found: dict[str, Any] = plain
    return found


def _check_identity(record: Record, path: Path) -> None:
    hashed = record.cell.cell_id
    if hashed == record.cell_id:
        return
    names: list[str] = []
    for name, value in record._unknown_settings.items():
        names += [f"{name}.{leaf}" for leaf in value] if name in SECTIONS else [name]
    if names:
        raise UserError(
            "written by a newer tunebench, with settings that this one does not know "
            f"({', '.join(names)}); upgrade tunebench",
            where=str(path),
            key="cell",
        )
    raise UserError(
        f"{record.cell_id[:12]!r} is not the hash of this cell ({hashed[:12]}): the record was "
        "changed after it was written",
        where=str(path),
        key="cell_id",
    )


def _check_forms(record: Record, path: Path) -> None:
    """Texts that others compute with, or make names of directories of, are what they must be."""
    for key, value in (("started", record.started), ("ended", record.ended or record.started)):
        try:
            known = datetime.fromisoformat(value).tzinfo is not None
        except ValueError:
            known = False
        if not known:
            raise UserError(
                f"{value[:40]!r} is no moment in ISO 8601 with its time zone",
                where=str(path),
                key=key,
            )
    if not re.fullmatch("[0-9a-f]{8,64}", record.stack_id):
        raise UserError(
            f"{record.stack_id[:40]!r} is no hash, in hexadecimal", where=str(path), key="stack_id"
        )
