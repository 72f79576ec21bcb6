"""What ARCHITECTURE.md, CONTRIBUTING.md and README.md say of the code is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_import_chain import ORDER

TREE = re.compile(r"^```\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# In code or as the target of a link.
PATH = re.compile(r"[`(]((?:matrices|harness|reports|launch|tests|\.ci)/[\w./-]*|[A-Z]+\.md)[`)#]")


def rooms_of(tree: str) -> list[str]:
    """Every room of the tree by its dotted name. A line has one path or several, then what they
    hold; what is indented under it lies in its folder."""
    found: list[str] = []
    above: list[str] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = [
            path.strip(" /").removesuffix(".py") for path in line.split("  ")[depth].split(",")
        ]
        found += [".".join([*above[:depth], name]) for name in names]
        above[depth:] = names[:1]
    return found


def test_every_room_has_its_line_under_those_it_imports(repository: Path) -> None:
    [tree] = TREE.findall((repository / "ARCHITECTURE.md").read_text())
    rooms = rooms_of(tree)
    assert sorted(rooms) == sorted(ORDER)
    for folder in {room.rpartition(".")[0] for room in rooms}:
        beside = [room for room in rooms if room.rpartition(".")[0] == folder]
        assert beside == sorted(beside, key=ORDER.index), folder


@pytest.mark.parametrize("name", ["ARCHITECTURE.md", "CONTRIBUTING.md", "README.md"])
def test_every_path_in_it_exists(name: str, repository: Path) -> None:
    named = set(PATH.findall((repository / name).read_text()))
    assert len(named) > 3
    assert {path for path in named if not (repository / path).exists()} == set()
