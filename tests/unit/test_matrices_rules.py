"""Which cells are refused where; that the libraries agree is shown in tests/integration."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from matrices.catalogue.gpus import gpu
from matrices.cell import Adapter, Cell, Data, Model, Quantization, Train
from matrices.expand import expand
from matrices.load import load, shipped
from matrices.rules.machine import Machine
from matrices.rules.parallelism import PARALLEL_RULES, PARALLEL_RUN_RULES
from matrices.rules.verdicts import PREDICTION_RULES, RULES, prediction_refusals, refusals

CPU = Machine(has_gpu=False)
AMPERE = Machine(True, 8.6, {"flash-attn": "2.8.3"})
TURING = Machine(True, 7.5, {"flash-attn": "2.8.3"})
BARE_GPU = Machine(True, 8.6)
KERNELS = Machine(True, 8.6, {"kernels": "0.18.2"})


def cell(method: str = "lora", **given: Any) -> Cell:
    """A cell from dotted settings, `model__compute_dtype="fp16"`."""
    sections: dict[str, dict[str, Any]] = {}
    top = {key: value for key, value in given.items() if "__" not in key}
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
        **top,
    )


def names(refused: Cell, machine: Machine) -> list[str]:
    return [refusal.rule for refusal in refusals(refused, machine)]


FLASH = {"model__attn_implementation": "flash_attention_2"}
FP16 = {"model__compute_dtype": "fp16"}
REFUSED = [
    (
        cell(train__sft_config={"skip_memory_metrics": False}),
        CPU,
        "memory-metrics-reset-meters",
        "can be predicted and not run",
    ),
    (cell(model__revision="v1"), CPU, "hub-settings-need-hub", "model.revision has no effect"),
    (
        cell(model__name="/m", model__fingerprint="0" * 64, data__split="test", data__config="en"),
        CPU,
        "hub-settings-need-hub",
        "data.config and data.split have no effect",
    ),
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
        "learning_rate (write train.learning_rate), output_dir (tunebench decides where files go)",
    ),
    (
        cell("full", train__sft_config={"accelerator_config": {"split_batches": True}}),
        CPU,
        "sft-config-contradicts",
        "accelerator_config.split_batches (split_batches would divide train.micro_batch_size)",
    ),
    (
        cell("full", train__sft_config={"save_steps": 5, "load_best_model_at_end": True}),
        CPU,
        "sft-config-contradicts",
        "save_steps (nothing is saved during training",
    ),
    *(
        (cell(method, **given), CPU, "arguments-have-effect", reason)
        for method, given, reason in (
            ("full", {"train__sft_config": {"tf32": True}}, "tf32 (only with a GPU)"),
            (
                "full",
                {"train__sft_config": {"adam_beta1": 0.8}, "train__optimizer": "adafactor"},
                "adam_beta1 (only with optimizers with betas)",
            ),
            (
                "full",
                {"train__sft_config": {"adam_epsilon": 0.8}, "train__optimizer": "lion_8bit"},
                "adam_epsilon (only with the AdamW optimizers)",
            ),
            ("lora", {"train__sft_config": {"truncation_mode": "keep_end"}}, "packing false"),
            ("lora", {"train__sft_config": {"dataloader_prefetch_factor": 2}}, "above 0"),
            (
                "lora",
                {"train__sft_config": {"average_tokens_across_devices": False}},
                "average_tokens_across_devices (only with several ranks)",
            ),
            ("lora", {"train__sft_config": {"ddp_bucket_cap_mb": 9}}, "only with parallelism ddp"),
            (
                "lora",
                {"train__sft_config": {"accelerator_config": {"even_batches": False}}},
                "accelerator_config.even_batches (only with several ranks)",
            ),
            ("lora", {"adapter__lora_config": {"layers_pattern": "h"}}, "layers_to_transform"),
        )
    ),
    (
        cell("lora", adapter__lora_config={"init_lora_weights": "eva"}),
        CPU,
        "adapter-starts-from-weights",
        "init_lora_weights eva: its initialisation needs",
    ),
    (
        cell("lora", train__sft_config={"use_liger_kernel": True}),
        AMPERE,
        "liger-needs-package",
        "liger-kernel, which is not installed",
    ),
    (
        cell("qlora", adapter__lora_config={"r": 8, "task_type": "X"}),
        CPU,
        "lora-config-contradicts",
        "r (write adapter.rank), task_type (tunebench sets it)",
    ),
    (
        cell("lora", model__name="llama-3.1-8b"),
        CPU,
        "model-needs-weights",
        "name it meta-llama/Llama-3.1-8B to run it",
    ),
    (cell("lora", model__name="gemma-3-4b"), CPU, "model-needs-weights", "only predicted"),
    (
        cell("lora", model__name="tiny", model__config="/x/config.json"),
        CPU,
        "model-needs-weights",
        "give model.name a hub id or a local directory",
    ),
    (
        cell("lora", model__config_overrides={"vocab_size": 1}),
        CPU,
        "model-needs-weights",
        "leave them out to run it",
    ),
    # However short the data: memory is measured on sequences of max_length.
    (
        cell("lora", model__name="gpt2", data__max_length=4096),
        CPU,
        "positions-end-in-table",
        "the model has 1024 positions, a table that ends there; shorten the sequences",
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
    # Those about several devices have a file of their own.
    parallel = {*PARALLEL_RULES, *PARALLEL_RUN_RULES}
    assert {rule for _, _, rule, _ in REFUSED} == {
        rule.__name__.replace("_", "-") for rule in RULES if rule not in parallel
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
        (cell("lora", adapter__lora_config={"init_lora_weights": "pissa_niter_4"}), CPU),
        (cell("full", train__sft_config={"adam_beta1": 0.8, "adam_epsilon": 1e-6}), CPU),
        (cell("full", train__sft_config={"tf32": True}), AMPERE),
        (cell("full", train__sft_config={"of_a_newer_release": True}), CPU),
        (cell("full", train__sft_config={"accelerator_config": {"non_blocking": True}}), AMPERE),
        (cell("lora", adapter__target_modules=("q_proj",)), CPU),
        (cell("lora", model__name="meta-llama/Llama-2-7b-hf"), CPU),
        (cell("lora", model__name="gpt2"), CPU),  # a hub id as well
        (cell("lora", model__name="/a/llama-3.1-8b", model__fingerprint="f"), CPU),
        (cell("lora", model__name="someone/something"), CPU),
        # Rotary positions go on.
        (cell("lora", data__max_length=10**5), CPU),
    ],
)
def test_what_the_libraries_run_is_not_refused(runs: Cell, machine: Machine) -> None:
    assert names(runs, machine) == []


@pytest.mark.parametrize("name", shipped())
@pytest.mark.parametrize("machine", [CPU, AMPERE, TURING, BARE_GPU])
def test_no_shipped_cell_is_refused(name: str, machine: Machine) -> None:
    machine = dataclasses.replace(machine, packages={**machine.packages, "deepspeed": "0.19.8"})
    assert [
        names(found, machine) for found in expand(load(name)).cells if names(found, machine)
    ] == []


GPT2 = {"model__name": "gpt2"}
SHARDED = {"parallelism": "fsdp", "devices": 2}
UNPREDICTABLE = [
    (
        cell("lora", **GPT2, model__config_overrides={"hidden_size": 8}),
        "config-must-be-complete",
        "calls it 'n_embd'",
    ),
    (
        cell("lora", model__name="x", model__config="/nowhere/config.json"),
        "config-must-be-complete",
        "/nowhere/config.json: cannot be read",
    ),
    (
        cell("lora", **GPT2, data__max_length=2048),
        "sequence-needs-positions",
        "the model has 1024 positions; shorten the sequences, or extend the model with "
        "config_overrides: {n_positions: 2048}",
    ),
    (
        cell("full", model__name="llama-2-7b", data__max_length=4097),
        "sequence-needs-positions",
        "{max_position_embeddings: 4097}",
    ),
    (cell("qlora", **SHARDED), "sharding-needs-quant-storage", "use quant_storage bf16"),
    (
        cell(
            "qlora",
            **SHARDED | {"parallelism": "fsdp1"},
            quantization__quant_storage="fp16",
            quantization__kbit_preparation=False,
        ),
        "sharding-needs-quant-storage",
        "use quant_storage bf16",
    ),
    (
        cell("full", parallelism="fsdp", devices=577),
        "shards-must-not-be-empty",
        "577 devices cannot share a layer whose hidden_size is 576",
    ),
    (cell("full", **FP16), "fp16-gradient-scaling", "weight_dtype fp32"),
    (
        cell("full", **FLASH, model__weight_dtype="fp32", model__compute_dtype="fp32"),
        "flash-attention-needs-half",
        "",
    ),
    (cell("lora", devices=2), "single-is-one-device", ""),
    (cell("lora", adapter__target_modules=("lm_head",)), "head-takes-no-adapter", ""),
]


@pytest.mark.parametrize(("refused", "rule", "reason"), UNPREDICTABLE)
def test_not_predicted_by_exactly_one_rule(refused: Cell, rule: str, reason: str) -> None:
    found = prediction_refusals(refused)
    assert [each.rule for each in found] == [rule]
    assert reason in found[0].reason
    assert "\n" not in found[0].reason


@pytest.mark.parametrize(
    "predicted",
    [
        cell("lora"),
        cell("base"),
        cell("full", **FLASH),  # whatever this machine has
        cell("lora", model__name="llama-3.1-8b", data__max_length=131072),
        cell("lora", **GPT2, data__max_length=1024),
        cell(
            "lora",
            **GPT2,
            data__max_length=2048,
            model__config_overrides={"n_positions": 2048},
        ),
        cell("lora", model__name="someone/something", data__max_length=10**6),
        cell("lora", train__steps=1, train__warmup_steps=1),  # nothing is timed
        cell("lora", **SHARDED),
        cell("qlora", **SHARDED, quantization__quant_storage="bf16"),
        # Nothing casts them, and FSDP2 keeps them apart.
        cell("qlora", **SHARDED, quantization__quant_storage="fp16", train__autocast=False),
        cell("qlora", parallelism="ddp", devices=2),
        cell("qlora", parallelism="zero2", devices=2, quantization__kbit_preparation=False),
        cell("qlora", parallelism="zero3", devices=2),
        cell("full", parallelism="fsdp", devices=576),
        cell("full", parallelism="ddp", devices=4096),
        cell("lora", model__config_overrides={"vocab_size": 1}),
    ],
)
def test_what_can_be_predicted_is_not_refused(predicted: Cell) -> None:
    assert prediction_refusals(predicted) == []


def test_a_prediction_asks_about_the_gpu_it_is_for() -> None:
    flash = cell("lora", **FLASH)
    assert prediction_refusals(flash, gpu("a100-80gb")) == []
    assert "this one has 7.5" in prediction_refusals(flash, gpu("t4"))[0].reason
    assert prediction_refusals(flash, gpu("b200")) == []


def test_both_lists_hold_the_rules_of_every_place() -> None:
    assert len(set(PREDICTION_RULES)) == len(PREDICTION_RULES)
    shared = {rule.__name__ for rule in PREDICTION_RULES} & {rule.__name__ for rule in RULES}
    assert {"head_takes_no_adapter", "sft_config_contradicts"} <= shared
    assert not {"fp16_needs_gpu", "flash_attention_needs_package"} & shared
