"""What a cell is: one fully resolved configuration, and its identity.

Every leaf below is a setting of the matrix language under its dotted name (`train.steps`), or its
bare name where that is unique (`steps`). A setting added here with a default keeps every old
identity, because only what differs from the default is hashed; so a default never changes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import to_jsonable_python

from matrices.parallelism import STRATEGIES, Strategy
from matrices.parallelism import Parallelism as Parallelism

Method = Literal["base", "full", "lora", "qlora"]
Dtype = Literal["bf16", "fp16", "fp32"]
QuantStorage = Literal["uint8", "bf16", "fp16", "fp32"]
TargetSet = Literal["qv", "attention", "mlp", "all-linear"]

# transformers' names (`TrainingArguments.optim`) that the harness has verified to be what runs.
Optimizer = Literal[
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_8bit",
    "adamw_bnb_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "lion_8bit",
    "lion_32bit",
    "paged_lion_8bit",
    "paged_lion_32bit",
    "adafactor",
    "sgd",
]
Scheduler = Literal[
    "linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"
]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Model(Section):
    """The base model and the dtypes it is held and computed in."""

    name: str = Field(
        "smollm2-135m",
        description="packaged model, local directory, hub id, or for predictions the name of an "
        "architecture",
        min_length=1,
    )
    revision: str | None = Field(None, description="hub branch, tag or commit; none means main")
    config: str | None = Field(
        None,
        description="a local config.json: an architecture without weights, which can be predicted "
        "and not run",
    )
    config_overrides: dict[str, Any] = Field(
        default_factory=dict,
        description="entries of the model's config.json to replace (vocab_size: 32001), for "
        "predictions",
    )
    fingerprint: str | None = Field(
        None,
        description="content hash of a local directory or config.json, filled in when the matrix "
        "is read",
    )
    weight_dtype: Dtype = Field("bf16", description="dtype the weights are loaded in")
    compute_dtype: Dtype = Field(
        "bf16",
        description="autocast dtype of training and bnb_4bit_compute_dtype; fp32 is no autocast",
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        "sdpa", description="transformers' attn_implementation"
    )
    trust_remote_code: bool = Field(False, description="run code that the hub model brings")


class Quantization(Section):
    """bitsandbytes 4-bit storage of the frozen base (qlora only)."""

    quant_type: Literal["nf4", "fp4"] = Field("nf4", description="bnb_4bit_quant_type")
    double_quant: bool = Field(False, description="bnb_4bit_use_double_quant")
    quant_storage: QuantStorage = Field("uint8", description="bnb_4bit_quant_storage")
    kbit_preparation: bool = Field(
        True, description="run peft.prepare_model_for_kbit_training (norms and head to fp32)"
    )


class Adapter(Section):
    """PEFT's LoraConfig (lora and qlora only)."""

    rank: int = Field(16, ge=1, description="LoRA r")
    alpha: int | None = Field(None, ge=1, description="lora_alpha; none means 2 x rank")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="lora_dropout")
    target_modules: TargetSet | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        "attention",
        description="a named set, resolved for the model's architecture, or a list of its modules",
    )
    lora_config: dict[str, Any] = Field(
        default_factory=dict, description="further LoraConfig arguments, passed through unchanged"
    )


class Data(Section):
    """What is trained on."""

    source: str = Field(
        "python-reference",
        description="packaged data, local .json/.jsonl/.csv/.parquet file, or hub dataset id",
        min_length=1,
    )
    revision: str | None = Field(None, description="hub revision of the dataset")
    config: str | None = Field(None, description="hub configuration name of the dataset")
    split: str = Field("train", description="split of a hub dataset")
    fingerprint: str | None = Field(
        None, description="content hash of a local file, filled in when the matrix is read"
    )
    format: Literal["auto", "text", "prompt-completion", "chat", "sharegpt", "alpaca"] = Field(
        "auto", description="auto: the column that is named, else told from those that are there"
    )
    text_column: str = Field("text", description="column of plain text")
    prompt_column: str = Field("prompt", description="column of prompts")
    completion_column: str = Field("completion", description="column of completions")
    messages_column: str = Field("messages", description="column of chat messages")
    completion_only_loss: bool = Field(
        False, description="no loss on prompt tokens (prompt-completion) or user turns (chat)"
    )
    max_samples: int | None = Field(None, ge=1, description="train on the first N rows only")
    max_length: int = Field(256, ge=2, description="longest sequence, in tokens")
    packing: bool = Field(True, description="fill every sequence up to max_length")
    packing_strategy: Literal["wrapped", "bfd", "bfd_split"] = Field(
        "wrapped",
        description="TRL's packing_strategy; wrapped fills rows across documents, which see each "
        "other; with bfd and bfd_split it depends on the model's attention whether they do "
        "(falcon's do), and the record says it (verified.documents_isolated)",
    )


