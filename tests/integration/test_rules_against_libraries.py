"""The rules' claims, asked of the installed libraries."""

from __future__ import annotations

import dataclasses
import enum
import inspect

import pytest
import torch

from matrices.catalogue.models import REQUIRED, SAME
from matrices.libraries.installed_arguments import UNKNOWN, fields
from matrices.libraries.library_arguments import TABLES
from matrices.rules.models import POSITION_TABLES, positions_problem


def test_accelerate_ignores_fp16_on_a_cpu() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        assert Accelerator(cpu=True, mixed_precision="fp16").native_amp is False
        AcceleratorState._reset_state(reset_partial_state=True)
        assert Accelerator(cpu=True, mixed_precision="bf16").native_amp is True
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_the_gradient_scaler_refuses_fp16_gradients() -> None:
    parameter = torch.nn.Parameter(torch.ones(4, dtype=torch.float16))
    parameter.grad = torch.ones_like(parameter)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(1))
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.unscale_(torch.optim.SGD([parameter], lr=1.0))


def test_the_polynomial_schedule_refuses_a_rate_at_its_end() -> None:
    from transformers import get_polynomial_decay_schedule_with_warmup as schedule

    parameter = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="must be smaller than initial lr"):
        schedule(torch.optim.SGD([parameter], lr=1e-7), 0, 10)
    schedule(torch.optim.SGD([parameter], lr=1.1e-7), 0, 10)


def test_transformers_has_no_flash_attention_for_a_cpu() -> None:
    from transformers import modeling_flash_attention_utils as flash

    devices = {
        name for _, name in flash.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]["supported_devices"]
    }
    devices |= set(flash.FLASH_ATTN_KERNEL_DEVICES["kernels-community/flash-attn2"])
    assert "cuda" in devices
    assert "cpu" not in devices


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_documents_stay_apart_without_flash_attention(implementation: str) -> None:
    """Why bfd packing is not refused: transformers masks by position_ids, when nothing is cached
    (TRL trains with use_cache=False)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    config._attn_implementation = implementation
    model = LlamaForCausalLM(config).eval()
    first, second = torch.randint(0, 64, (1, 7)), torch.randint(0, 64, (1, 9))
    positions = torch.cat([torch.arange(7), torch.arange(9)])[None]
    with torch.no_grad():
        packed = model(torch.cat([first, second], 1), position_ids=positions, use_cache=False)
        alone = model(second, use_cache=False)
    torch.testing.assert_close(packed.logits[:, 7:], alone.logits, atol=1e-5, rtol=0)


def test_every_argument_of_the_installed_classes_is_classified() -> None:
    """A new release of TRL, PEFT or transformers breaks this test, not a user's sweep."""
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig

    installed = {
        "SFTConfig": {field.name for field in dataclasses.fields(SFTConfig)},
        "LoraConfig": {field.name for field in dataclasses.fields(LoraConfig)},
        "BitsAndBytesConfig": set(inspect.signature(BitsAndBytesConfig).parameters) - {"kwargs"},
    }
    for name, (_, table) in TABLES.items():
        assert {argument for argument in table if "." not in argument} == installed[name]


def test_arguments_are_read_from_source_as_they_are() -> None:
    from peft import LoraConfig
    from trl import SFTConfig

    for real in (SFTConfig, LoraConfig):
        read = fields(real.__name__)
        assert read is not None
        assert set(read) == {field.name for field in dataclasses.fields(real)}
        for field in dataclasses.fields(real):
            mine = read[field.name]
            if field.default is dataclasses.MISSING or isinstance(field.default, enum.Enum):
                continue
            assert mine.accepts(field.default), field.name
            assert mine.default is UNKNOWN or mine.is_default(field.default), field.name


def test_what_is_refused_for_its_value_is_refused_by_peft_too() -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )
    with pytest.raises(ValueError, match="Unknown initialization"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights="gausian"))


@pytest.mark.parametrize(
    "model_type",
    [
        *("biogpt", "codegen", "ctrl", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "openai-gpt"),
        *("opt", "llama", "xglm", "bloom"),
    ],
)
def test_positions_end_where_they_are_a_table(model_type: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    known = AutoConfig.for_model(model_type)
    sizes = {
        **dict.fromkeys(("hidden_size", "embed_dim", "d_model", "word_embed_proj_dim"), 16),
        **dict.fromkeys(("num_attention_heads", "attention_heads"), 4),
        **dict.fromkeys(("intermediate_size", "ffn_dim", "dff"), 8),
        **dict.fromkeys(("num_hidden_layers", "num_layers"), 1),
        **{"attention_types": [[["global"], 1]], "rotary_dim": 4, "pad_token_id": 1},
        **{"vocab_size": 16, "max_position_embeddings": 4},
    }
    given = {name: size for name, size in sizes.items() if hasattr(known, name)}
    config = AutoConfig.for_model(model_type, **given)
    model = AutoModelForCausalLM.from_config(config).eval()
    model(input_ids=torch.full((1, 4), 5))
    beyond = torch.full((1, 5), 5)
    if model_type not in POSITION_TABLES:
        model(input_ids=beyond)
        return
    assert "5 and the model has 4 positions" in (positions_problem(config.to_dict(), 5) or "")
    with pytest.raises((IndexError, RuntimeError), match=r"out of|size of tensor"):
        model(input_ids=beyond)


@pytest.mark.parametrize("model_type", [*REQUIRED])
def test_a_config_without_its_sizes_is_silently_another_model(model_type: str) -> None:
    from transformers import AutoConfig

    config = type(AutoConfig.for_model(model_type)).from_dict({"model_type": model_type})
    for key in REQUIRED[model_type]:
        names = next((group for group in SAME if key in group), (key,))
        assert any(getattr(config, name, None) or name == "n_inner" for name in names), key


def test_fsdp1_flattens_one_floating_dtype_only() -> None:
    from types import SimpleNamespace

    from torch.distributed.fsdp._flat_param import FlatParamHandle

    def frozen(dtype: torch.dtype) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.zeros(2, dtype=dtype), requires_grad=False)

    def flatten(*dtypes: torch.dtype) -> None:
        handle = SimpleNamespace(_use_orig_params=True)
        FlatParamHandle._validate_tensors_to_flatten(handle, [frozen(d) for d in dtypes])

    flatten(torch.bfloat16, torch.bfloat16)
    with pytest.raises(ValueError, match="integer"):
        flatten(torch.uint8)
    with pytest.raises(ValueError, match="uniform dtype"):
        flatten(torch.bfloat16, torch.float16)
