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
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from harness.meters.memory import Event, Storage
from harness.simulate.fast_fake import Layout, layout_of, make
from harness.simulate.ledger import SimulatedLedger

# At each end: the outermost may differ (what comes before and after them does), the next two agree.
ALWAYS_RUN = 3

_INDEX_NAMES = frozenset(("layer_idx", "layer_id", "layer_index", "layer_number"))
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


class Unrepeatable(RuntimeError):
    """Layers taken for alike turned out not to be."""


class _Birth(NamedTuple):
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
_Step = tuple[int | str, _Birth | None]


class _Forward(NamedTuple):
    """`out` is the number of the output's storage; `wrapped` says it is returned in a tuple."""

    steps: tuple[_Step, ...]
    out: int
    layout: Layout
    wrapped: bool


class _Backward(NamedTuple):
    """`dead` are numbers of storages that died between the call and its backward; `grad` belongs to
    the input, `grads` to the parameters that got a new one."""

    steps: tuple[_Step, ...]
    dead: frozenset[int]
    grad: tuple[int, Layout]
    grads: dict[str, tuple[int, Layout]]


class _Site:
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


class _Call:
    """One call of a layer: its storages by number."""

    def __init__(self, site: _Site, key: Any) -> None:
        self.site, self.key = site, key
        self.storages: list[Storage] = []
        self.numbers: dict[Storage, int] = {}
        self.born_forward = 0
        self.began = 0
        self.dead_before: frozenset[int] = frozenset()
        self.grads_before: tuple[bool, ...] = ()
        self.roles: dict[Storage, str] = {}
        self.raws: dict[str, Any] = {}

    def add(self, storage: Storage) -> int:
        self.numbers[storage] = len(self.storages)
        self.storages.append(storage)
        return self.numbers[storage]

    def dead(self) -> frozenset[int]:
        return frozenset(
            at for at in range(self.born_forward) if self.storages[at].died is not None
        )


