"""Every optimizer a cell may name: transformers makes it, and verification knows it from others."""

from __future__ import annotations

import functools
from typing import Any, get_args

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from transformers import Adafactor, Trainer, TrainingArguments

from harness import device
from harness.models.mismatch import VerificationError
from harness.verify.verify import OPTIMIZERS, verify_optimizer
from matrices.cell import Optimizer

NAMES = get_args(Optimizer)


@functools.cache
def arguments() -> TrainingArguments:
    return TrainingArguments(output_dir="unused", use_cpu=True, report_to=[])


@functools.cache
def as_the_trainer_does(name: str) -> Any:
    settings = arguments()
    settings.optim = TrainingArguments(output_dir="unused", optim=name, use_cpu=True).optim
    kind, keywords = Trainer.get_optimizer_cls_and_kwargs(settings)
    layer = nn.Linear(64, 64)
    return kind(layer.parameters(), **keywords)


def test_every_name_is_known() -> None:
    assert set(OPTIMIZERS) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_what_the_trainer_makes_is_what_the_name_says(name: str) -> None:
    optimizer = as_the_trainer_does(name)
    found, substitutions = verify_optimizer(optimizer, name)
    libraries = {"sgd": "torch", "adafactor": "transformers"}
    default = "torch" if name.startswith("adamw_torch") else "bitsandbytes"
    library = libraries.get(name, default)
    assert found == f"{library}.{type(optimizer).__name__}"
    if name.startswith("paged") and not device.has_cuda():
        assert len(substitutions) == 1
        assert name in substitutions[0]
        assert "not paged" in substitutions[0]
    else:
        assert substitutions == []


@pytest.mark.parametrize("made", NAMES)
@pytest.mark.parametrize("wanted", NAMES)
def test_another_optimizer_does_not_pass(made: str, wanted: str) -> None:
    """But for the two names of one 8-bit AdamW."""
    same = {"adamw_8bit", "adamw_bnb_8bit"}
    if made == wanted or {made, wanted} == same:
        verify_optimizer(as_the_trainer_does(made), wanted)
        return
    with pytest.raises(VerificationError):
        verify_optimizer(as_the_trainer_does(made), wanted)


def test_lookalikes_do_not_pass() -> None:
    """The same class name from another library, and other bits."""
    weights = [nn.Parameter(torch.zeros(8))]
    lookalikes = {
        "adamw_torch": bnb.optim.AdamW(weights),
        "sgd": bnb.optim.SGD(weights, lr=0.1, momentum=0.9),
        "adamw_8bit": torch.optim.AdamW(weights),
        "adafactor": torch.optim.Adafactor(weights),
        "lion_8bit": bnb.optim.Lion(weights, optim_bits=32),
        "paged_adamw_32bit": bnb.optim.AdamW(weights, optim_bits=32),
    }
    for name, optimizer in lookalikes.items():
        with pytest.raises(VerificationError, match="optimizer"):
            verify_optimizer(optimizer, name)
    assert verify_optimizer(Adafactor(weights, lr=0.1, relative_step=False), "adafactor")


def test_accelerates_wrapper_is_looked_through() -> None:
    class Wrapped:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(8))], lr=0.1)

    assert verify_optimizer(Wrapped(), "sgd") == ("torch.SGD", [])
