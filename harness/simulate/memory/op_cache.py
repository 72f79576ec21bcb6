"""A cache of op results on fake tensors: an op that is called again on tensors of the same metadata
returns tensors of the same metadata.

The key of an entry is the op, the metadata of its tensor arguments and the values of its other
arguments. The first call goes through FakeTensorMode; the entry says how to make its results again
(a new storage, a view of an argument's storage, the argument itself, a plain value), which is tried
once before the entry is kept. Ops whose results depend on anything else always go through
FakeTensorMode. Its own cache does the same for fewer ops, at several times the cost of a call.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

_K = torch._C.DispatchKey
# Dispatch keys above the kernels: results get neither an autograd graph nor a shared version here.
_ABOVE_KERNELS = functools.reduce(
    lambda keys, name: keys.add(getattr(_K, name)),
    ("ADInplaceOrView", "AutogradFunctionality", "AutogradOther", "AutogradCPU", "AutogradCUDA",
     "AutogradMeta", "PythonTLSSnapshot"),
    torch._C.DispatchKeySet(_K.Python),
)  # fmt: skip
_Without = torch._C._ExcludeDispatchKeyGuard
_With = torch._C._IncludeDispatchKeyGuard
_FAKE = torch._C._TorchDispatchModeKey.FAKE
_META = torch.device("meta")

_make_subclass: Any = torch.Tensor._make_subclass
_empty_strided = torch.empty_strided
# FakeTensor does the same: some optimizers read addresses of tensors that have none.
_warn_at_data_ptr = torch._C._set_warn_deprecated_on_mutable_data_ptr
_active_mode = torch._C._get_dispatch_mode

# Types of arguments that belong to a key as they are.
_PLAIN = frozenset(
    (int, float, bool, str, type(None),
     torch.dtype, torch.device, torch.layout, torch.memory_format)
)  # fmt: skip
# Fake implementations of these ops depend on their arguments only.
_NAMESPACES = frozenset(("aten", "prims", "bitsandbytes"))
_LIFTS = frozenset((torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default))
_UNPREDICTABLE = (
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.inplace_view,
)
_FOREACH_NAMES = (
    "aten::_foreach_",
    "aten::_fused_adam",
    "aten::_fused_sgd",
    "aten::_fused_adagrad",
)

_UNCACHED, _ONE, _FOREACH = range(3)
_VALUE, _ARGUMENT, _ALIAS, _VIEW, _NEW = range(5)


class Output(NamedTuple):
    """How to make one result.

    `source` is the position among the tensor arguments whose storage it shares, `nbytes` what it
    needs of that storage, `attributes` what a FakeTensor holds beside its metadata.
    """

    kind: int
    value: Any = None
    source: int = 0
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    offset: int = 0
    nbytes: int = 0
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    attributes: dict[str, Any] | None = None


class _Entry(NamedTuple):
    """`container` is the type of a list of results, None for a single result."""

    container: type | None
    outputs: tuple[Output, ...]


_NO_RESULT = object()


class OpCache:
    """Calls ops for a dispatch mode that is outside of `fake_mode`.

    With `checked` every answer is compared with FakeTensorMode's own. Raises AssertionError if they
    differ.
    """

    def __init__(self, fake_mode: FakeTensorMode, checked: bool = False) -> None:
        self.checked = checked
        self.hits = self.misses = 0
        self._mode = fake_mode
        self._kinds: dict[Any, int] = {}
        self._entries: dict[Any, _Entry | None] = {}

    def __call__(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        kind = self._kinds.get(func)
        if kind is None:
            kind = self._kinds[func] = _kind(func)
        if kind == _UNCACHED or _active_mode(_FAKE) is not self._mode:
            self.misses += 1
            return func(*args, **kwargs)
        if kind == _FOREACH:
            return self._foreach(func, args, kwargs)
        return self._one(func, args, kwargs)

    def _foreach(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An op over lists does the same to every entry: each entry is a list of one."""
        length = len(args[0])
        calls = [
            (
                [_at(value, at, length) for value in args],
                {name: _at(value, at, length) for name, value in kwargs.items()},
            )
            for at in range(length)
        ]
        if not calls or any(self._key(func, *call) is None for call in calls):
            self.misses += 1
            return func(*args, **kwargs)
        results = [self._one(func, *call) for call in calls]
        return [result[0] for result in results] if func._schema.returns else None

    def _one(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        key = self._key(func, args, kwargs)
        entry = self._entries.get(key) if key is not None else None
        if entry is not None:
            out = _make(entry, args, kwargs)
            if out is not _NO_RESULT:
                self.hits += 1
                if self.checked:
                    _check(func, out, func(*args, **kwargs))
                return out
        self.misses += 1
        out = func(*args, **kwargs)
        if key is not None and key not in self._entries:
            # An op that changed its arguments' metadata has another key next time.
            same = self._key(func, args, kwargs) == key
            self._entries[key] = self._entry(args, kwargs, out) if same else None
        return out

    def _key(self, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """What the results depend on; None if it is more than metadata and plain values."""
        key: list[Any] = [func, torch.get_default_dtype()]
        if not self._describe(key, args):
            return None
        for name, value in kwargs.items():
            key.append(name)
            if not self._describe(key, (value,)):
                return None
        return tuple(key)

    def _describe(self, key: list[Any], values: Iterable[Any]) -> bool:
        for value in values:
            kind = type(value)
            if kind is FakeTensor or isinstance(value, FakeTensor):
                # FakeTensorMode computes with constants.
                if value.fake_mode is not self._mode or value.constant is not None:
                    return False
                key += (kind, value.shape, value.stride(), value.storage_offset(), value.dtype)
                key.append(value._fake_device)
            elif kind in _PLAIN:
                # 1, 1.0 and True are equal, and promote differently.
                key += (kind, value)
            elif kind is list or kind is tuple:
                key += (kind, len(value))
                if not self._describe(key, value):
                    return False
            else:
                return False
        return True

    def _entry(self, args: Any, kwargs: dict[str, Any], out: Any) -> _Entry | None:
        tensors = _tensors(args, kwargs)
        container = type(out) if isinstance(out, tuple | list) else None
        if container not in (None, tuple, list):
            return None
        outputs = [self._output(value, tensors) for value in (out if container else (out,))]
        known = [output for output in outputs if output is not None]
        entry = _Entry(container, tuple(known))
        same = len(known) == len(outputs) and _agree(_make(entry, args, kwargs), out)
        return entry if same else None

    def _output(self, value: Any, tensors: list[torch.Tensor]) -> Output | None:
        if value is None or type(value) in (bool, int, float):
            return Output(_VALUE, value)
        for at, tensor in enumerate(tensors):
            if tensor is value:
                return Output(_ARGUMENT, source=at)
        if type(value) is not FakeTensor or value.fake_mode is not self._mode:
            return None
        if value.constant is not None or value.layout is not torch.strided:
            return None
        layout: dict[str, Any] = {
            "shape": tuple(value.shape),
            "stride": value.stride(),
            "offset": value.storage_offset(),
            "nbytes": _span(value),
            "dtype": value.dtype,
            "device": value._fake_device,
            "attributes": dict(vars(value)),
        }
        for at, tensor in enumerate(tensors):
            if tensor.untyped_storage()._cdata == value.untyped_storage()._cdata:
                if tensor.dtype is not value.dtype:
                    return None
                alias = _geometry(tensor) == _geometry(value)
                return Output(_ALIAS if alias else _VIEW, source=at, **layout)
        return Output(_NEW, **layout)


def without_torch_function() -> None:
    """FakeTensor inherits a `__torch_function__` that turns results into its own class, which they
    are already. Without it reading an attribute of a fake tensor takes a tenth of the time."""
    FakeTensor.__torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


def _kind(func: Any) -> int:
    if not isinstance(func, torch._ops.OpOverload) or func.namespace not in _NAMESPACES:
        return _UNCACHED
    if func in _LIFTS or any(tag in func.tags for tag in _UNPREDICTABLE):
        return _UNCACHED
    foreach = func._schema.name.startswith(_FOREACH_NAMES) and len(func._schema.returns) < 2
    return _FOREACH if foreach else _ONE


def _at(value: Any, at: int, length: int) -> Any:
    return [value[at]] if isinstance(value, list | tuple) and len(value) == length else value


def _tensors(args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    _gather(args, found)
    if kwargs:
        _gather(kwargs.values(), found)
    return found


def _gather(values: Iterable[Any], found: list[torch.Tensor]) -> None:
    # No nested function: its cycle with itself would keep the tensors until the next collection.
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            _gather(value, found)


def _make(entry: _Entry, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors: list[torch.Tensor] | None = None
    made: list[Any] = []
    for output in entry.outputs:
        if output.kind == _NEW:
            made.append(_new(output))
        elif output.kind == _VALUE:
            made.append(output.value)
        else:
            if tensors is None:
                tensors = _tensors(args, kwargs)
            source = tensors[output.source]
            if output.kind == _VIEW and source.untyped_storage().nbytes() < output.nbytes:
                # FSDP has freed the storage for now, and `set_` would make it grow.
                return _NO_RESULT
            made.append(source if output.kind == _ARGUMENT else _view(output, source))
    return made[0] if entry.container is None else entry.container(made)


def _new(output: Output) -> Any:
    with _Without(_ABOVE_KERNELS):
        blank = _empty_strided(output.shape, output.stride, dtype=output.dtype, device=_META)
        made = _make_subclass(
            FakeTensor, blank, False, dispatch_device=True, device_for_backend_keys=output.device
        )
        _warn_at_data_ptr(made)
    vars(made).update(output.attributes)
    return made


def _view(output: Output, source: torch.Tensor) -> Any:
    with _Without(_ABOVE_KERNELS):
        made = _make_subclass(
            FakeTensor, source, False, dispatch_device=True, device_for_backend_keys=output.device
        )
        if output.kind == _VIEW:
            with _With(_K.Meta):
                made.set_(source.untyped_storage(), output.offset, output.shape, output.stride)
    vars(made).update(output.attributes)
    return made


def _geometry(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.storage_offset()


def _span(tensor: torch.Tensor) -> int:
    """Bytes from the start of the storage to the end of the tensor's last element."""
    if tensor.numel() == 0:
        return 0
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset() + last + 1) * tensor.element_size()


def _metadata(value: torch.Tensor) -> tuple[Any, ...]:
    return (
        type(value),
        _geometry(value),
        value.dtype,
        getattr(value, "fake_device", value.device),
        value.untyped_storage().nbytes(),
        value.requires_grad,
        value.is_conj() or value.is_neg() or value.is_inference(),
        torch._C._dispatch_key_set(value),
        sorted(vars(value)),
    )


def _agree(one: Any, other: Any) -> bool:
    """Whether two results are alike: equal metadata, storages shared or apart in the same way."""
    if isinstance(one, tuple | list):
        if type(one) is not type(other) or len(one) != len(other):
            return False
        return _sharing(one) == _sharing(other) and all(map(_agree, one, other))
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and _metadata(one) == _metadata(other)
    return type(one) is type(other) and bool(one == other)


def _sharing(values: Iterable[Any]) -> list[int]:
    """Each tensor's storage, numbered by first appearance."""
    numbers: dict[int, int] = {}
    storages = [v.untyped_storage()._cdata for v in values if isinstance(v, torch.Tensor)]
    return [numbers.setdefault(each, len(numbers)) for each in storages]


def _check(func: Any, cached: Any, fresh: Any) -> None:
    if not _agree(cached, fresh):
        raise AssertionError(f"{func} gives {fresh}, the cache {cached}")