class Repeats:
    """Follows the layers of one model. `ran` and `played` count calls."""

    def __init__(self, ledger: SimulatedLedger, model: nn.Module) -> None:
        self._ledger = ledger
        self.ran = self.played = 0
        self._forwards: dict[Any, _Forward] = {}
        self._backwards: dict[Any, _Backward] = {}
        self._last: dict[Any, Any] = {}
        self._samples: dict[Any, _Call] = {}
        self._pending: list[_Call] = []
        self._stacks = [[_Site(layer, name) for name, layer in stack] for stack in _stacks(model)]
        for stack in self._stacks:
            for site in stack:
                site.layer.forward = functools.partial(self._called, site)  # type: ignore[method-assign]

    def settle(self) -> None:
        """Something outside let go of what layers made (autocast's copies of weights): what died of
        a layer that ran has died of those that were played back."""
        for call in self._pending:
            sample = self._samples[call.key]
            for at in sorted(sample.dead() - call.dead()):
                self._ledger.gone(call.storages[at])
        # Without a graph there is no backward to wait for.
        self._pending = [call for call in self._pending if call.raws]

    def _called(self, site: _Site, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, FakeTensor) or _saves_elsewhere():
            return site.original(*args, **kwargs)
        if site.kind is None:
            self._sort_out()
        inputs = _described((args, kwargs))
        if inputs is None:
            return site.original(*args, **kwargs)
        key = (site.kind, self._surroundings(), hidden.is_leaf, site.grads(), inputs)
        call = _Call(site, key)
        forward = self._forwards.get(key)
        if forward is None or site.always_runs():
            self.ran += 1
            return self._run(call, hidden, args, kwargs)
        self.played += 1
        if torch.is_grad_enabled() and hidden.requires_grad:
            out = _Played.apply(hidden, self, call, forward)
        elif torch.is_grad_enabled():
            raise Unrepeatable(f"{site.name} is trained on an input without gradient")
        else:
            out = self._play_forward(call, forward)
        return (out,) if forward.wrapped else out

    def _surroundings(self) -> tuple[Any, ...]:
        kind = self._ledger.device_type
        return (
            self._ledger.phase,
            torch.is_grad_enabled(),
            torch.is_autocast_enabled(kind),
            torch.get_autocast_dtype(kind),
            torch.is_autocast_cache_enabled(),
        )

    def _sort_out(self) -> None:
        for stack in self._stacks:
            kinds: dict[Any, list[_Site]] = {}
            for site in stack:
                kinds.setdefault(_structure(site.layer), []).append(site)
            for alike in kinds.values():
                for position, site in enumerate(alike):
                    site.kind, site.position, site.count = alike[0], position, len(alike)
                    site.parameters = {
                        name: parameter
                        for name, parameter in site.layer.named_parameters()
                        if parameter.requires_grad
                    }

    def _run(self, call: _Call, hidden: torch.Tensor, args: Any, kwargs: Any) -> Any:
        events = self._ledger.events
        start = len(events)
        out = call.site.original(*args, **kwargs)
        wrapped = isinstance(out, tuple) and len(out) == 1
        tensor = out[0] if wrapped else out
        if not isinstance(tensor, FakeTensor):
            return out
        held = self._ledger.known(hidden)
        if held is not None:
            call.roles[held] = "hidden"
        steps = _steps(events[start:], call)
        call.born_forward = len(call.storages)
        number = call.numbers.get(self._ledger.known(tensor))  # type: ignore[arg-type]
        layout = layout_of(tensor)
        if steps is None or number is None or layout is None:
            return out
        if call.site.outermost():
            return out
        forward = _Forward(steps, number, layout, wrapped)
        self._compare(self._forwards, call.key, forward, call)
        self._samples[call.key] = call
        if tensor.requires_grad and hidden.requires_grad:
            tensor.register_hook(functools.partial(self._backward_begins, call))
            hidden.register_hook(functools.partial(self._backward_ends, call))
        return out

    def _compare(self, agreed: dict[Any, Any], key: Any, found: Any, call: _Call) -> None:
        """Two layers in a row that do the same are believed; from then on all have to."""
        kind = (key, type(found))
        if key in agreed:
            if agreed[key] != found:
                raise Unrepeatable(f"{call.site.name} is not like the layers before it")
        elif self._last.get(kind) == found:
            agreed[key] = found
        self._last[kind] = found

    def _backward_begins(self, call: _Call, grad: torch.Tensor) -> None:
        call.began = len(self._ledger.events)
        call.grads_before = call.site.grads()
        call.dead_before = call.dead()
        given = self._ledger.known(grad)
        if given is not None:
            call.roles[given] = "grad"
        for name, parameter in call.site.parameters.items():
            if parameter.grad is not None:
                old = self._ledger.known(parameter.grad)
                if old is not None:
                    call.roles[old] = f"grad of {name}"

    def _backward_ends(self, call: _Call, grad: torch.Tensor) -> None:
        steps = _steps(self._ledger.events[call.began :], call)
        kept = self._kept(call, grad)
        if steps is None or kept is None:
            return
        found = _Backward(steps, call.dead_before, kept[0], kept[1])
        self._compare(self._backwards, (call.key, call.grads_before), found, call)

    def _kept(
        self, call: _Call, grad: torch.Tensor
    ) -> tuple[tuple[int, Layout], dict[str, tuple[int, Layout]]] | None:
        """The gradients a backward left behind; None if it left anything else."""
        alive = {s: at for s, at in call.numbers.items() if s.died is None}
        ours = alive.pop(self._ledger.known(grad), None)  # type: ignore[arg-type]
        layout = layout_of(grad)
        if ours is None or layout is None:
            return None
        grads: dict[str, tuple[int, Layout]] = {}
        for name, parameter in call.site.parameters.items():
            if parameter.grad is None:
                continue
            number = alive.pop(self._ledger.known(parameter.grad), None)  # type: ignore[arg-type]
            its = layout_of(parameter.grad)
            if number is not None and its is not None:
                grads[name] = (number, its)
        return None if alive else ((ours, layout), grads)

    def _play_forward(self, call: _Call, forward: _Forward) -> torch.Tensor:
        out: torch.Tensor = make(forward.layout)
        self._play(call, forward.steps, {forward.out: out})
        call.born_forward = len(call.storages)
        self._pending.append(call)
        return out

    def play_backward(self, call: _Call, grad: torch.Tensor) -> torch.Tensor:
        """Write what this layer's backward would, and leave the gradients it would."""
        site = call.site
        found = self._backwards.get((call.key, site.grads()))
        if found is None:
            raise Unrepeatable(f"no two layers before {site.name} had the same backward")
        if call.dead() != found.dead:
            raise Unrepeatable(f"{site.name}'s forward was not held as that of the layers before")
        self._pending.remove(call)
        call.raws["grad"] = grad.untyped_storage()
        for name, parameter in site.parameters.items():
            if parameter.grad is not None:
                call.raws[f"grad of {name}"] = parameter.grad.untyped_storage()
        made = {number: make(layout) for number, layout in found.grads.values()}
        ours = made[found.grad[0]] = make(found.grad[1])
        self._play(call, found.steps, made)
        for name, (number, _) in found.grads.items():
            site.parameters[name].grad = made[number]
        call.raws.clear()
        return ours

    def _play(self, call: _Call, steps: Iterable[_Step], made: dict[int, torch.Tensor]) -> None:
        ledger = self._ledger
        for which, birth in steps:
            if birth is not None:
                storage = _born(birth, call.site.name, ledger)
                number = call.add(storage)
                tensor = made.get(number)
                if tensor is not None:
                    ledger.adopt(tensor, storage)
                else:
                    ledger.born(storage)
            elif isinstance(which, str):
                ledger.let_go(call.raws[which])
            elif call.storages[which].died is None:
                ledger.gone(call.storages[which])
            else:
                raise Unrepeatable(f"{call.site.name} was to free a storage that is gone")


