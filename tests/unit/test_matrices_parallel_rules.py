"""Cells on several devices: which are refused where, and what runs instead."""

from __future__ import annotations

from typing import Any

import pytest

from matrices.cell import Adapter, Cell, Data, Model, Quantization, Train
from matrices.rules.adapt import spread_over
from matrices.rules.machine import Machine
from matrices.rules.parallelism import (
    PARALLEL_PREDICTION_RULES,
    PARALLEL_RULES,
    PARALLEL_RUN_RULES,
    reentrant,
)
from matrices.rules.verdicts import prediction_refusals, refusals

DEEPSPEED = {"deepspeed": "0.19.8"}
CPU = Machine(False, None, DEEPSPEED, devices=2)
GPUS = Machine(True, 9.0, DEEPSPEED, devices=8)
FP32 = {"weight_dtype": "fp32", "compute_dtype": "fp32"}
CHECKPOINTED = {"gradient_checkpointing": True}


def spread(kind: str, method: str = "lora", **sections: Any) -> Cell:
    """A cell on two devices; `train={...}` and the like give settings of a section."""
    top = {"devices": 2} | {k: v for k, v in sections.items() if not isinstance(v, dict)}
    top |= {"profile": sections["profile"]} if "profile" in sections else {}

    def of(name: str) -> dict[str, Any]:
        found: dict[str, Any] = sections.get(name, {})
        return found

    stored = {"quant_storage": "bf16", "kbit_preparation": False} | of("quantization")
    return Cell(
        method=method,
        model=Model(**of("model")),
        quantization=Quantization(**stored) if method == "qlora" else None,
        adapter=Adapter() if method in ("lora", "qlora") else None,
        data=Data(),
        train=Train(**of("train")),
        parallelism=kind,
        **top,
    )


