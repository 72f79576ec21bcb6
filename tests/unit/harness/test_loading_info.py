"""What transformers fills with random numbers never counts as a model: tiny models of several
families, whole and with one thing wrong, compared on meta, loaded, and loaded in 4 bit."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from harness.models import loading_info, model
from harness.models.loading_info import WeightsError
from matrices.cell import Cell, Model, Quantization
from matrices.errors import UserError

State = dict[str, torch.Tensor]
SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "tied": SIZES | {"tie_word_embeddings": True},
    "mixtral": SIZES | {"num_local_experts": 3, "num_experts_per_tok": 2},
    "gpt2": {"vocab_size": 32, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved model of each family, random but seeded."""
    made = {}
    for name, sizes in FAMILIES.items():
        torch.manual_seed(0)
        kind = "llama" if name == "tied" else name
        config = transformers.AutoConfig.for_model(kind, **sizes)
        made[name] = tmp_path_factory.mktemp(name)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(made[name])
    return made


def changed(source: Path, target: Path, change: Callable[[State], State]) -> Path:
    """A copy of a saved model with other tensors."""
    target.mkdir()
    (target / "config.json").write_text((source / "config.json").read_text())
    state = change(load_file(source / "model.safetensors"))
    save_file(
        {n: t.contiguous() for n, t in state.items()},
        target / "model.safetensors",
        {"format": "pt"},
    )
    return target


def said_before(directory: Path) -> str:
    """What preflight says, without a weight read."""
    config = transformers.AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        skeleton = transformers.AutoModelForCausalLM.from_config(config)
    try:
        loading_info.check(Model(name=str(directory)), skeleton)
    except UserError as error:
        return error.message
    return ""


def load(directory: Path, quantization: Quantization | None = None) -> Any:
    chosen = Model(name=str(directory), weight_dtype="fp32")
    method = "base" if quantization is None else "qlora"
    return model.load_base(
        Cell(method=method, model=chosen, quantization=quantization), torch.device("cpu")
    )


def without(*words: str) -> Callable[[State], State]:
    return lambda state: {n: t for n, t in state.items() if not any(w in n for w in words)}


def renamed(old: str, new: str) -> Callable[[State], State]:
    return lambda state: {re.sub(f"^{re.escape(old)}", new, n): t for n, t in state.items()}


def wide_keys(state: State) -> State:
    return {n: torch.zeros(64, 64) if "k_proj" in n else t for n, t in state.items()}


@pytest.mark.parametrize(
    ("family", "change", "problem"),
    [
        ("llama", renamed("", "foo."), "21 are there under 'foo.' instead of '': rename them"),
        ("llama", renamed("model.", "x."), "20 are there under 'x.' instead of 'model.'"),
        ("llama", without("lm_head"), "1 tensor of the model is not in the checkpoint"),
        ("llama", without("layers.1"), "9 tensors of the model are not in the checkpoint"),
        ("llama", without("model.norm"), "would be random: model.norm.weight"),
        ("tied", without("embed_tokens"), "lm_head.weight, model.embed_tokens.weight"),
        ("gpt2", without("wpe"), "would be random: transformer.wpe.weight"),
        ("mixtral", without("experts.2"), "4 tensors are of another shape in the checkpoint"),
        (
            "llama",
            wide_keys,
            "2 tensors are of another shape in the checkpoint: "
            "model.layers.0.self_attn.k_proj.weight is 64 x 64 and the model's 32 x 64",
        ),
    ],
)
def test_a_weight_that_is_not_the_checkpoints(
    families: dict[str, Path],
    tmp_path: Path,
    family: str,
    change: Callable[[State], State],
    problem: str,
) -> None:
    broken = changed(families[family], tmp_path / "broken", change)
    found = said_before(broken)
    assert problem in found
    assert found.startswith(str(broken))
    for quantization in (None, Quantization()):
        with pytest.raises(WeightsError) as caught:
            load(broken, quantization)
        assert problem in str(caught.value)


def test_experts_that_do_not_fit_together(families: dict[str, Path], tmp_path: Path) -> None:
    """transformers gives up while it puts them together, and names none."""
    lost = "layers.1.block_sparse_moe.experts.2.w1"
    broken = changed(families["mixtral"], tmp_path / "broken", without(lost))
    assert (
        f"1 tensor of the model is not in the checkpoint and would be random: model.{lost}.weight"
    ) in said_before(broken)
    with pytest.raises(RuntimeError, match="conversion of the weights"):
        load(broken)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        *((family, lambda state: state) for family in FAMILIES),
        ("llama", renamed("model.", "")),
        ("gpt2", renamed("transformer.", "")),
        ("tied", renamed("model.embed_tokens", "lm_head")),
    ],
)
def test_whole_checkpoints_are_loaded_bit_for_bit(
    families: dict[str, Path], tmp_path: Path, family: str, change: Callable[[State], State]
) -> None:
    """With transformers' base prefixes, tied weights and experts that it puts together."""
    made = changed(families[family], tmp_path / "made", change)
    assert said_before(made) == ""
    loaded = load(made)
    assert loading_info.unexpected_weights(loaded) == {}
    loaded.save_pretrained(tmp_path / "again")
    before = load_file(families[family] / "model.safetensors")
    after = load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert loading_info.unexpected_weights(load(made, Quantization())) == {}


def test_what_the_model_has_no_place_for_is_told(families: dict[str, Path], tmp_path: Path) -> None:
    more = {f"vision.{block}.{leaf}": torch.ones(2) for block in range(3) for leaf in "ab"}
    # An old buffer that transformers knows and passes over.
    more["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    made = changed(families["llama"], tmp_path / "made", lambda state: state | more)
    assert said_before(made) == ""
    assert loading_info.unexpected_weights(load(made)) == {"vision.*.a": 3, "vision.*.b": 3}


def test_weights_of_torch_are_compared_too(families: dict[str, Path], tmp_path: Path) -> None:
    for change, problem in (
        (lambda state: state, ""),
        (without("model.norm"), "model.norm.weight"),
    ):
        made = changed(families["llama"], tmp_path / f"made{len(problem)}", change)
        torch.save(load_file(made / "model.safetensors"), made / "pytorch_model.bin")
        (made / "model.safetensors").unlink()
        assert problem in said_before(made)
        assert bool(problem) == bool(said_before(made))
    (made / "pytorch_model.bin").write_bytes(b"\x80\x02 no pickle")
    assert "pytorch_model.bin cannot be read" in said_before(made)


def test_an_adapter_beside_the_weights_is_not_part_of_the_model(
    families: dict[str, Path], tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    made = changed(families["llama"], tmp_path / "made", lambda state: state)
    adapted = get_peft_model(load(made), LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(made)
    with pytest.raises(WeightsError, match="holds an adapter beside the weights"):
        load(made)


def test_an_adapter_with_a_weight_missing_is_not_scored(
    families: dict[str, Path], tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    base = families["llama"]
    get_peft_model(load(base), LoraConfig(target_modules=["q_proj"])).save_pretrained(
        tmp_path / "a"
    )
    loading_info.load_adapter(load(base), tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file(without("layers.1.self_attn.q_proj.lora_B")(load_file(file)), file)
    with pytest.raises(UserWarning, match="missing adapter keys"):
        loading_info.load_adapter(load(base), tmp_path / "a")