class _Played(torch.autograd.Function):
    """A layer that is played back, in the autograd graph. It holds its input, as layers do."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, repeats: Any, call: Any, forward: Any) -> Any:
        ctx.repeats, ctx.call = repeats, call
        call.raws["hidden"] = hidden.untyped_storage()
        return repeats._play_forward(call, forward)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        repeats, call = ctx.repeats, ctx.call
        ctx.repeats = ctx.call = None
        return repeats.play_backward(call, grads[0]), None, None, None


_following: list[Repeats] = []
_clear = torch.clear_autocast_cache


def _clear_and_tell() -> None:
    _clear()
    for repeats in _following:
        repeats.settle()


def follow_autocast() -> None:
    """Autocast keeps its copies of weights until its block ends, whoever made them."""
    torch.clear_autocast_cache = _clear_and_tell


def _stacks(model: nn.Module) -> Iterator[list[tuple[str, nn.Module]]]:
    """Lists of layers of one class long enough to be worth it, outermost lists only."""
    found: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f) for f in found):
            continue
        found.append(f"{name}.")
        if len(module) > 2 * ALWAYS_RUN and len({type(layer) for layer in module}) == 1:
            yield [(f"{name}.{at}", layer) for at, layer in enumerate(module)]


def _structure(layer: nn.Module) -> tuple[Any, ...]:
    """All that may make one layer of a class behave differently from another."""
    parts: list[Any] = []
    for name, module in layer.named_modules():
        plain = sorted(
            (key, repr(value))
            for key, value in vars(module).items()
            if isinstance(value, _PLAIN) and key not in _INDEX_NAMES
        )
        hooks = (len(module._forward_hooks), len(module._forward_pre_hooks))
        parts.append((name, type(module), tuple(plain), hooks))
        parts += [
            (key, _described(value), _quantized(value))
            for key, value in (*module._parameters.items(), *module._buffers.items())
        ]
    return tuple(parts)


def _quantized(value: Any) -> tuple[Any, ...]:
    state = getattr(value, "quant_state", None)
    if state is None:
        return ()
    return (tuple(state.shape), state.dtype, state.blocksize, state.quant_type, state.nested)


def _described(value: Any) -> Any:
    """Equal for values that layers cannot tell apart by their memory; None for anything unknown."""
    if isinstance(value, torch.Tensor):
        return (
            type(value),
            tuple(value.shape),
            value.stride(),
            value.storage_offset(),
            value.dtype,
            value.device,
            value.requires_grad,
        )
    if isinstance(value, dict):
        value = tuple(sorted(value.items()))
    if isinstance(value, tuple | list):
        parts = tuple(_described(part) for part in value)
        return None if None in parts else (type(value), parts)
    return (type(value), value) if isinstance(value, _PLAIN) else None


def _saves_elsewhere() -> bool:
    """Whether what autograd saves is taken away (a checkpoint outside of the layer, offloading)."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _steps(events: list[Event], call: _Call) -> tuple[_Step, ...] | None:
    """Events as steps; None if there is one that cannot be played back."""
    steps: list[_Step] = []
    for event in events:
        storage = event.storage
        if event.delta > 0 and storage not in call.numbers:
            steps.append((call.add(storage), _birth(storage, call.site.name)))
        elif event.delta < 0 and storage in call.numbers:
            steps.append((call.numbers[storage], None))
        elif event.delta < 0 and storage in call.roles:
            steps.append((call.roles[storage], None))
        else:
            return None
    return tuple(steps)


def _birth(storage: Storage, layer: str) -> _Birth:
    inside = storage.module == layer or storage.module.startswith(f"{layer}.")
    module = storage.module[len(layer) :] if inside else storage.module
    return _Birth(
        storage.nbytes,
        storage.op,
        storage.shape,
        storage.dtype,
        inside,
        module,
        storage.guess,
        storage.category,
    )


def _born(birth: _Birth, layer: str, ledger: SimulatedLedger) -> Storage:
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
