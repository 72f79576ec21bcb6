"""Predictions with the op cache equal those without it; each cached answer is compared too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_simulate import CONFIG, ask

from harness.records.prediction import Request
from matrices.catalogue.gpus import gpu
from matrices.cell import Adapter, Cell, Data, Model, Quantization, Train

pytestmark = pytest.mark.slow

LAYERS = 8
UNCACHED = (
    "import harness.simulate.memory.ledger",
    "harness.simulate.memory.ledger.cached = False",
)
CHECKED = ("import harness.simulate.memory.ledger", "harness.simulate.memory.ledger.checked = True")
REENTRANT = {"gradient_checkpointing": True, "use_reentrant": True}
NON_REENTRANT = {"gradient_checkpointing": True, "use_reentrant": False}


def cell(method: str, model: Model, **settings: Any) -> Cell:
    kbit = settings.pop("kbit_preparation", True)
    return Cell(
        method=method,  # type: ignore[arg-type]
        model=model,
        data=Data(max_length=256),
        train=Train(**settings),
        adapter=None if method == "full" else Adapter(dropout=0.1),
        quantization=Quantization(kbit_preparation=kbit) if method == "qlora" else None,
    )


def shipped(name: str, **overrides: Any) -> Model:
    return Model(name=name, config_overrides=overrides)


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> list[Cell]:
    config = tmp_path_factory.mktemp("model") / "config.json"
    config.write_text(json.dumps(CONFIG | {"num_hidden_layers": LAYERS}))
    llama = Model(name="tiny", config=str(config))
    # Five sliding layers to one that sees all; an odd one out in every sixth place.
    sliding = shipped("gemma-3-1b", num_hidden_layers=14)
    return [
        cell("full", llama, **REENTRANT),
        cell("full", llama, gradient_accumulation_steps=2, optimizer="adamw_torch_fused"),
        cell("full", llama, **NON_REENTRANT, optimizer="adafactor", autocast=False),
        cell("lora", llama, **REENTRANT, autocast=False, gradient_accumulation_steps=2),
        cell("lora", llama, **NON_REENTRANT, optimizer="adamw_8bit"),
        cell("qlora", llama, **REENTRANT),
        cell("qlora", llama, kbit_preparation=False),
        cell("lora", sliding, **REENTRANT),
        cell("lora", shipped("granite-20b-code", n_layer=LAYERS), **NON_REENTRANT),
        # The router's scores leave their layers for the balance loss.
        cell("lora", shipped("mixtral-8x7b", num_hidden_layers=LAYERS), **REENTRANT),
    ]


def test_the_same_predictions(cells: list[Cell], tmp_path: Path) -> None:
    request = Request(cells=cells, judge=[gpu("a100-80gb")], workers=2, self_check=False)
    plain = ask(request, tmp_path, *UNCACHED)
    cached = ask(request, tmp_path, *CHECKED)
    for one, other in zip(plain, cached, strict=True):
        assert one.status == "predicted", one.reason
        one.simulation_seconds = other.simulation_seconds = None
        assert one == other
