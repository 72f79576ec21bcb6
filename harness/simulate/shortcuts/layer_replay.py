"""Layers that repeat are run a few times and played back the other times, exactly.

A decoder is one layer many times over. The first three and the last three layers of each kind
always run; what they write into the ledger (births and deaths of storages, in order) is taken down,
forward and backward apart, and has to be the same from layer to layer. Only then are the layers in
between played back: the same births and deaths are written under the layer's own name, its output,
its input's gradient and its parameters' gradients are made, and nothing else is computed. Layers
count as alike only if their modules, parameters and inputs are; anything seen to differ later
raises Unrepeatable, and the cell has to be simulated without.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from harness.meters.memory.ledger import Storage
from harness.simulate.memory.ledger import SimulatedLedger
from harness.simulate.memory.op_cache import Layout, layout_of, make
from harness.simulate.shortcuts.equal_layers import checkpointed, described, stacks, structure
from harness.simulate.shortcuts.layer_recording import (
    ALWAYS_RUN,
    Backward,
    Call,
    Forward,
    Site,
    storage_of,
    transcribe,
)

# For tests: whether layers are played back at all.
on = True


class Unrepeatable(RuntimeError):
    """Layers taken for alike turned out not to be."""


class Repeats:
    """Follows the layers of one model. `ran` and `played` count calls."""

    def __init__(self, ledger: SimulatedLedger, model: nn.Module) -> None:
        self._ledger = ledger
        self.ran = self.played = 0
        self._failure: str | None = None
        self._forwards: dict[Any, Forward] = {}
        self._backwards: dict[Any, Backward] = {}
        self._last: dict[Any, Any] = {}
        self._samples: dict[Any, Call] = {}
        self._stacks = [
            [Site(layer, name) for name, layer in stack]
            for stack in stacks(model, 2 * ALWAYS_RUN + 1)
        ]
        for stack in self._stacks:
            for site in stack:
                site.layer.forward = functools.partial(self._called, site)

    def _called(self, site: Site, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, FakeTensor) or self._inside_checkpoint():
            return site.original(*args, **kwargs)
        self.finish()
        if site.kind is None:
            self._sort_out()
        inputs = described((args, kwargs))
        if inputs is None:
            return site.original(*args, **kwargs)
        key = (site.kind, self._surroundings(), hidden.is_leaf, site.grads(), inputs)
        call = Call(site, key)
        forward = self._forwards.get(key)
        if forward is None or site.always_runs() or not hidden.requires_grad:
            self.ran += 1
            return self._run(call, hidden, args, kwargs)
        self.played += 1
        call.input = self._ledger.known(hidden)
        call.sample = self._samples[key]
        call.sample.followers.append(call)
        if _holds_input(call.sample):
            call.held = hidden.untyped_storage()
        out = _Played.apply(hidden, self, call, forward)
        return (out, *[None] * (forward.wrapped - 1)) if forward.wrapped else out

    def _inside_checkpoint(self) -> bool:
        """Whether this is not the layer's whole pass: a checkpoint outside of it (transformers
        before 4.53) or offloading decides what becomes of its activations. Then all layers run."""
        if not torch.is_grad_enabled() or self._ledger.phase != "forward":
            return True
        return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None

    def _surroundings(self) -> tuple[Any, ...]:
        kind = self._ledger.device_type
        return (
            self._ledger.phase,
            # What the ledger takes for logits depends on the widths it has seen at the head.
            frozenset(self._ledger.logit_widths),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled(kind),
            torch.get_autocast_dtype(kind),
            torch.is_autocast_cache_enabled(),
        )

    def _sort_out(self) -> None:
        for stack in self._stacks:
            kinds: dict[Any, list[Site]] = {}
            for site in stack:
                kinds.setdefault(structure(site.layer), []).append(site)
            for alike in kinds.values():
                for position, site in enumerate(alike):
                    site.kind, site.position, site.count = alike[0], position, len(alike)
                    site.parameters = {
                        name: parameter
                        for name, parameter in site.layer.named_parameters()
                        if parameter.requires_grad
                    }

    def _run(self, call: Call, hidden: torch.Tensor, args: Any, kwargs: Any) -> Any:
        events = self._ledger.events
        start, before = len(events), self._counts()
        out = call.site.original(*args, **kwargs)
        parts = out if isinstance(out, tuple) else (out,)
        tensor = parts[0]
        if not isinstance(tensor, FakeTensor) or any(part is not None for part in parts[1:]):
            return out
        wrapped = len(parts) if isinstance(out, tuple) else 0
        call.input = self._ledger.known(hidden)
        if call.input is not None:
            call.roles[call.input] = "input"
        steps = transcribe(events[start:], call)
        call.born_forward = len(call.storages)
        number = call.number(self._ledger.known(tensor))
        layout = layout_of(tensor)
        if steps is None or number is None or layout is None:
            return out
        if call.site.outermost() or (checkpointed(call.site.layer) and _escapes(call, number)):
            return out
        forward = Forward(steps, self._traffic_since(before), number, layout, wrapped)
        self._compare(self._forwards, call.key, forward, call)
        self._samples[call.key] = call
        for storage in _kept_alive(call, number):
            self._ledger.mourners[storage] = functools.partial(self._mourn, call, storage)
        if tensor.requires_grad and hidden.requires_grad:
            tensor.register_hook(functools.partial(self._backward_begins, call))
            hidden.register_hook(functools.partial(self._backward_ends, call))
        return out

    def _mourn(self, sample: Call, storage: Storage) -> None:
        """Autocast let go of its copy of a weight: the same has died of the layers played back.

        Anything else that outlives its layer was handed around it, and what is done with it then
        depends on how many there are.
        """
        if sample.followers and not _autocast_ends:
            self._failure = f"{storage.op} in {storage.module} is used outside of its layer"
        for call in sample.followers:
            same = call.storages[sample.numbers[storage]]
            if same.died is None:
                self._ledger.gone(same)

    def finish(self) -> None:
        """Raises Unrepeatable for what could not be raised when it was seen."""
        if self._failure is not None:
            raise Unrepeatable(self._failure)

    def _compare(self, agreed: dict[Any, Any], key: Any, found: Any, call: Call) -> None:
        """Two layers in a row that do the same are believed; from then on all have to."""
        kind = (key, type(found))
        if key in agreed:
            if agreed[key] != found:
                raise Unrepeatable(f"{call.site.name} is not like the layers before it")
        elif self._last.get(kind) == found:
            agreed[key] = found
        self._last[kind] = found

    def _counts(self) -> dict[Any, int]:
        return self._ledger.traffic.counts() if self._ledger.traffic is not None else {}

    def _traffic_since(self, before: dict[Any, int]) -> dict[Any, int]:
        now = self._counts()
        return {k: n - before.get(k, 0) for k, n in now.items() if n != before.get(k, 0)}

    def _backward_begins(self, call: Call, grad: torch.Tensor) -> None:
        call.began, call.counts = len(self._ledger.events), self._counts()
        call.grads_before = call.site.grads()
        call.dead_before = call.dead()
        call.input_dead = call.input is None or call.input.died is not None
        self._cast(call, grad)
        call.roles |= {storage: role for role, storage in call.players.items()}

    def _backward_ends(self, call: Call, grad: torch.Tensor) -> None:
        steps = transcribe(self._ledger.events[call.began :], call)
        kept = self._kept(call, grad)
        if steps is None or kept is None:
            return
        traffic = self._traffic_since(call.counts)
        found = Backward(steps, traffic, call.dead_before, bool(call.input_dead), kept[0], kept[1])
        self._compare(self._backwards, (call.key, call.grads_before), found, call)

    def _kept(
        self, call: Call, grad: torch.Tensor
    ) -> tuple[tuple[int, Layout], dict[str, tuple[int, Layout]]] | None:
        """The gradients a backward left behind; None if it left anything else."""
        alive = {at for storage, at in call.numbers.items() if storage.died is None}
        ours = call.number(self._ledger.known(grad))
        layout = layout_of(grad)
        if ours is None or layout is None:
            return None
        grads: dict[str, tuple[int, Layout]] = {}
        for name, parameter in call.site.parameters.items():
            if parameter.grad is None:
                continue
            number, its = call.number(self._ledger.known(parameter.grad)), layout_of(parameter.grad)
            if number is not None and its is not None:
                grads[name] = (number, its)
        left = alive - {ours} - {number for number, _ in grads.values()}
        return None if left else ((ours, layout), grads)

    def _play_forward(self, call: Call, forward: Forward) -> torch.Tensor:
        out: torch.Tensor = make(forward.layout)
        self._play(call, forward, {forward.out: out})
        call.born_forward = len(call.storages)
        return out

    def play_backward(self, call: Call, grad: torch.Tensor) -> torch.Tensor:
        """Write what this layer's backward would, and leave the gradients it would."""
        site = call.site
        found = self._backwards.get((call.key, site.grads()))
        if found is None:
            raise Unrepeatable(f"no two layers before {site.name} had the same backward")
        input_dead = call.input is None or call.input.died is not None
        if call.dead() != found.dead or input_dead != found.input_dead:
            raise Unrepeatable(f"{site.name}'s forward was not held as that of the layers before")
        if call.sample is not None:
            call.sample.followers.remove(call)
        self._cast(call, grad)
        made: dict[int, torch.Tensor] = {at: make(layout) for at, layout in found.grads.values()}
        made[found.grad[0]] = make(found.grad[1])
        self._play(call, found, made)
        for name, (number, _) in found.grads.items():
            site.parameters[name].grad = made[number]
        call.held = None
        return made[found.grad[0]]

    def _cast(self, call: Call, grad: torch.Tensor) -> None:
        """Who is there to play the roles: the storages from outside that a backward may free."""
        outside = {"grad": grad}
        for name, parameter in call.site.parameters.items():
            if parameter.grad is not None:
                outside[f"grad of {name}"] = parameter.grad
        for role, tensor in outside.items():
            storage = self._ledger.known(tensor)
            if storage is not None:
                call.players[role] = storage
        if call.input is not None:
            call.players["input"] = call.input

    def _play(self, call: Call, record: Forward | Backward, made: dict[int, torch.Tensor]) -> None:
        ledger = self._ledger
        if ledger.traffic is not None:
            ledger.traffic.add(record.traffic)
        for which, birth in record.steps:
            if birth is not None:
                storage = storage_of(birth, call.site.name, ledger)
                number = call.add(storage)
                tensor = made.get(number)
                if tensor is not None:
                    ledger.adopt(tensor, storage)
                    call.adopted.add(number)
                else:
                    ledger.born(storage)
            elif isinstance(which, str):
                ledger.let_go(call.players[which])
            elif call.storages[which].died is not None:
                raise Unrepeatable(f"{call.site.name} was to free a storage that is gone")
            elif which in call.adopted:
                ledger.let_go(call.storages[which])
            else:
                ledger.gone(call.storages[which])


