"""What one call of a layer wrote into the ledger, so that it can be written again for another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from harness.meters.memory.ledger import Event, Storage
from harness.simulate.memory.ledger import SimulatedLedger
from harness.simulate.memory.op_cache import Layout

# At each end: the outermost may differ (what comes before and after them does), the next two agree.
ALWAYS_RUN = 3


class Birth(NamedTuple):
    """A storage as the ledger knows it; `module` below the layer when `inside`."""

    nbytes: int
    op: str
    shape: tuple[int, ...]
    dtype: str
    inside: bool
    module: str
    guess: str
    category: str | None


# The storage's number within the call and its birth, or None for its death; deaths of storages that
# came from outside have a role instead of a number.
Step = tuple[int | str, Birth | None]


class Forward(NamedTuple):
    """`out` is the number of the output's storage; it is returned alone, or with None after it in a
    tuple of `wrapped`."""

    steps: tuple[Step, ...]
    traffic: dict[Any, int]
    out: int
    layout: Layout
    wrapped: int


class Backward(NamedTuple):
    """`dead` are numbers of storages that died between the call and its backward, `input_dead` says
    whether its input did; `grad` belongs to the input, `grads` to the parameters that got one."""

    steps: tuple[Step, ...]
    traffic: dict[Any, int]
    dead: frozenset[int]
    input_dead: bool
    grad: tuple[int, Layout]
    grads: dict[str, tuple[int, Layout]]


class Site:
    """A layer in its place."""

    def __init__(self, layer: nn.Module, name: str) -> None:
        self.layer, self.name = layer, name
        self.original: Callable[..., Any] = layer.forward
        self.parameters: dict[str, nn.Parameter] = {}
        self.kind: Any = None
        self.position = self.count = 0

    def always_runs(self) -> bool:
        return not ALWAYS_RUN <= self.position < self.count - ALWAYS_RUN

    def outermost(self) -> bool:
        return self.position in (0, self.count - 1)

    def grads(self) -> tuple[bool, ...]:
        return tuple(p.grad is None for p in self.parameters.values())


class Call:
    """One call of a layer: its storages by number."""

    def __init__(self, site: Site, key: Any) -> None:
        self.site, self.key = site, key
        self.storages: list[Storage] = []
        self.numbers: dict[Storage, int] = {}
        self.born_forward = 0
        self.began = 0
        self.counts: dict[Any, int] = {}
        self.dead_before: frozenset[int] = frozenset()
        self.grads_before: tuple[bool, ...] = ()
        self.roles: dict[Storage, str] = {}
        # Of a layer that is played back: who plays the roles, and what it holds of its input.
        self.players: dict[str, Storage] = {}
        self.adopted: set[int] = set()
        self.held: Any = None
        # Whoever is played back follows the last that ran in what becomes of its storages.
        self.sample: Call | None = None
        self.followers: list[Call] = []
        self.input: Storage | None = None
        self.input_dead: bool | None = None

    def add(self, storage: Storage) -> int:
        self.numbers[storage] = len(self.storages)
        self.storages.append(storage)
        return self.numbers[storage]

    def number(self, storage: Storage | None) -> int | None:
        return self.numbers.get(storage) if storage is not None else None

    def dead(self) -> frozenset[int]:
        return frozenset(
            at for at in range(self.born_forward) if self.storages[at].died is not None
        )


def transcribe(events: list[Event], call: Call) -> tuple[Step, ...] | None:
    """Events as steps; None if there is one that cannot be played back."""
    steps: list[Step] = []
    for event in events:
        storage = event.storage
        if event.delta > 0 and storage not in call.numbers:
            steps.append((call.add(storage), birth_of(storage, call.site.name)))
        elif event.delta < 0 and storage in call.numbers:
            steps.append((call.numbers[storage], None))
        elif event.delta < 0 and storage in call.roles:
            steps.append((call.roles[storage], None))
        else:
            return None
    return tuple(steps)


def birth_of(storage: Storage, layer: str) -> Birth:
    inside = storage.module == layer or storage.module.startswith(f"{layer}.")
    module = storage.module[len(layer) :] if inside else storage.module
    return Birth(
        storage.nbytes,
        storage.op,
        storage.shape,
        storage.dtype,
        inside,
        module,
        storage.guess,
        storage.category,
    )


def storage_of(birth: Birth, layer: str, ledger: SimulatedLedger) -> Storage:
    return Storage(
        birth.nbytes,
        birth.op,
        birth.shape,
        birth.dtype,
        layer + birth.module if birth.inside else birth.module,
        ledger.phase,
        birth.guess,
        birth.category,
        born=ledger.visit,
    )
