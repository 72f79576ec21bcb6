"""A cache of its own with the tiny random Llama in it, made once for all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Directory of the packaged `tiny-llama`; TUNEBENCH_CACHE points above it meanwhile."""
    from harness.models import packaged

    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNEBENCH_CACHE", str(cache))
        yield packaged.ensure_model("tiny-llama")
