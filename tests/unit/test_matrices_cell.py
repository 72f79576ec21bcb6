"""The identity of a cell."""

from __future__ import annotations

import hashlib

from matrices.cell import (
    Adapter,
    Cell,
    Data,
    Evaluate,
    Model,
    Quantization,
    Train,
    base_cells,
    canonical_json,
    flatten,
)

LORA = Cell(adapter=Adapter(alpha=32), data=Data(), train=Train())


def test_the_identity_of_the_default_cell_never_moves() -> None:
    """Records are found by this hash: a new setting with a default must not change it."""
    assert canonical_json(LORA) == '{"adapter":{"alpha":32},"data":{},"train":{}}'
    frozen = "e3d0550a07280871807332b755fcd7eb59875c1f355ce7b1b249d2d38a3f6dd8"
    assert frozen == hashlib.sha256(canonical_json(LORA).encode()).hexdigest()
    assert LORA.cell_id == frozen


def test_only_differences_from_the_defaults_are_hashed() -> None:
    cell = Cell(
        method="qlora",
        model=Model(name="smollm2-135m"),
        quantization=Quantization(double_quant=True),
        adapter=Adapter(rank=8, alpha=16),
        data=Data(max_length=512),
        train=Train(learning_rate=1e-5, sft_config={"b": 1, "a": 2}),
        seed=3,
    )
    assert canonical_json(cell) == (
        '{"adapter":{"alpha":16,"rank":8},"data":{"max_length":512},"method":"qlora",'
        '"quantization":{"double_quant":true},"seed":3,'
        '"train":{"learning_rate":1e-05,"sft_config":{"a":2,"b":1}}}'
    )


def test_a_fingerprint_stands_for_the_path() -> None:
    here = Cell(model=Model(name="/a/model", fingerprint="f"), adapter=Adapter(alpha=32))
    there = Cell(model=Model(name="/b/model", fingerprint="f"), adapter=Adapter(alpha=32))
    changed = Cell(model=Model(name="/a/model", fingerprint="g"), adapter=Adapter(alpha=32))
    assert here.cell_id == there.cell_id
    assert here.cell_id != changed.cell_id


def test_a_default_section_differs_from_none() -> None:
    quantized = Cell(method="base", quantization=Quantization())
    assert quantized.cell_id != Cell(method="base").cell_id


def test_base_cells_depend_on_model_storage_and_recipe_alone() -> None:
    first = Cell(
        method="qlora",
        quantization=Quantization(kbit_preparation=False),
        adapter=Adapter(rank=4, alpha=8),
        data=Data(),
        train=Train(),
    )
    second = Cell(
        method="qlora",
        quantization=Quantization(),
        adapter=Adapter(rank=64, alpha=128),
        data=Data(max_length=64),
        train=Train(steps=3),
        seed=7,
    )
    assert base_cells(first) == base_cells(second)
    assert set(base_cells(first)) == {"untouched", "quantized"}
    assert set(base_cells(LORA)) == {"untouched"}
    recipe = Evaluate(tasks=("hellaswag",))
    assert base_cells(LORA.model_copy(update={"evaluate": recipe})) != base_cells(LORA)
    nothing = Evaluate(tasks=(), sample_prompts=())
    assert base_cells(LORA.model_copy(update={"evaluate": nothing})) == {}


def test_a_spread_over_devices_is_part_of_the_identity() -> None:
    spread = LORA.model_copy(update={"parallelism": "fsdp", "devices": 2})
    assert canonical_json(spread) == (
        '{"adapter":{"alpha":32},"data":{},"devices":2,"parallelism":"fsdp","train":{}}'
    )
    assert flatten(spread)["parallelism"] == "fsdp"
    assert flatten(spread)["devices"] == 2


def test_a_config_is_known_by_its_content() -> None:
    here = Cell(model=Model(name="a", config="/a/config.json", fingerprint="f"))
    there = Cell(model=Model(name="b", config="/b/config.json", fingerprint="f"))
    assert here.cell_id == there.cell_id
    unread = Cell(model=Model(config="/a/config.json"))
    assert canonical_json(unread) == '{"model":{"config":"/a/config.json"}}'