REFUSED = [
    (spread("single"), GPUS, "single-is-one-device", "devices to 1"),
    (spread("ddp", devices=3, nodes=2), Machine(True, nodes=2), "devices-divide-into-nodes", "3"),
    (spread("ddp", devices=3), CPU, "enough-devices", "has 2 usable processors"),
    (spread("ddp", devices=9), GPUS, "enough-devices", "has 8 GPUs"),
    (
        spread("ddp", devices=20, nodes=2),
        Machine(True, devices=8, nodes=4),
        "enough-devices",
        "10 devices on one machine",
    ),
    (spread("ddp", nodes=2), GPUS, "enough-machines", "--on slurm"),
    (spread("zero2"), Machine(True), "zero-needs-deepspeed", "pip install deepspeed"),
    (
        spread("ddp", train={"global_batch_size": 6}),
        CPU,
        "global-batch-divides",
        "2 samples on 2 devices make 4; use 4 or 8",
    ),
    (
        spread("ddp", train={"global_batch_size": 3}),
        CPU,
        "global-batch-divides",
        "make 4; use 4",
    ),
    (spread("fsdp1", devices=1), GPUS, "fsdp1-needs-two-devices", "NO_SHARD"),
    (spread("fsdp1"), CPU, "fsdp1-needs-gpus", "use fsdp, which is FSDP2"),
    (spread("device-map"), CPU, "device-map-needs-two-gpus", "has none"),
    (spread("device-map", devices=1), GPUS, "device-map-needs-two-gpus", "set devices to 2"),
    (
        spread("fsdp", profile={"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 1}}),
        CPU,
        "profile-matches-parallelism",
        "FSDP with fsdp_version 1, which is not parallelism fsdp;",
    ),
    (
        spread("zero3", profile={"distributed_type": "DEEPSPEED"}),
        CPU,
        "profile-matches-parallelism",
        "ZeRO stage 2",  # accelerate's default
    ),
    (
        spread("ddp", profile={"distributed_type": "MULTI_CPU"}),
        CPU,
        "profile-matches-parallelism",
        "MULTI_CPU",
    ),
    (
        spread("ddp", profile={"distributed_type": "MULTI_GPU", "mixed_precision": "fp16"}),
        CPU,
        "profile-matches-precision",
        "is fp16 and the cell's is bf16",
    ),
    *(
        (
            spread(kind, "qlora", quantization={"quant_storage": "uint8"}),
            GPUS,
            "sharding-needs-quant-storage",
            "use quant_storage bf16",
        )
        for kind in ("fsdp", "fsdp1")
    ),
    *(
        (
            spread(kind, "qlora", quantization={"quant_storage": "fp32"}),
            CPU,
            "sharding-needs-quant-storage",
            "which destroys 4-bit weights packed as fp32",
        )
        for kind in ("fsdp", "zero1", "zero2", "zero3")
    ),
    (
        spread("fsdp1", "qlora", quantization={"quant_storage": "fp16"}),
        GPUS,
        "sharding-needs-quant-storage",
        "one flat tensor",
    ),
    (
        spread("zero2", "full", model={"weight_dtype": "fp32"}),
        CPU,
        "deepspeed-casts-weights",
        "use weight_dtype bf16",
    ),
    (
        spread("fsdp1", "qlora", quantization={"kbit_preparation": True}),
        GPUS,
        "kbit-preparation-is-kept",
        "cannot flatten",
    ),
    *(
        (spread("fsdp", train={"optimizer": name}), CPU, "fsdp2-needs-torch-optimizer", name)
        for name in ("paged_adamw_8bit", "lion_32bit", "adafactor")
    ),
    *(
        (spread(kind, train={"optimizer": "adafactor"}), GPUS, "adafactor-needs-matrices", kind)
        for kind in ("fsdp1", "zero1", "zero3")
    ),
    *(
        (spread("zero3-offload", train={"optimizer": name}), GPUS, "offload-replaces-optimizer", "")
        for name in ("sgd", "paged_adamw_8bit", "lion_8bit")
    ),
    (
        spread("ddp", train=CHECKPOINTED | {"use_reentrant": True}),
        CPU,
        "ddp-marks-parameters-once",
        "ready only once",
    ),
    *(
        (spread("zero3", "full", model=model), CPU, "deepspeed-casts-weights", "reads all weights")
        for model in ({"compute_dtype": "fp32"}, {"weight_dtype": "fp16", "compute_dtype": "fp32"})
    ),
    *(
        (
            spread(kind, train={"lr_scheduler_type": "polynomial"}),
            CPU,
            "polynomial-needs-defaults",
            "has none",
        )
        for kind in ("zero1", "zero3-offload")
    ),
]


@pytest.mark.parametrize(("refused", "machine", "rule", "reason"), REFUSED)
def test_refused_by_exactly_one_rule(
    refused: Cell, machine: Machine, rule: str, reason: str
) -> None:
    found = refusals(refused, machine)
    assert [each.rule for each in found] == [rule]
    assert reason in found[0].reason
    assert "\n" not in found[0].reason


def test_every_rule_has_a_cell_it_refuses() -> None:
    rules = {rule.__name__.replace("_", "-") for rule in (*PARALLEL_RULES, *PARALLEL_RUN_RULES)}
    assert {rule for _, _, rule, _ in REFUSED} == rules


@pytest.mark.parametrize(
    ("kind", "machine"),
    [
        *((kind, CPU) for kind in ("ddp", "fsdp", "zero1", "zero2", "zero3")),
        *((kind, GPUS) for kind in ("ddp", "fsdp", "fsdp1", "zero1", "zero2", "zero3")),
    ],
)
def test_what_the_libraries_run_is_not_refused(kind: str, machine: Machine) -> None:
    for method in ("full", "lora", "qlora"):
        assert refusals(spread(kind, method), machine) == []
        plain = spread(kind, method, model=FP32, quantization={"quant_storage": "fp32"})
        assert refusals(plain, machine) == []


@pytest.mark.parametrize(
    ("runs", "machine"),
    [
        (spread("ddp", devices=16, nodes=2), Machine(True, devices=8, nodes=2)),
        (spread("ddp", devices=64, nodes=8), Machine(True, devices=None, nodes=None)),
        (spread("device-map"), GPUS),
        # One process of a kind is that kind: see test_rules_against_libraries.
        *((spread(kind, devices=1), CPU) for kind in ("ddp", "fsdp", "zero2", "zero3-offload")),
        *(
            (spread(kind, "qlora", quantization={"quant_storage": "uint8"}), CPU)
            for kind in ("ddp", "zero2", "zero3", "zero3-offload")
        ),
        # Nothing casts without mixed precision.
        (
            spread("fsdp", "qlora", model=FP32, quantization={"quant_storage": "fp16"}),
            CPU,
        ),
        (spread("ddp", "qlora", quantization={"kbit_preparation": True}), CPU),
        (spread("fsdp", "qlora", quantization={"kbit_preparation": True}), CPU),
        # DeepSpeed undoes it, which the record says.
        (spread("zero1", "qlora", quantization={"kbit_preparation": True}), CPU),
        (spread("zero3-offload", train={"optimizer": "sgd"}), CPU),  # nothing is exchanged there
        (spread("zero3-offload", train={"optimizer": "lion_32bit"}), GPUS),
        (spread("zero2", train={"optimizer": "paged_adamw_8bit"}), GPUS),
        (spread("fsdp1", train={"optimizer": "lion_8bit"}), GPUS),
        (spread("ddp", "full", train=CHECKPOINTED | {"use_reentrant": True}), CPU),
        (spread("zero3", "full", train=CHECKPOINTED), CPU),
        (spread("zero3", train=CHECKPOINTED | {"use_reentrant": True}), CPU),
        # Only what is not quantized is read by DeepSpeed's own way.
        (spread("zero3", "qlora", model={"compute_dtype": "fp32"}), CPU),
        (spread("zero2", "full", model={"compute_dtype": "fp32"}), CPU),
        (spread("fsdp", train={"lr_scheduler_type": "polynomial"}), CPU),
        # TRL makes it reentrant, which the record says.
        (spread("zero3", train=CHECKPOINTED), CPU),
        (
            spread(
                "ddp",
                train=CHECKPOINTED
                | {"use_reentrant": True, "sft_config": {"ddp_find_unused_parameters": False}},
            ),
            CPU,
        ),
        # DeepSpeed scales the gradients of its fp32 copies, FSDP trains in fp32.
        (spread("zero2", "full", model={"weight_dtype": "fp16", "compute_dtype": "fp16"}), GPUS),
        (spread("fsdp", "full", model={"compute_dtype": "fp16"}), GPUS),
        (
            spread(
                "ddp",
                profile={"distributed_type": "MULTI_GPU", "mixed_precision": "$mixed_precision"},
            ),
            CPU,
        ),
        (
            spread(
                "zero3",
                profile={
                    "distributed_type": "DEEPSPEED",
                    "deepspeed_config": {
                        "deepspeed_config_file": {"zero_optimization": {"stage": 3}}
                    },
                },
            ),
            CPU,
        ),
    ],
)
def test_no_more_is_refused_than_must_be(runs: Cell, machine: Machine) -> None:
    assert refusals(runs, machine) == []


def test_a_base_cell_needs_no_second_device() -> None:
    base = Cell(method="base", model=Model(), devices=4)
    assert "enough-devices" not in [each.rule for each in refusals(base, CPU)]


UNPREDICTABLE = [
    (spread("device-map"), "device-map-is-not-predicted", "other layers"),
    (
        spread("ddp", profile={"distributed_type": "MULTI_GPU"}),
        "own-profile-is-not-predicted",
        "the shipped ones",
    ),
]


@pytest.mark.parametrize(("refused", "rule", "reason"), UNPREDICTABLE)
def test_not_predicted(refused: Cell, rule: str, reason: str) -> None:
    [found] = prediction_refusals(refused)
    assert found.rule == rule
    assert reason in found.reason


def test_every_prediction_rule_has_a_cell() -> None:
    rules = {rule.__name__.replace("_", "-") for rule in PARALLEL_PREDICTION_RULES}
    assert {rule for _, rule, _ in UNPREDICTABLE} == rules


def test_more_devices_than_this_machine_has_are_predicted() -> None:
    assert prediction_refusals(spread("zero3", devices=512, nodes=64)) == []


@pytest.mark.parametrize(
    "way", ["ddp", "fsdp", "fsdp1", "zero1", "zero2", "zero3", "zero3-offload"]
)
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("optimizer", ["adamw_torch", "paged_adamw_8bit", "adafactor", "sgd"])
def test_a_cell_that_is_spread_is_not_refused(way: Any, method: str, optimizer: str) -> None:
    alone = spread(
        "single",
        method,
        devices=1,
        quantization={"quant_storage": "uint8", "kbit_preparation": True},
        train=CHECKPOINTED | {"optimizer": optimizer},
    )
    assert prediction_refusals(spread_over(alone, way, 4)) == []


def test_spreading_changes_no_more_than_it_must() -> None:
    alone = spread("single", "qlora", devices=1, quantization={"kbit_preparation": True})
    for way in ("ddp", "fsdp"):
        spreaded = spread_over(alone, way, 2)  # type: ignore[arg-type]
        assert spreaded == alone.model_copy(update={"parallelism": way, "devices": 2})


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        (spread("zero3", train=CHECKPOINTED), True),
        (spread("zero3-offload", "qlora", train=CHECKPOINTED), True),
        (spread("zero3", "full", train=CHECKPOINTED), False),
        (spread("zero2", train=CHECKPOINTED), False),
        (spread("zero2", train=CHECKPOINTED | {"use_reentrant": True}), True),
        (spread("zero3"), False),
    ],
)
def test_checkpointing_is_reentrant_as_trl_will_have_it(cell: Cell, expected: bool) -> None:
    assert reentrant(cell) is expected