class Train(Section):
    """The optimization, in transformers' terms."""

    steps: int = Field(40, ge=1, description="optimizer steps")
    warmup_steps: int = Field(
        4,
        ge=0,
        description="learning-rate warm-up steps; also the steps left out of every timing, "
        "unless timing_warmup_steps says otherwise",
    )
    timing_warmup_steps: int | None = Field(
        None, ge=0, description="steps left out of every timing; none means warmup_steps"
    )
    micro_batch_size: int = Field(2, ge=1, description="per_device_train_batch_size")
    gradient_accumulation_steps: int = Field(1, ge=1, description="micro batches per step")
    global_batch_size: int | None = Field(
        None,
        ge=1,
        description="samples per optimizer step over all devices; given, it sets "
        "gradient_accumulation_steps",
    )
    learning_rate: float = Field(2.0e-4, gt=0.0, description="peak learning rate")
    lr_scheduler_type: Scheduler = Field("linear", description="transformers' scheduler name")
    optimizer: Optimizer = Field("adamw_torch", description="transformers' optim name")
    weight_decay: float = Field(0.0, ge=0.0, description="decoupled weight decay")
    max_grad_norm: float = Field(1.0, ge=0.0, description="gradient clipping; 0 is none")
    gradient_checkpointing: bool = Field(False, description="recompute activations in backward")
    use_reentrant: bool = Field(
        False,
        description="torch's reentrant checkpointing; TRL makes it true for adapters under ZeRO-3",
    )
    autocast: bool = Field(
        True, description="autocast to compute_dtype; off, each product runs in its weights' dtype"
    )
    sft_config: dict[str, Any] = Field(
        default_factory=dict, description="further TRL SFTConfig arguments, passed through"
    )


class Evaluate(Section):
    """The lm-eval recipe; base models are scored by the same one."""

    tasks: tuple[str, ...] = Field(
        ("python_reference_bpb", "python_reference_topic"), description="lm-eval task names"
    )
    include_path: str | None = Field(None, description="directory of further lm-eval task YAML")
    limit: int | None = Field(None, ge=1, description="first N documents of each task only")
    num_fewshot: int | None = Field(None, ge=0, description="none means the task's own")
    batch_size: int = Field(8, ge=1, description="lm-eval batch size")
    apply_chat_template: bool = Field(False, description="lm-eval --apply_chat_template")
    sample_prompts: tuple[str, ...] = Field(
        ("The with statement is used to", "A generator function"),
        description="prompts continued greedily, kept for reading, never scored",
    )


