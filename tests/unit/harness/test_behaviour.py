"""What a look at a model finds, and that the model is the same afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from harness.models import model
from harness.models.mismatch import VerificationError
from harness.records import provenance
from harness.verify import behaviour
from matrices.cell import Adapter, Cell, Data, Model, Quantization, Train

SIZES = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
MORE = {"mixtral": {"num_key_value_heads": 2, "num_local_experts": 4}}
PARTS: dict[str, Any] = {"model": Model(name="tiny-llama"), "train": Train()}


def made(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, **more)
    return AutoModelForCausalLM.from_config(config).to(torch.bfloat16)


def packed(strategy: str, **sections: Any) -> Cell:
    data = Data(packing_strategy=strategy)  # type: ignore[arg-type]
    return Cell(method="full", data=data, **PARTS)


# Falcon and OPT make their masks from the attention mask alone, which packed rows do not have.
@pytest.mark.parametrize(
    ("kind", "isolated"),
    [("llama", True), ("gpt_neox", True), ("mixtral", True), ("falcon", False), ("opt", False)],
)
def test_documents_in_one_row(kind: str, isolated: bool) -> None:
    loaded = made(kind, **MORE.get(kind, {}))
    seen = behaviour.probe(loaded, packed("bfd"))
    assert (seen.causal, seen.isolated) == (True, isolated)
    # The other way to see it: a changed first document leaves the second one's logits.
    batch = behaviour._packed(loaded)
    half = behaviour.TOKENS // 2
    before = loaded.eval()(**batch, use_cache=False).logits[0, half:]
    batch["input_ids"] = batch["input_ids"].clone()
    batch["input_ids"][0, :half] += 1
    after = loaded(**batch, use_cache=False).logits[0, half:]
    if kind != "mixtral":  # whose experts see other batches then, and round otherwise
        assert torch.equal(before, after) is isolated


def test_rows_cut_from_one_stream_are_not_isolated_and_single_documents_need_not_be() -> None:
    loaded = made("llama")
    assert behaviour.probe(loaded, packed("wrapped")).isolated is False
    single = Cell(method="full", data=Data(packing=False), **PARTS)
    assert behaviour.probe(loaded, single).isolated is None


def test_an_encoder_is_refused() -> None:
    with pytest.raises(VerificationError, match="not a causal language model"):
        behaviour.probe(made("bert"), packed("bfd"))
    assert behaviour.probe(made("bert", is_decoder=True), packed("bfd")).causal is True


@pytest.mark.usefixtures("tiny_llama")
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_an_adapter_starts_at_the_base_or_fails(method: str) -> None:
    quantization = {"quantization": Quantization()} if method == "qlora" else {}
    cell = Cell(method=method, adapter=Adapter(), data=Data(), **PARTS, **quantization)  # type: ignore[arg-type]
    record = provenance.new_record(cell, [])
    base = model.prepare_kbit(model.load_base(cell), cell)
    seen = behaviour.probe(base, cell)
    adapted = model.add_adapter(base, cell)
    behaviour.record_probe(record, seen, adapted)
    assert record.verified.adapter_starts_at_base is True
    assert record.verified.causal is True
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    with pytest.raises(VerificationError, match="before it is trained"):
        behaviour.record_probe(record, seen, adapted)


def test_a_look_leaves_the_model_as_it_was() -> None:
    import bitsandbytes as bnb

    loaded = made("gpt_neox").train()
    for layer in loaded.gpt_neox.layers:
        place = layer.attention.dense
        new = bnb.nn.Linear4bit(place.in_features, place.out_features, compute_dtype=torch.bfloat16)
        new.load_state_dict(place.state_dict())
        # As PEFT's preparation leaves it; the layer casts it in place at its first forward.
        new.bias.data = new.bias.data.float()
        layer.attention.dense = new.to("cpu")
    before = [(p.data_ptr(), p.dtype, p.requires_grad, p.grad) for p in loaded.parameters()]
    state = torch.get_rng_state()
    behaviour.probe(loaded, packed("bfd"))
    assert [(p.data_ptr(), p.dtype, p.requires_grad, p.grad) for p in loaded.parameters()] == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in loaded.modules())
    assert not any(module._forward_hooks for module in loaded.modules())
