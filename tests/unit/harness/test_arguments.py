"""What was passed through, against the real SFTConfig, LoraConfig and optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from trl import SFTConfig

from harness.models.mismatch import VerificationError
from harness.train import TrainingSchedule, sft_config
from harness.verify.arguments import (
    check_sft,
    check_tokens,
    verify_optimizer_arguments,
    verify_passed_through,
)
from matrices.cell import Adapter, Cell, Data, Train
from matrices.errors import UserError


def cell(**arguments: Any) -> Cell:
    train = Train(sft_config=arguments)
    return Cell(method="lora", adapter=Adapter(), data=Data(), train=train)


def built(tmp_path: Path, **arguments: Any) -> SFTConfig:
    return sft_config(cell(**arguments), None, TrainingSchedule(2, 1e-4, prepared=True), tmp_path)


def test_what_was_passed_is_kept_beside_the_default(tmp_path: Path) -> None:
    asked = {
        "adam_beta1": 0.8,
        "neftune_noise_alpha": 5,
        "lr_scheduler_kwargs": {"lr_end": 0.0},
        "accelerator_config": {"non_blocking": True},
        "train_sampling_strategy": "sequential",
        "loss_type": "nll",
    }
    found = verify_passed_through(asked, built(tmp_path, **asked))
    assert {name: told.asked for name, told in found.items()} == asked
    assert (found["adam_beta1"].held, found["adam_beta1"].default) == (0.8, 0.9)
    assert found["accelerator_config"].held["non_blocking"] is True
    assert found["loss_type"].held == found["loss_type"].default == "nll"
    assert all(told.classified for told in found.values())


def test_what_peft_makes_of_it_is_the_same_thing() -> None:
    asked = {"exclude_modules": ["b", "a"], "kasa_config": {}, "rank_pattern": {"q": 2}}
    found = verify_passed_through(asked, LoraConfig(**asked))
    assert found["exclude_modules"].held == ["a", "b"]


def test_an_argument_that_is_read_as_another_fails(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match=r"'chunked_nll'.*holds 'nll'; that is its default"):
        verify_passed_through(
            {"loss_type": "chunked_nll"}, built(tmp_path, loss_type="chunked_nll")
        )
    with pytest.raises(VerificationError, match=r"adam_beta1 0.8 .* holds 0.9"):
        verify_passed_through({"adam_beta1": 0.8}, built(tmp_path))


def test_an_argument_of_a_newer_release_is_passed_and_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matrices.libraries import library_arguments

    monkeypatch.delitem(library_arguments.SFT_ARGUMENTS, "loss_type")
    found = verify_passed_through({"loss_type": "dft"}, built(tmp_path, loss_type="dft"))
    assert (found["loss_type"].held, found["loss_type"].classified) == ("dft", False)


def test_the_optimizer_has_what_was_passed() -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    adam = torch.optim.AdamW([parameter], betas=(0.8, 0.999), eps=1e-6)
    verify_optimizer_arguments({"adam_beta1": 0.8, "adam_epsilon": 1e-6}, adam)
    with pytest.raises(VerificationError, match=r"adam_beta2 0\.9 .* the optimizer has 0\.999"):
        verify_optimizer_arguments({"adam_beta2": 0.9}, adam)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"torch_empty_cache_steps": 0}, None),  # only on a GPU: a rule's
        ({"lr_scheduler_kwargs": "{not json"}, "SFTConfig refuses it"),
        ({"dataloader_prefetch_factor": 2}, "can only be set when data is loaded in a different"),
        ({"loss_type": "chunked_nll"}, "that is its default"),
        ({"neftune_noise_alpha": 5}, None),
        ({"lr_scheduler_kwargs": {"num_cycels": 2}}, "num_cycels"),
    ],
)
def test_preflight_builds_the_config(arguments: dict[str, Any], said: str | None) -> None:
    if said is None:
        check_sft(cell(**arguments))
        return
    with pytest.raises(UserError, match=said) as found:
        check_sft(cell(**arguments))
    assert found.value.key == "train.sft_config"


def test_tokens_are_asked_of_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tokenizer:
        def get_vocab(self) -> dict[str, int]:
            return {"<|im_end|>": 1, "</s>": 2}

    monkeypatch.setattr("harness.verify.arguments.load_tokenizer", lambda model: Tokenizer())
    check_tokens(cell(eos_token="</s>"))
    with pytest.raises(UserError, match=r"eos_token '<\|imend\|>' is no token of .* did you mean"):
        check_tokens(cell(eos_token="<|imend|>"))
