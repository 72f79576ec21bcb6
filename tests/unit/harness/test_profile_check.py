"""Typos in a profile of the user's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from harness.preflight import profile_check
from launch.cells import accelerate_profile
from matrices.cell import Adapter, Cell, Data, Train
from matrices.errors import UserError


def cell(kind: str, content: dict[str, Any]) -> Cell:
    return Cell(
        method="lora",
        adapter=Adapter(),
        data=Data(),
        train=Train(),
        parallelism=kind,  # type: ignore[arg-type]
        devices=2,
        profile=content,
    )


def shipped(kind: str) -> dict[str, Any]:
    bare = Cell(parallelism=kind, devices=2)  # type: ignore[arg-type]
    return copy.deepcopy(accelerate_profile.content(bare))


@pytest.mark.parametrize("kind", accelerate_profile.shipped_profiles())
def test_the_shipped_ones_have_none(kind: str) -> None:
    profile_check.check(cell(kind, shipped(kind)))


def put(content: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    *sections, name = place.split("/")
    inner = content
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[name] = value
    return content


FILE = "deepspeed_config/deepspeed_config_file"
TYPOS = [
    ("ddp", "num_proceses", 2, "the profile has no 'num_proceses'; did you mean 'num_processes'"),
    (
        "fsdp",
        "fsdp_config/fsdp_offload_prams",
        True,
        "fsdp_config has no 'fsdp_offload_prams'; did you mean 'fsdp_offload_params'",
    ),
    ("fsdp", "dynamo_config/dynamo_backnd", "no", "did you mean 'dynamo_backend'"),
    ("zero2", "deepspeed_config/zero_stag", 2, "deepspeed_config has no 'zero_stag'; did you mean"),
    ("zero2", f"{FILE}/gradient_cliping", 1.0, "the DeepSpeed file has no 'gradient_cliping'; did"),
    (
        "zero3",
        f"{FILE}/zero_optimization/reduce_buckt_size",
        5,
        "zero_optimization has no 'reduce_buckt_size'; did you mean 'reduce_bucket_size'",
    ),
    (
        "zero3-offload",
        f"{FILE}/zero_optimization/offload_param/pin_memry",
        True,
        "zero_optimization.offload_param has no 'pin_memry'; did you mean 'pin_memory'",
    ),
    (
        "zero3",
        f"{FILE}/zero_optimization/reduce_bucket_size",
        "many",
        "DeepSpeed refuses zero_optimization.reduce_bucket_size: ",
    ),
    ("zero1", "mixed_precision", "bf16", "accelerate refuses mixed_precision beside a deepspeed"),
    ("zero1", "deepspeed_config/gradient_clipping", 1.0, "accelerate refuses gradient_clipping"),
    ("ddp", "fsdp_config", "yes", "fsdp_config of the profile is a section, not 'yes'"),
]


@pytest.mark.parametrize(("kind", "place", "value", "said"), TYPOS)
def test_each_is_one_line(kind: str, place: str, value: Any, said: str) -> None:
    with pytest.raises(UserError) as raised:
        profile_check.check(cell(kind, put(shipped(kind), place, value)))
    assert said in str(raised.value)
    assert str(raised.value).startswith("profile: ")
    assert "\n" not in str(raised.value)


def test_names_that_accelerate_completes_are_none() -> None:
    content = {"distributed_type": "FSDP", "fsdp_config": {"version": "2", "fsdp_version": "2"}}
    profile_check.check(cell("fsdp", content))


@pytest.mark.parametrize("name", ["reduce_bucket_size", "stage3_prefetch_bucket_size"])
def test_what_is_left_to_transformers_is_not_refused(name: str) -> None:
    content = put(shipped("zero3"), f"{FILE}/zero_optimization/{name}", "auto")
    profile_check.check(cell("zero3", content))
