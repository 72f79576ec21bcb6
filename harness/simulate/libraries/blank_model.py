"""A model without weight values, built and placed as `from_pretrained` does: first on the meta
device, then tensor by tensor on the training device, quantized one at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from harness import device
from harness.models import packaged
from harness.models.model import quantization_config
from harness.simulate.libraries import bitsandbytes_4bit
from matrices.catalogue.models import PACKAGED_MODELS
from matrices.cell import Cell, Model
from matrices.errors import UserError

TRANSFORMERS = tuple(int(part) for part in transformers.__version__.split(".")[:2])
# transformers renamed the argument in 4.56.
DTYPE_ARGUMENT = "dtype" if TRANSFORMERS >= (4, 56) else "torch_dtype"


def model_config(model: Model) -> Any:
    """The transformers config of a cell's model. Raises UserError if there is none."""
    path = _config_path(model)
    if path is None:
        return _hub_config(model)
    from matrices.catalogue.models import read_config

    plain = read_config(path, model.config_overrides)
    kind = plain["model_type"]
    try:
        made = transformers.AutoConfig.for_model(kind)
        return type(made).from_dict(plain)
    except (ValueError, KeyError) as error:
        raise UserError(
            f"transformers {transformers.__version__} does not know the architecture {kind!r}",
            key="model_type",
            where=str(path),
        ) from error
    except (TypeError, AttributeError) as error:
        raise UserError(
            f"transformers {transformers.__version__} cannot make a {kind} of it: {error}",
            where=str(path),
        ) from error


def _config_path(model: Model) -> Path | None:
    from matrices.catalogue.models import config_of

    path = config_of(model)
    if path is None and model.name in PACKAGED_MODELS:
        return packaged.ensure_model(model.name) / "config.json"
    return path


def _hub_config(model: Model) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(
            model.name,
            revision=model.revision or "main",
            trust_remote_code=model.trust_remote_code,
            **model.config_overrides,
        )
    except Exception as error:
        # From a misspelt name to no network; the first line of the hub's own message tells which.
        from matrices.catalogue.models import near_architectures

        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{model.name!r} is no shipped architecture and no local directory, and the hub does "
            f"not give its config.json: {said.rstrip('.')}"
            + (near_architectures(model.name) or "; give model: {config: path/to/config.json}"),
            key="model.name",
        ) from error


def skeleton(cell: Cell, config: Any) -> Any:
    """The model on the meta device, 4-bit layers in place, as before its weights are read."""
    config.use_cache = getattr(config, "use_cache", True)
    arguments = {
        DTYPE_ARGUMENT: device.DTYPES[cell.model.weight_dtype],
        "attn_implementation": cell.model.attn_implementation,
        "trust_remote_code": cell.model.trust_remote_code,
    }
    try:
        with torch.device("meta"), _uninitialized():
            model = transformers.AutoModelForCausalLM.from_config(config, **arguments)
    except (ValueError, ImportError, TypeError) as error:
        raise UserError(
            f"transformers {transformers.__version__} cannot build this model: "
            + " ".join(str(error).split())[:300],
            key="model",
        ) from error
    model.tie_weights()
    if cell.quantization is not None:
        _replace_linears(model, cell)
    return model.eval()


@contextlib.contextmanager
def _uninitialized() -> Iterator[None]:
    """Skip the random initial values, which nobody reads; transformers 5 moved the switch."""
    try:
        from transformers.initialization import no_init_weights
    except ImportError:
        from transformers.modeling_utils import no_init_weights
    with no_init_weights():
        yield


def _replace_linears(model: Any, cell: Cell) -> None:
    """transformers' own quantizer chooses and replaces the layers."""
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    assert cell.quantization is not None
    config = quantization_config(cell.quantization, cell.model.compute_dtype)
    quantizer = Bnb4BitHfQuantizer(config, pre_quantized=False)
    place = device.training_device()
    extra: dict[str, Any] = {"keep_in_fp32_modules": []} if TRANSFORMERS < (5, 0) else {}
    with torch.device("meta"):
        quantizer.preprocess_model(model=model, device_map={"": place}, **extra)
    model.hf_quantizer = quantizer
    model.config.quantization_config = config
    model.config._pre_quantization_dtype = device.DTYPES[cell.model.weight_dtype]


def materialize(model: Any, place: torch.device | None = None) -> Any:
    """Make every parameter and buffer on the training device, or on `place` if a library shards
    from there; shared ones stay shared."""
    on_device = place is None
    place = place or device.training_device()
    loaded_in = getattr(model.config, "_pre_quantization_dtype", None)
    moved: dict[int, nn.Parameter] = {}
    # A checkpoint lists its tensors by name, and buffers that it lacks come after all of them: the
    # order decides which free blocks packed weights end up in.
    for path in sorted(name for name, _ in model.named_parameters(remove_duplicate=False)):
        owner, _, leaf = path.rpartition(".")
        module = model.get_submodule(owner)
        parameter = module._parameters[leaf]
        if parameter is None or not parameter.is_meta:
            continue
        four_bit = type(module).__name__ == "Linear4bit"
        if four_bit and leaf == "weight":
            shape = (module.out_features, module.in_features)
            bitsandbytes_4bit.quantize(module, torch.empty(shape, dtype=loaded_in, device=place))
            continue
        if id(parameter) not in moved:
            # Made in fp32, the bias of a 4-bit layer takes the dtype it is read in.
            dtype = (four_bit and loaded_in) or parameter.dtype
            blank = torch.empty(parameter.shape, dtype=dtype, device=place)
            moved[id(parameter)] = nn.Parameter(blank, parameter.requires_grad)
        module._parameters[leaf] = moved[id(parameter)]
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=place)
        if hasattr(module, "original_inv_freq") and "original_inv_freq" not in module._buffers:
            # Before transformers 5 it was the same tensor under a second name.
            module.original_inv_freq = module.inv_freq
    if on_device:
        model.hf_device_map = {"": place}
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.postprocess_model(model)
    return model


def experts(config: Any) -> int | None:
    """Number of experts of a mixture of experts; None for a dense model."""
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        value = getattr(config.get_text_config(), name, None)
        if isinstance(value, int) and value > 1:
            return value
    return None