class _Played(torch.autograd.Function):
    """A layer that is played back, in the autograd graph."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, repeats: Any, call: Any, forward: Any) -> Any:
        ctx.repeats, ctx.call = repeats, call
        return repeats._play_forward(call, forward)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        repeats, call = ctx.repeats, ctx.call
        ctx.repeats = ctx.call = None
        return repeats.play_backward(call, grads[0]), None, None, None


def _kept_alive(call: Call, out: int) -> list[Storage]:
    """What a call made and left, its output apart."""
    made = call.storages[: call.born_forward]
    return [s for at, s in enumerate(made) if s.died is None and at != out]


def _escapes(call: Call, out: int) -> bool:
    """Whether a checkpointed layer left more than autocast's copies of its weights."""
    return any(storage.op != "aten::_to_copy" for storage in _kept_alive(call, out))


_autocast_ends: list[bool] = []
_clear = torch.clear_autocast_cache


def _clear_and_say() -> None:
    _autocast_ends.append(True)
    try:
        _clear()
    finally:
        _autocast_ends.pop()


def follow_autocast() -> None:
    """Autocast keeps its copies of weights until its block ends, outside of any layer."""
    torch.clear_autocast_cache = _clear_and_say


def _holds_input(sample: Call) -> bool:
    """Whether this layer kept its input for its backward."""
    if sample.input_dead is not None:
        return not sample.input_dead
    return sample.input is not None and sample.input.died is None