class Cell(Section):
    """One configuration. A section is none where it means nothing for the method.

    `method: base` trains nothing: the untouched model, or the quantized one when `quantization`
    is given, is loaded and scored.
    """

    method: Method = Field("lora", description="full, lora, qlora; base scores without training")
    model: Model = Field(default_factory=Model)
    quantization: Quantization | None = None
    adapter: Adapter | None = None
    data: Data | None = None
    train: Train | None = None
    evaluate: Evaluate = Field(default_factory=Evaluate)
    parallelism: Parallelism = Field("single", description="how a cell is spread over devices")
    devices: int = Field(1, ge=1, description="devices of one cell, over all of its machines")
    nodes: int = Field(1, ge=1, description="machines of one cell; they share out its devices")
    profile: dict[str, Any] = Field(
        default_factory=dict,
        description="an accelerate profile in place of the shipped one: in a matrix its path, in "
        "the cell its content",
    )
    seed: int = Field(0, ge=0, description="seed of data order, dropout and adapter init")

    @property
    def cell_id(self) -> str:
        """sha256, hex, of the canonical cell: equal for equal configurations on any machine."""
        return hashlib.sha256(canonical_json(self).encode()).hexdigest()

    @property
    def strategy(self) -> Strategy:
        """The row of its parallelism."""
        return STRATEGIES[self.parallelism]

    @property
    def is_distributed(self) -> bool:
        """Whether it trains in ranks, processes that `accelerate launch` starts together."""
        return self.train is not None and self.strategy.is_distributed

    @property
    def ranks(self) -> int:
        """Processes that train it, each on its own share of a batch."""
        return self.devices if self.is_distributed else 1

    @property
    def devices_per_node(self) -> int:
        """Devices of it on each of its machines."""
        return max(1, self.devices // self.nodes)

    @property
    def ranks_per_node(self) -> int:
        """Processes of it on each of its machines."""
        return max(1, self.ranks // self.nodes)


SECTIONS: dict[str, type[Section]] = {
    "model": Model,
    "quantization": Quantization,
    "adapter": Adapter,
    "data": Data,
    "train": Train,
    "evaluate": Evaluate,
}

# Those that a cell may be without.
_OPTIONAL = [name for name in SECTIONS if Cell.model_fields[name].default is None]

# Settings whose content is known by a fingerprint beside them.
LOCAL_PATHS = {"model": ("name", "config"), "data": ("source",)}

# Settings that stand in no section.
TOP_LEVEL = tuple(name for name in Cell.model_fields if name not in SECTIONS)
_TOP_LEVEL_DEFAULTS = {
    name: Cell.model_fields[name].get_default(call_default_factory=True) for name in TOP_LEVEL
}


def canonical_json(cell: Cell) -> str:
    """Sorted JSON of what differs from the defaults; where a local path has a fingerprint, the
    content speaks and the path does not."""
    parts = [top_level_json(name, getattr(cell, name)) for name in TOP_LEVEL]
    parts += [section_json(name, getattr(cell, name)) for name in SECTIONS]
    return joined_json(parts)


def joined_json(parts: Iterable[str]) -> str:
    """The canonical JSON of a cell from that of its settings and sections, in any order."""
    return "{" + ",".join(sorted(filter(None, parts))) + "}"


def top_level_json(name: str, value: Any) -> str:
    """`"seed":1`, or nothing for the default."""
    if value == _TOP_LEVEL_DEFAULTS[name]:
        return ""
    text = str(value) if type(value) is int else _sorted_json(to_jsonable_python(value))
    return f'"{name}":{text}'


def section_json(name: str, section: Section | None) -> str:
    """`"model":{...}`; nothing for a section that is not there or is what it is by default."""
    if section is None:
        return ""
    plain = section.model_dump(mode="json", exclude_defaults=True)
    if plain.get("fingerprint"):
        for key in LOCAL_PATHS.get(name, ()):
            plain.pop(key, None)
    # A section that is there but all default must differ from one that is not there.
    return f'"{name}":{_sorted_json(plain)}' if plain or name in _OPTIONAL else ""


def _sorted_json(plain: Any) -> str:
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def split_unknown(plain: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A cell's plain form in two: the settings of this version, and those it has beside them."""
    known: dict[str, Any] = {}
    unknown: dict[str, Any] = {}
    for name, value in plain.items():
        if name not in Cell.model_fields:
            unknown[name] = value
        elif name in SECTIONS and isinstance(value, dict):
            fields = SECTIONS[name].model_fields
            known[name] = {leaf: value[leaf] for leaf in value if leaf in fields}
            if beside := {leaf: value[leaf] for leaf in value if leaf not in fields}:
                unknown[name] = beside
        else:
            known[name] = value
    return known, unknown


def flatten(cell: Cell) -> dict[str, Any]:
    """Dotted setting name to value, in declaration order; absent sections give no entry."""
    flat: dict[str, Any] = {name: getattr(cell, name) for name in TOP_LEVEL}
    for name in SECTIONS:
        section = getattr(cell, name)
        if section is not None:
            flat |= {
                f"{name}.{leaf}": getattr(section, leaf) for leaf in type(section).model_fields
            }
    return flat


def base_cells(cell: Cell) -> dict[str, Cell]:
    """The cells a trained cell is judged against: `untouched`, and `quantized` for qlora.

    They depend on nothing but the model, its storage and the evaluation recipe, so all cells of
    a sweep share a handful of them. Empty for a base cell or one that evaluates nothing.
    """
    if cell.method == "base" or not (cell.evaluate.tasks or cell.evaluate.sample_prompts):
        return {}
    # Without quantization nothing is computed under autocast when scoring, so the dtype of
    # training is no part of the base.
    plain_model = cell.model.model_copy(update={"compute_dtype": "bf16"})
    bases = {"untouched": Cell(method="base", model=plain_model, evaluate=cell.evaluate)}
    if cell.quantization is not None:
        quantization = cell.quantization.model_copy(update={"kbit_preparation": True})
        bases["quantized"] = Cell(
            method="base", model=cell.model, quantization=quantization, evaluate=cell.evaluate
        )
    return bases


def label(cell: Cell) -> str:
    """A short human name of a cell alone: `qlora nf4+dq r8 attention`. Not an identity; the cells
    of a sweep are told apart by `matrices.language.labels`."""
    words: list[str] = [cell.method]
    if cell.quantization is not None:
        words.append(
            cell.quantization.quant_type + ("+dq" if cell.quantization.double_quant else "")
        )
    if cell.adapter is not None:
        target = cell.adapter.target_modules
        text = target if isinstance(target, str) else ",".join(target)
        words += [f"r{cell.adapter.rank}", text if len(text) <= 40 else f"{text[:39]}…"]
    if cell.strategy.several_devices:
        words += [cell.parallelism, devices_text(cell)]
    return " ".join(words)


def devices_text(cell: Cell) -> str:
    """`x4`, or on several machines `2x2`: machines and the devices of each."""
    if cell.nodes == 1:
        return f"x{cell.devices}"
    return f"{cell.nodes}x{cell.devices // cell.nodes}"
