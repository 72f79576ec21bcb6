"""What a rule is, and what it needs to know about where a cell would run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from matrices.cell import Cell


@dataclass(frozen=True)
class Machine:
    """What the rules need to know about where a cell would run. `has_gpu` means a CUDA or ROCm
    device, `compute_capability` is CUDA's (8.6), `packages` are installed distributions
    (`flash-attn`) and their versions. `devices` are its GPUs, or without any the processors that
    may be used, and `nodes` the machines like it that one cell can have; none is not known."""

    has_gpu: bool
    compute_capability: float | None = None
    packages: Mapping[str, str] = field(default_factory=dict)
    devices: int | None = None
    nodes: int | None = 1


@dataclass(frozen=True)
class Refusal:
    rule: str
    reason: str


Rule = Callable[[Cell, Machine], str | None]
