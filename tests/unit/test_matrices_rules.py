"""Which cells are refused where; that the libraries agree is shown in tests/integration."""

from __future__ import annotations

from typing import Any

import pytest

from matrices.cell import Adapter, Cell, Data, Model, Quantization, Train
from matrices.expand import expand
from matrices.load import load, shipped
from matrices.rules import RULES, Machine, refusals

CPU = Machine(has_gpu=False)
AMPERE = Machine(True, 8.6, {"flash-attn": "2.8.3"})
TURING = Machine(True, 7.5, {"flash-attn": "2.8.3"})
BARE_GPU = Machine(True, 8.6)
KERNELS = Machine(True, 8.6, {"kernels": "0.18.2"})


def cell(method: str = "lora", **given: Any) -> Cell:
    """A cell from dotted settings, `model__compute_dtype="fp16"`."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in given.items():
        section, _, leaf = key.partition("__")
        sections.setdefault(section, {})[leaf] = value
    trained = method != "base"
    return Cell(
        method=method,
        model=Model(**sections.get("model", {})),
        quantization=Quantization(**sections.get("quantization", {}))
        if method == "qlora"
        else None,
        adapter=Adapter(**sections.get("adapter", {})) if method in ("lora", "qlora") else None,
        data=Data(**sections.get("data", {})) if trained else None,
        train=Train(**sections.get("train", {})) if trained else None,
    )


def names(refused: Cell, machine: Machine) -> list[str]:
    return [refusal.rule for refusal in refusals(refused, machine)]


FLASH = {"model__attn_implementation": "flash_attention_2"}
FP16 = {"model__compute_dtype": "fp16"}
REFUSED = [
    (cell("lora", **FP16), CPU, "fp16-needs-gpu", "accelerate"),
    (cell("full", **FP16, model__weight_dtype="fp32"), CPU, "fp16-needs-gpu", "bf16"),
    (cell("qlora", **FP16), CPU, "fp16-needs-gpu", "autocast"),
    (
        cell("full", **FP16, model__weight_dtype="fp16"),
        AMPERE,
        "fp16-gradient-scaling",
        "Attempting to unscale FP16 gradients",
    ),
    (cell("full", **FP16), AMPERE, "fp16-gradient-scaling", "weight_dtype fp32"),
    (cell("qlora", **FP16), AMPERE, "fp16-gradient-scaling", "TRL keeps the adapters"),
    (cell("lora", **FLASH), Machine(False, None, AMPERE.packages), "flash-attention-needs-gpu", ""),
    (cell("base", **FLASH), Machine(False, None, AMPERE.packages), "flash-attention-needs-gpu", ""),
    (cell("lora", **FLASH), TURING, "flash-attention-needs-gpu", "this one has 7.5"),
    (cell("lora", **FLASH), BARE_GPU, "flash-attention-needs-package", "neither is installed"),
    (
        cell("lora", **FLASH, model__weight_dtype="fp32", model__compute_dtype="fp32"),
        AMPERE,
        "flash-attention-needs-half",
        "only supports fp16 and bf16",
    ),
    (
        cell("lora", **FLASH, model__weight_dtype="fp32", train__autocast=False),
        AMPERE,
        "flash-attention-needs-half",
        "",
    ),
    (cell("base", **FLASH, model__weight_dtype="fp32"), AMPERE, "flash-attention-needs-half", ""),
    (
        cell("lora", data__format="text", data__completion_only_loss=True),
        CPU,
        "completion-loss-needs-completions",
        "TRL would take the loss of every token",
    ),
    (
        cell("lora", train__steps=4, train__warmup_steps=4),
        CPU,
        "steps-left-to-time",
        "warmup_steps is 4 and steps is 4",
    ),
    (
        cell("lora", train__steps=9, train__timing_warmup_steps=9),
        CPU,
        "steps-left-to-time",
        "timing_warmup_steps is 9 and steps is 9",
    ),
    (
        cell("lora", train__lr_scheduler_type="polynomial", train__learning_rate=1e-7),
        CPU,
        "polynomial-needs-higher-rate",
        "1e-07",
    ),
    (
        cell(
            "lora",
            train__lr_scheduler_type="polynomial",
            train__learning_rate=1e-4,
            train__sft_config={"lr_scheduler_kwargs": {"lr_end": 1e-3}},
        ),
        CPU,
        "polynomial-needs-higher-rate",
        "0.001",
    ),
    (
        cell("lora", adapter__target_modules=("q_proj", "lm_head")),
        CPU,
        "head-takes-no-adapter",
        "TRL refuses",
    ),
    (
        cell("full", train__sft_config={"learning_rate": 1.0, "output_dir": "x"}),
        CPU,
        "sft-config-contradicts",
        "learning_rate (write train.learning_rate), output_dir (tunebench sets it)",
    ),
    (
        cell("qlora", adapter__lora_config={"r": 8, "task_type": "X"}),
        CPU,
        "lora-config-contradicts",
        "r (write adapter.rank), task_type (tunebench sets it)",
    ),
]


@pytest.mark.parametrize(("refused", "machine", "rule", "reason"), REFUSED)
def test_refused_by_exactly_one_rule(
    refused: Cell, machine: Machine, rule: str, reason: str
) -> None:
    assert names(refused, machine) == [rule]
    assert reason in refusals(refused, machine)[0].reason
    assert "\n" not in refusals(refused, machine)[0].reason


def test_every_rule_has_a_cell_it_refuses() -> None:
    assert {rule for _, _, rule, _ in REFUSED} == {
        rule.__name__.replace("_", "-") for rule in RULES
    }


@pytest.mark.parametrize(
    ("runs", "machine"),
    [
        (cell("lora"), CPU),
        (cell("base", **FP16), CPU),  # scoring turns no autocast on
        (cell("qlora", **FP16, train__autocast=False), CPU),
        (cell("lora", **FP16), AMPERE),  # PEFT keeps the adapters in fp32
        (cell("full", **FP16, model__weight_dtype="fp32"), AMPERE),
        (cell("qlora", **FP16, train__autocast=False), AMPERE),
        (cell("full", model__weight_dtype="fp16", model__compute_dtype="fp32"), CPU),
        (cell("lora", model__compute_dtype="bf16"), TURING),  # emulated, slow, but runs
        (cell("lora", **FLASH), AMPERE),
        (cell("lora", **FLASH), KERNELS),
        (cell("lora", **FLASH, model__compute_dtype="fp32"), AMPERE),
        (cell("lora", **FLASH, model__weight_dtype="fp32"), AMPERE),  # under autocast
        *((cell("qlora", quantization__quant_storage=s), CPU) for s in ("bf16", "fp16", "fp32")),
        *((cell("lora", data__packing_strategy=s), CPU) for s in ("bfd", "bfd_split")),
        *((cell("lora", train__optimizer=o), CPU) for o in ("paged_adamw_8bit", "lion_8bit")),
        (cell("lora", data__format="chat", data__completion_only_loss=True), CPU),
        (cell("lora", data__completion_only_loss=True), CPU),  # format auto: told from columns
        (cell("lora", train__steps=4, train__warmup_steps=4, train__timing_warmup_steps=1), CPU),
        (cell("lora", train__steps=1, train__warmup_steps=0), CPU),
        (cell("lora", train__lr_scheduler_type="polynomial"), CPU),
        (cell("lora", train__sft_config={"neftune_noise_alpha": 5}), CPU),
        (cell("lora", adapter__lora_config={"use_dora": True}), CPU),
        (cell("lora", adapter__target_modules=("q_proj",)), CPU),
    ],
)
def test_what_the_libraries_run_is_not_refused(runs: Cell, machine: Machine) -> None:
    assert names(runs, machine) == []


@pytest.mark.parametrize("name", shipped())
@pytest.mark.parametrize("machine", [CPU, AMPERE, TURING, BARE_GPU])
def test_no_shipped_cell_is_refused(name: str, machine: Machine) -> None:
    assert [
        names(found, machine) for found in expand(load(name)).cells if names(found, machine)
    ] == []
