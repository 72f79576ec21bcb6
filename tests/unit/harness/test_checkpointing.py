"""Gradient checkpointing is looked at, and seen to happen: each layer computes twice, or fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from harness.models.mismatch import VerificationError
from harness.ranks.process_group import substitutions
from harness.verify.checkpointing import Recomputation, verify, verify_recomputation
from matrices.cell import Adapter, Cell, Data, Train


def full(**train: Any) -> Cell:
    return Cell(method="full", train=Train(**train), data=Data())


PLAIN, CHECKPOINTED = full(), full(gradient_checkpointing=True)
REENTRANT = full(gradient_checkpointing=True, use_reentrant=True)


def model(path: Path, use_reentrant: bool | None) -> Any:
    """The tiny model in training; checkpointed unless `use_reentrant` is none."""
    loaded = AutoModelForCausalLM.from_pretrained(path).train()
    if use_reentrant is not None:
        loaded.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    return loaded


def recomputed(loaded: Any) -> Recomputation:
    """What is seen in one forward and backward."""
    seen = Recomputation(loaded)
    loss = loaded(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.float().sum()
    seen.backward = True
    loss.backward()
    return seen


@pytest.mark.parametrize(
    ("cell", "use_reentrant"), [(PLAIN, None), (CHECKPOINTED, False), (REENTRANT, True)]
)
def test_what_the_cell_says_is_what_happens(
    tiny_llama: Path, cell: Cell, use_reentrant: bool | None
) -> None:
    loaded = model(tiny_llama, use_reentrant)
    verify(loaded, cell)
    seen = recomputed(loaded)
    assert len(seen.layers) == 3
    assert len(seen.recomputed) == (0 if use_reentrant is None else 3)
    verify_recomputation(seen, cell)


@pytest.mark.parametrize(
    ("cell", "use_reentrant", "said"),
    [
        (CHECKPOINTED, None, "gradient_checkpointing: the cell says True, loaded is False"),
        (PLAIN, False, "gradient_checkpointing: the cell says False, loaded is True"),
        (CHECKPOINTED, True, "use_reentrant of model.layers.0: the cell says False"),
        (REENTRANT, False, "use_reentrant of model.layers.0: the cell says True"),
    ],
)
def test_another_checkpointing_is_found(
    tiny_llama: Path, cell: Cell, use_reentrant: bool | None, said: str
) -> None:
    with pytest.raises(VerificationError, match=said):
        verify(model(tiny_llama, use_reentrant), cell)


def test_a_layer_that_keeps_its_activations_is_found(tiny_llama: Path) -> None:
    loaded = model(tiny_llama, use_reentrant=False)
    loaded.model.layers[1].gradient_checkpointing = False
    with pytest.raises(VerificationError, match=r"of model\.layers\.1: the cell says True"):
        verify(loaded, CHECKPOINTED)
    with pytest.raises(VerificationError, match="2 of 3 layers computed again"):
        verify_recomputation(recomputed(loaded), CHECKPOINTED)
    with pytest.raises(VerificationError, match="3 of 3 layers computed again"):
        verify_recomputation(recomputed(model(tiny_llama, use_reentrant=True)), PLAIN)


def test_the_record_says_where_trl_chose_another_checkpointing() -> None:
    lora = CHECKPOINTED.model_copy(
        update={"method": "lora", "adapter": Adapter(), "parallelism": "zero3", "devices": 2}
    )
    assert any(said.startswith("use_reentrant false") for said in substitutions(lora))
    assert lora.train is not None
    asked = lora.model_copy(update={"train": REENTRANT.train})
    for cell in (asked, lora.model_copy(update={"parallelism": "zero2"})):
        assert not any("use_reentrant" in said for said in substitutions(cell))
