"""4-bit storage against the closed form of bitsandbytes' format, byte for byte."""

from __future__ import annotations

import functools
import math

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from harness.meters.memory.ledger import Ledger, by_category, live_at, resident_bytes, tag_model

VARIANTS = [(kind, double) for kind in ("nf4", "fp4") for double in (False, True)]
# (out, in): powers of two, not a multiple of 64 * 256, not a multiple of 64, an odd number.
SHAPES = [(4096, 4096), (576, 1536), (300, 129), (65, 64), (7, 9), (1, 1)]


def storages(parameters: int, double: bool) -> tuple[list[int], list[int]]:
    """Bytes of every storage of one 4-bit layer of n parameters: (weight, quantization state).

    Closed form, from the format as bitsandbytes 0.50 makes it (`functional.quantize_4bit` and
    `quantize_blockwise`) and as QLoRA describes it (Dettmers et al. 2023, section 3):

        packed weights        ceil(n / 2)             two 4-bit indices a byte
        code table            16 * 4                  float32, each layer its own copy
        plain:  absmax        ceil(n / 64) * 4        float32, one per block of 64
        double: absmax        ceil(n / 64)            uint8
                offset        4                       float32 mean of the absmax
                nested absmax ceil(ceil(n / 64) / 256) * 4   float32, one per 256 of them
                nested code   256 * 4                 float32, each layer its own copy
    """
    blocks = math.ceil(parameters / 64)
    if not double:
        return [math.ceil(parameters / 2)], [blocks * 4, 16 * 4]
    return [math.ceil(parameters / 2)], [
        blocks,
        16 * 4,
        4,
        math.ceil(blocks / 256) * 4,
        256 * 4,
    ]


def closed_form(parameters: int, double: bool) -> dict[str, int]:
    packed, state = storages(parameters, double)
    return {"quantized_weights": sum(packed), "quantization_state": sum(state)}


def quantized(shape: tuple[int, int], kind: str, double: bool) -> nn.Module:
    """A layer that bitsandbytes quantized itself, on its move to a device."""
    with torch.device("meta"):
        # Without random values, which would take longer than everything else.
        layer = bnb.nn.Linear4bit(shape[1], shape[0], bias=False)
    layer.weight = bnb.nn.Params4bit(
        torch.ones(shape), quant_type=kind, compress_statistics=double, module=layer
    )
    return layer.to("cpu")


@functools.cache
def shared(shape: tuple[int, int], kind: str, double: bool) -> nn.Module:
    """The same layer for tests that only look: making a large one takes most of a second."""
    return quantized(shape, kind, double)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("kind", "double"), VARIANTS)
def test_resident_bytes_are_the_closed_form(
    shape: tuple[int, int], kind: str, double: bool
) -> None:
    layer = shared(shape, kind, double)
    assert layer.weight.quant_state.quant_type == kind
    assert resident_bytes(layer) == closed_form(math.prod(shape), double)


@pytest.mark.parametrize("double", [False, True])
def test_code_tables_are_held_per_layer(double: bool) -> None:
    """bitsandbytes 0.50 copies both tables for every layer: two layers hold twice one's bytes."""
    both = nn.Sequential(
        quantized((128, 96), "nf4", double), quantized((64, 40), "nf4", double), nn.LayerNorm(5)
    )
    one, other = closed_form(128 * 96, double), closed_form(64 * 40, double)
    assert resident_bytes(both) == {
        "weights": 2 * 5 * 4,
        **{name: one[name] + other[name] for name in one},
    }


def test_a_storage_held_twice_counts_once() -> None:
    """One code table for two layers, a tied weight, and a weight that is a view of another."""
    first, second = quantized((128, 96), "nf4", False), quantized((128, 96), "nf4", False)
    second.weight.quant_state.code = first.weight.quant_state.code
    table = torch.zeros(30, 4)
    tied, whole = nn.Embedding.from_pretrained(table), nn.Linear(4, 30, bias=False)
    whole.weight = tied.weight
    part = nn.Linear(4, 10, bias=False)
    part.weight = nn.Parameter(table[:10])
    one = closed_form(128 * 96, False)
    assert resident_bytes(nn.ModuleList([first, second, tied, whole, part])) == {
        "weights": 30 * 4 * 4,
        "quantized_weights": 2 * one["quantized_weights"],
        "quantization_state": 2 * one["quantization_state"] - 64,
    }


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_quant_storage_dtype_changes_no_bytes(storage: torch.dtype) -> None:
    layer = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", quant_storage=storage)
    layer = layer.to("cpu")
    assert layer.weight.dtype == storage
    assert resident_bytes(layer) == closed_form(128 * 64, layer.weight.compress_statistics)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_double_quantization_saves_0_373_bits_per_parameter(kind: str) -> None:
    """QLoRA, section 3: 32/64 - (8/64 + 32/(64 * 256)) = 0.373046875 bits per parameter.

    The constant tables (offset and nested code, 1028 bytes a layer) are no part of that formula;
    with them a 4096 x 4096 layer still saves more than 0.3725.
    """
    parameters = 4096 * 4096
    plain, double = (
        resident_bytes(shared((4096, 4096), kind, nested))["quantization_state"]
        for nested in (False, True)
    )
    assert (plain - double + 1028) * 8 / parameters == 32 / 64 - (8 / 64 + 32 / (64 * 256))
    assert 0.3725 < (plain - double) * 8 / parameters < 0.373047


@pytest.mark.parametrize("shape", [(4096, 4096), (300, 129), (7, 9)], ids=str)
@pytest.mark.parametrize(("kind", "double"), VARIANTS)
def test_ledger_rounds_every_storage_up_to_512(
    shape: tuple[int, int], kind: str, double: bool
) -> None:
    layer = shared(shape, kind, double)
    ledger = Ledger("cpu")
    tag_model(ledger, layer)
    packed, state = storages(math.prod(shape), double)
    live = live_at(ledger.events, len(ledger.events) - 1)
    assert sorted(s.nbytes for s in live) == sorted(packed + state)
    assert by_category(live) == {
        "quantized_weights": sum(math.ceil(b / 512) * 512 for b in packed),
        "quantization_state": sum(math.ceil(b / 512) * 512 for b in state),
    }
