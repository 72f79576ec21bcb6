"""What the cells of a sweep are called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from matrices.cell import (
    Adapter,
    Cell,
    Data,
    Evaluate,
    Model,
    Quantization,
    Train,
    base_cells,
    flatten,
)
from matrices.expand import expand
from matrices.language.labels import ID_DIGITS, LONGEST, labels
from matrices.load import load, shipped


def lora(**given: Any) -> Cell:
    return Cell(
        **{"method": "lora", "adapter": Adapter(), "data": Data(), "train": Train()} | given
    )


def qlora(*quantization: Any, **given: Any) -> Cell:
    kind, double = quantization
    return lora(
        method="qlora",
        quantization=Quantization(quant_type=kind, double_quant=double),
        **given,
    )


def local(path: str, fingerprint: str) -> Model:
    return Model(name=path, fingerprint=fingerprint * 64)


CALLED: list[tuple[list[Cell], list[str]]] = [
    ([lora()], ["lora r16 attention"]),
    ([lora(seed=0), lora(seed=1)], ["seed=0", "seed=1"]),
    # A rate that follows from the method is not told.
    (
        [lora(), lora(seed=1), Cell(method="full", data=Data(), train=Train(learning_rate=1e-5))],
        ["lora seed=0", "lora seed=1", "full seed=0"],
    ),
    ([qlora("nf4", False), qlora("nf4", True)], ["nf4", "nf4+dq"]),
    (
        [lora(adapter=Adapter(rank=r, alpha=a)) for r, a in ((8, None), (16, 32), (16, 64))],
        ["r8 alpha=16", "r16 alpha=32", "r16 alpha=64"],
    ),
    (
        [lora(), lora(parallelism="fsdp", devices=2), lora(parallelism="ddp", devices=4, nodes=2)],
        ["single", "fsdp x2", "ddp 2x2"],
    ),
    # Local models and data by their names, with as much of the path as it takes.
    (
        [lora(model=local("/a/b/tiny", "a")), lora(model=local("/a/other", "b"))],
        ["tiny", "other"],
    ),
    (
        [
            lora(model=local("/a/b/tiny", "a")),
            lora(model=local("/a/c/tiny", "b")),
            lora(model=Model(name="meta-llama/Llama-3.1-8B")),
        ],
        ["b/tiny", "c/tiny", "Llama-3.1-8B"],
    ),
    (
        [lora(data=Data(source=f"/x/{n}.jsonl", fingerprint=n * 64)) for n in "ab"],
        ["a.jsonl", "b.jsonl"],
    ),
    # Of what is passed through, the arguments that differ.
    (
        [
            lora(train=Train(sft_config={"adam_epsilon": 1e-6} | more))
            for more in ({}, {"adam_beta1": 0.8}, {"eos_token": "a\n\x1b[2J"})
        ],
        ["lora", "adam_beta1=0.8", "eos_token=a \ufffd[2J"],
    ),
    (
        [Cell(method="base", seed=seed) for seed in (0, 1)],
        ["base seed=0", "base seed=1"],
    ),
]


@pytest.mark.parametrize(("cells", "called"), CALLED)
def test_cells_are_called_by_what_differs(cells: list[Cell], called: list[str]) -> None:
    found = labels(cells)
    assert [found[cell.cell_id] for cell in cells] == called


def check(cells: Sequence[Cell]) -> list[str]:
    """The labels, unique and short, without what all trained cells share."""
    found = labels(cells)
    assert len(set(found.values())) == len({cell.cell_id for cell in cells})
    assert all(len(text) <= LONGEST and text.isprintable() for text in found.values())
    trained = [cell for cell in cells if cell.method != "base"]
    if len(trained) > 1:
        flats = [flatten(cell) for cell in trained]
        for key in flats[0]:
            if all(flat.get(key, object()) == flats[0][key] for flat in flats):
                named = f"{key.rpartition('.')[2]}="
                words = [word for cell in trained for word in found[cell.cell_id].split()]
                assert not any(word.startswith(named) for word in words)
    return list(found.values())


@pytest.mark.parametrize("name", shipped())
def test_shipped_cells_need_no_identity_in_their_label(name: str) -> None:
    cells = expand(load(name)).cells
    bases = {base.cell_id: base for cell in cells for base in base_cells(cell).values()}
    everything = [*bases.values(), *cells]
    for cell, text in zip(everything, check(everything), strict=True):
        assert cell.cell_id[:ID_DIGITS] not in text


def test_cells_that_only_an_identity_tells_apart() -> None:
    cells = [lora(model=local("/a/tiny", letter)) for letter in "ab"]
    for cell, text in zip(cells, check(cells), strict=True):
        assert text == f"lora r16 attention {cell.cell_id[:ID_DIGITS]}"


def test_long_values_are_shortened_and_still_told_apart() -> None:
    long = [
        lora(adapter=Adapter(target_modules=tuple(f"module_{n}_proj_{end}" for n in range(20))))
        for end in ("in", "out")
    ]
    assert "…" in check(long)[0]
    same_ends = [
        lora(evaluate=Evaluate(tasks=("a" * 80, middle, "b" * 80))) for middle in ("x", "y")
    ]
    assert all(cell.cell_id[:ID_DIGITS] in labels(same_ends)[cell.cell_id] for cell in same_ends)
    check(same_ends)


def test_a_sweep_over_many_settings_keeps_within_a_line() -> None:
    cells = [
        lora(
            seed=number & 1,
            data=Data(max_length=1024 + (number >> 1 & 1), max_samples=10_000 + (number >> 2 & 1)),
            train=Train(
                gradient_accumulation_steps=1 + (number >> 3 & 1),
                learning_rate=1.2345e-5 * (1 + (number >> 4 & 1)),
                gradient_checkpointing=bool(number >> 5 & 1),
                warmup_steps=number >> 6 & 1,
            ),
        )
        for number in range(128)
    ]
    check(cells)
