"""The table of the kinds of parallelism, and that nothing else decides by their names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from matrices.cell import Adapter, Cell, Data, Train
from matrices.parallelism import STRATEGIES, Parallelism

PACKAGES = ("matrices", "harness", "reports", "launch", "tests/benchmarks")
TABLE = "matrices/parallelism.py"
NAMES = frozenset(STRATEGIES)
# Starts of names that a test by `startswith` or a slice would look for.
STARTS = frozenset({"zero", "fsdp"})

# file: the code that may name kinds, and why.
ALLOWED = {
    # What fit tries when nothing is asked for is a choice, not a property of the kinds.
    "launch/fit/fit.py": ["('ddp', 'fsdp', 'zero2', 'zero3')"],
    # The published table says fsdp for both, and the version in a note.
    "tests/benchmarks/published.py": ["told == 'fsdp'"],
}


def constants(node: ast.AST) -> list[str]:
    return [
        each.value
        for each in ast.walk(node)
        if isinstance(each, ast.Constant) and isinstance(each.value, str)
    ]


def decisions(tree: ast.AST) -> Iterator[str]:
    """Code that decides by the name of a kind: a comparison with one, a test of how a name starts,
    a case of a match, an entry looked up by a name, and several names listed together."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
            named = any(NAMES & {*constants(each)} for each in operands)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            affixes = ("startswith", "endswith", "removeprefix", "removesuffix", "partition")
            found = {text for each in node.args for text in constants(each)}
            named = node.func.attr in affixes and bool(found & (NAMES | STARTS))
        elif isinstance(node, ast.MatchValue):
            named = bool(NAMES & {*constants(node)})
        elif isinstance(node, ast.Tuple | ast.List | ast.Set):
            named = len(NAMES & {*constants(node)}) > 1
        elif isinstance(node, ast.Dict):
            # A mapping of arguments may have one called fsdp among others.
            keys = [key.value if isinstance(key, ast.Constant) else None for key in node.keys]
            named = bool(keys) and NAMES.issuperset(keys)
        else:
            named = False
        if named:
            yield ast.unparse(node)


def test_nothing_but_the_table_decides_by_a_name(repository: Path) -> None:
    found: dict[str, list[str]] = {}
    for package in PACKAGES:
        for file in sorted((repository / package).rglob("*.py")):
            name = str(file.relative_to(repository))
            if name != TABLE and (code := list(decisions(ast.parse(file.read_text())))):
                found[name] = code
    assert found == ALLOWED


@pytest.mark.parametrize(
    "code",
    [
        'cell.parallelism == "ddp"',
        'cell.parallelism in ("single", "device-map")',
        'cell.parallelism.startswith("zero")',
        'ZERO = frozenset({"zero1", "zero2"})',
        'STAGES = {"zero1": 1}',
        'match kind:\n    case "fsdp1":\n        pass',
    ],
)
def test_the_test_above_sees_such_a_decision(code: str) -> None:
    assert list(decisions(ast.parse(code)))


def test_a_row_for_every_name_and_a_name_for_every_row() -> None:
    assert tuple(STRATEGIES) == get_args(Parallelism)


def test_one_process_has_no_ranks_and_shards_nothing() -> None:
    for name, strategy in STRATEGIES.items():
        if strategy.is_distributed:
            assert strategy.several_devices, name
            assert strategy.device_map is None, name
        else:
            assert not strategy.shards, name
    assert [name for name, each in STRATEGIES.items() if not each.several_devices] == ["single"]
    assert [name for name, each in STRATEGIES.items() if each.replicates] == ["ddp"]


@pytest.mark.parametrize(
    ("kind", "devices", "nodes", "ranks", "on_each"),
    [
        ("single", 1, 1, 1, 1),
        ("device-map", 4, 1, 1, 1),
        ("ddp", 4, 1, 4, 4),
        ("zero3", 8, 2, 8, 4),
        ("fsdp", 1, 1, 1, 1),
    ],
)
def test_ranks_of_a_cell(
    kind: Parallelism, devices: int, nodes: int, ranks: int, on_each: int
) -> None:
    cell = Cell(
        method="lora",
        adapter=Adapter(),
        data=Data(),
        train=Train(),
        parallelism=kind,
        devices=devices,
        nodes=nodes,
    )
    assert (cell.ranks, cell.ranks_per_node) == (ranks, on_each)
    assert cell.is_distributed is (kind not in ("single", "device-map"))


def test_a_cell_that_trains_nothing_has_no_ranks() -> None:
    base = Cell(method="base", parallelism="ddp", devices=2)
    assert (base.is_distributed, base.ranks) == (False, 1)
