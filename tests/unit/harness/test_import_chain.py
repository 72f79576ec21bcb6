"""matrices <- harness <- reports <- launch, and no torch where an answer must be quick."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

CHAIN = ("matrices", "harness", "reports", "launch")


def imported(file: Path) -> set[str]:
    """Dotted names a file imports anywhere, within functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("room", CHAIN)
def test_a_room_imports_only_rooms_before_it(room: str, repository: Path) -> None:
    files = sorted((repository / room).rglob("*.py"))
    assert files
    later = CHAIN[CHAIN.index(room) + 1 :]
    for file in files:
        rooms = {name.split(".")[0] for name in imported(file)}
        assert rooms.isdisjoint(later), f"{file} imports {rooms & set(later)}"


@pytest.mark.parametrize(
    "statement",
    [
        "import matrices, matrices.cell, matrices.load, matrices.expand, matrices.rules",
        "import harness.record, harness.store, harness.provenance, harness.files",
        "import launch.cli",
        "import reports, reports.frame, reports.page, reports.results, reports.show, reports.write",
    ],
)
def test_no_torch(statement: str, repository: Path) -> None:
    heavy = ("torch", "transformers", "datasets", "peft", "trl", "bitsandbytes", "lm_eval")
    code = f"{statement}\nimport sys\nprint([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_every_module_of_the_light_rooms_is_without_torch(repository: Path) -> None:
    names = [
        f"{room}.{file.stem}"
        for room in ("matrices", "reports", "launch")
        for file in sorted((repository / room).glob("*.py"))
        if file.stem not in ("__init__", "__main__")
    ]
    code = (
        f"import importlib, sys\nfor name in {names}:\n    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, name\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
