"""The cache of predictions, keyed by everything that can change them.

One JSON file for each prediction, written atomically. A file that cannot be read is replaced.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from pathlib import Path

from pydantic import ValidationError

from harness.models.packaged import cache_directory
from harness.records.prediction import PREDICTION_VERSION, Prediction, Request
from harness.system.files import write_atomically
from launch.predict.simulator_process import OWN_PACKAGES, ROOT
from matrices.cell import Cell, canonical_json

SOURCES = ("*.py", "*.json", "*.yaml")


@functools.cache
def source_hash() -> str:
    """sha256, hex, of all code and data files that a prediction depends on."""
    digest = hashlib.sha256()
    for package in OWN_PACKAGES:
        paths = (path for pattern in SOURCES for path in (ROOT / package).rglob(pattern))
        for path in sorted(paths):
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


class PredictionCache:
    """The cached predictions of one stack and one set of options."""

    def __init__(self, request: Request, stack_identity: str) -> None:
        self.directory = cache_directory() / "predictions"
        options = request.model_dump(mode="json", exclude={"cells", "workers"})
        self.given = [PREDICTION_VERSION, source_hash(), stack_identity, options]

    def path(self, cell: Cell) -> Path:
        text = json.dumps([canonical_json(cell), *self.given], sort_keys=True)
        return self.directory / f"{hashlib.sha256(text.encode()).hexdigest()}.json"

    def get(self, cell: Cell) -> Prediction | None:
        try:
            found = Prediction.model_validate_json(self.path(cell).read_text())
        except (OSError, ValidationError):
            return None
        # The path of a local model is not part of its identity, but it is part of the answer.
        return found.model_copy(update={"cell": cell})

    def put(self, prediction: Prediction) -> None:
        """Keep a prediction. Failed and refused ones are not kept, as they may succeed another
        time. A cache that cannot be written is ignored."""
        if prediction.status != "predicted":
            return
        with contextlib.suppress(OSError):
            self.directory.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path(prediction.cell), prediction.to_json())
