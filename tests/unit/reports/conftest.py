"""A results directory of a whole sweep, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import synthetic_results

from reports.records.load import Result, load_records


@pytest.fixture(scope="session")
def results_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_results.build(tmp_path_factory.mktemp("sweep") / "results")


@pytest.fixture(scope="session")
def results(results_directory: Path) -> list[Result]:
    return load_records(results_directory)
