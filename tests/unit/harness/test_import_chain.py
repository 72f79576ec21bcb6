"""Who may import whom, and no torch where an answer must be quick."""

from __future__ import annotations

import ast
import functools
import graphlib
import subprocess
import sys
from pathlib import Path

CHAIN = ("matrices", "harness", "reports", "launch")

# Every room: a folder with its files, or a file that stands beside the folders. From the ground
# up: a room imports only rooms that stand before it.
ORDER = (
    *("matrices", "matrices.errors", "matrices.parallelism", "matrices.cell"),
    *("matrices.libraries", "matrices.files"),
    *("matrices.accelerate_profiles", "matrices.catalogue", "matrices.language"),
    *("matrices.load", "matrices.expand", "matrices.rules", "matrices.reference"),
    *("harness", "harness.system", "harness.device", "harness.records", "harness.models"),
    *("harness.data", "harness.evaluation", "harness.evaluation.tasks", "harness.train"),
    *("harness.verify", "harness.meters.memory", "harness.meters", "harness.ranks"),
    *("harness.measurement", "harness.preflight", "harness.phases", "harness.worker"),
    *("harness.simulate", "harness.simulate.libraries", "harness.simulate.step_time"),
    *("harness.simulate.memory", "harness.simulate.batches", "harness.simulate.device"),
    *("harness.simulate.parallel", "harness.simulate.patches"),
    *("harness.simulate.run", "harness.simulate.make_prediction", "harness.simulate.serve"),
    "harness.simulate.__main__",
    *("reports", "reports.text", "reports.statistics", "reports.records", "reports.tables"),
    *("reports.predictions", "reports.claims", "reports.show", "reports.output"),
    *("launch", "launch.output", "launch.processes", "launch.planning", "launch.display"),
    *("launch.predict", "launch.fit", "launch.cells", "launch.engines"),
    *("launch.engines.results_watch", "launch.engines.remote_plan", "launch.engines.order"),
    *("launch.engines.engine", "launch.engines.debug"),
    *("launch.engines.ray", "launch.engines.slurm", "launch.slurm_task", "launch.engines.status"),
    *("launch.commands", "launch.cli", "launch.entry"),
)
HEAVY = {"torch", "transformers", "datasets", "peft", "trl", "bitsandbytes", "lm_eval"}
# Folders whose own files stand beside further folders.
OPEN = {*CHAIN, "harness.simulate", "launch.engines"}


def modules(repository: Path) -> dict[str, Path]:
    """Every file of the four packages by its dotted name."""
    files = {room: sorted((repository / room).rglob("*.py")) for room in CHAIN}
    return {
        ".".join(file.relative_to(repository).with_suffix("").parts).removesuffix(".__init__"): file
        for found in files.values()
        for file in found
    }


@functools.cache
def imported(file: Path) -> frozenset[str]:
    """Dotted names a file imports anywhere, within functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            assert node.module is not None
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found)


def room_of(module: str, file: Path) -> str:
    folder = module.rpartition(".")[0]
    return module if file.name == "__init__.py" or folder in OPEN else folder


def test_a_room_imports_only_rooms_before_it(repository: Path) -> None:
    known = modules(repository)
    rooms = {module: room_of(module, file) for module, file in known.items()}
    assert set(rooms.values()) == set(ORDER), "a room without its place in ORDER, or the reverse"
    wrong = [
        f"{module} imports {other}"
        for module, file in known.items()
        for other in imported(file) & known.keys()
        if known[other].name != "__init__.py"
        and ORDER.index(rooms[other]) > ORDER.index(rooms[module])
    ]
    assert wrong == []


def test_no_two_files_of_a_room_import_each_other(repository: Path) -> None:
    known = modules(repository)
    graph = {module: imported(file) & known.keys() - {module} for module, file in known.items()}
    # Raises CycleError, which names the circle.
    tuple(graphlib.TopologicalSorter(graph).static_order())


def test_no_folder_holds_more_than_can_be_read_at_a_glance(repository: Path) -> None:
    folders = {file.parent for file in modules(repository).values()}
    for folder in folders - {repository / "matrices"}:  # which holds the shipped matrices too
        shown = [each.name for each in folder.iterdir() if not each.name.startswith("__")]
        assert len(shown) <= 16, f"{folder}: {sorted(shown)}"


def test_every_module_of_the_light_rooms_is_without_torch(repository: Path) -> None:
    """Nor what takes as long to import."""
    names = [
        ".".join(file.relative_to(repository).with_suffix("").parts)
        for room in ("matrices", "reports", "launch")
        for file in sorted((repository / room).rglob("*.py"))
        if file.stem not in ("__init__", "__main__")
    ]
    code = (
        f"import importlib, sys\nfor name in {names}:\n    importlib.import_module(name)\n"
        f"    heavy = {HEAVY} & sys.modules.keys()\n    assert not heavy, (name, heavy)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
