"""Fake results without asking FakeTensorMode twice: an op called again on tensors of the same
layout gives tensors of the same layout.

The first call of each kind goes through FakeTensorMode; what it returned is written down as a
recipe (a new storage, a view of an argument's storage, the argument itself, a plain value), and
later calls are answered from the recipe. Whatever is not of that simple form, or depends on
anything but its arguments' layouts and plain values, always takes the long way.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

_K = torch._C.DispatchKey
# Above the kernels: a view made here must neither enter the autograd graph nor share a version.
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
# As FakeTensor itself does: some optimizers ask for addresses, and use them for nothing.
_no_data = torch._C._set_warn_deprecated_on_mutable_data_ptr
_active_mode = torch._C._get_dispatch_mode
_default_dtype = torch.get_default_dtype

# Types whose values compare by what they mean to an op.
_PLAIN = frozenset(
    (
        int,
        float,
        bool,
        str,
        type(None),
        torch.dtype,
        torch.device,
        torch.layout,
        torch.memory_format,
    )
)
# Their fake kernels are functions of layouts, and return no views of anything hidden.
_NAMESPACES = frozenset(("aten", "prims", "bitsandbytes"))
_LIFTS = frozenset((torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default))
_ELEMENTWISE = ("aten::_foreach_", "aten::_fused_adam", "aten::_fused_sgd", "aten::_fused_adagrad")

_LONG_WAY, _BY_LAYOUT, _IN_PLACE, _LISTS = range(4)
_VALUE, _SAME, _ALIAS, _VIEW, _NEW = range(5)


class Layout(NamedTuple):
    """One result. `source` counts the tensors among the arguments; `nbytes` is what the layout
    spans of its storage; `state` is what a FakeTensor carries beside its layout."""

    kind: int
    value: Any = None
    source: int = 0
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    offset: int = 0
    nbytes: int = 0
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    state: dict[str, Any] | None = None


_NOT_BUILT = object()


class _Recipe(NamedTuple):
    """`container` is the type of the results' list, None for a result on its own."""

    container: type | None
    outputs: tuple[Layout, ...]


class FastFake:
    """Calls ops on behalf of a dispatch mode outside of `fake_mode`.

    With `checked`, every answer from a recipe is compared with FakeTensorMode's own and an
    AssertionError tells of the first that differs.
    """

    def __init__(self, fake_mode: FakeTensorMode, checked: bool = False) -> None:
        self.checked = checked
        self.answered = self.asked = 0
        self._mode = fake_mode
        self._kinds: dict[Any, int] = {}
        self._recipes: dict[Any, _Recipe | None] = {}

    def __call__(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        kind = self._kinds.get(func)
        if kind is None:
            kind = self._kinds[func] = _kind(func)
        if kind == _LONG_WAY or _active_mode(_FAKE) is not self._mode:
            self.asked += 1
            return func(*args, **kwargs)
        if kind == _LISTS:
            return self._elementwise(func, args, kwargs)
        return self._one(func, args, kwargs, kind == _BY_LAYOUT)

    def _one(self, func: Any, args: Any, kwargs: dict[str, Any], scalars: bool) -> Any:
        key = self._key(func, args, kwargs, scalars)
        recipe = self._recipes.get(key) if key is not None else None
        if recipe is not None:
            out = _build(recipe, args, kwargs)
            if out is not _NOT_BUILT:
                self.answered += 1
                if self.checked:
                    _check(func, out, func(*args, **kwargs))
                return out
        self.asked += 1
        out = func(*args, **kwargs)
        if key is not None and key not in self._recipes:
            # An op that changed its arguments' layout is another one next time.
            unchanged = self._key(func, args, kwargs, scalars) == key
            self._recipes[key] = self._learn(func, args, kwargs, out) if unchanged else None
        return out

    def _elementwise(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An op over lists does the same to every entry, so each kind of entry is asked once."""
        length = len(args[0])
        scalars = len(func._schema.returns) > 0
        calls = []
        for at in range(length):
            one_args = [_entry(value, at, length) for value in args]
            one_kwargs = {name: _entry(value, at, length) for name, value in kwargs.items()}
            calls.append((one_args, one_kwargs))
        if not calls or any(self._key(func, *call, scalars) is None for call in calls):
            self.asked += 1
            return func(*args, **kwargs)
        made = [self._one(func, *call, scalars) for call in calls]
        return [out[0] for out in made] if scalars else None

    def _key(
        self, func: Any, args: Any, kwargs: dict[str, Any], scalars: bool
    ) -> tuple[Any, ...] | None:
        """What the result depends on; None if that cannot be told from layouts and plain values."""
        key: list[Any] = [func, _default_dtype()]
        if not self._describe(key, args, scalars):
            return None
        for name, value in kwargs.items():
            key.append(name)
            if not self._describe(key, (value,), scalars):
                return None
        return tuple(key)

    def _describe(self, key: list[Any], values: Iterable[Any], scalars: bool) -> bool:
        for value in values:
            kind = type(value)
            if kind is FakeTensor or isinstance(value, FakeTensor):
                # Constants are computed with, and another mode's tensors are not ours to make.
                if value.fake_mode is not self._mode or value.constant is not None:
                    return False
                key += (kind, value.shape, value.stride(), value.storage_offset(), value.dtype)
                key.append(value._fake_device)
            elif kind in _PLAIN:
                # 1, 1.0 and True are equal, and promote differently.
                key.append(kind)
                if scalars:
                    key.append(value)
            elif kind is list or kind is tuple:
                key += (kind, len(value))
                if not self._describe(key, value, scalars):
                    return False
            else:
                return False
        return True

    def _learn(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> _Recipe | None:
        tensors = _tensors(args, kwargs)
        container = type(out) if isinstance(out, tuple | list) else None
        if container not in (None, tuple, list):
            return None
        outputs = []
        storages: set[int] = set()
        for value in out if container is not None else (out,):
            output = self._output(value, tensors)
            if output is None:
                return None
            if output.kind == _NEW:
                storages.add(value.untyped_storage()._cdata)
            outputs.append(output)
        if len(storages) != sum(output.kind == _NEW for output in outputs):
            return None
        recipe = _Recipe(container, tuple(outputs))
        return recipe if _agree(_build(recipe, args, kwargs), out) else None

    def _output(self, value: Any, tensors: list[torch.Tensor]) -> Layout | None:
        if value is None or type(value) in (bool, int, float):
            return Layout(_VALUE, value)
        for at, tensor in enumerate(tensors):
            if tensor is value:
                return Layout(_SAME, source=at)
        if type(value) is not FakeTensor or value.fake_mode is not self._mode:
            return None
        if value.constant is not None or value.layout is not torch.strided:
            return None
        layout = _layout_arguments(value)
        storage = value.untyped_storage()._cdata
        for at, tensor in enumerate(tensors):
            if tensor.untyped_storage()._cdata == storage:
                if tensor.dtype is not value.dtype:
                    return None
                same = all(
                    getattr(tensor, name)() == getattr(value, name)()
                    for name in ("size", "stride", "storage_offset")
                )
                return Layout(_ALIAS if same else _VIEW, source=at, **layout)
        return Layout(_NEW, **layout)


def without_torch_function() -> None:
    """FakeTensor inherits a `__torch_function__` that only turns results into its own class, which
    they are; without it every attribute of a fake tensor costs a tenth."""
    FakeTensor.__torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


def _kind(func: Any) -> int:
    if not isinstance(func, torch._ops.OpOverload) or func.namespace not in _NAMESPACES:
        return _LONG_WAY
    if func in _LIFTS or torch.Tag.data_dependent_output in func.tags:
        return _LONG_WAY
    if torch.Tag.inplace_view in func.tags or torch.Tag.dynamic_output_shape in func.tags:
        return _LONG_WAY
    written = [
        each.alias_info is not None and each.alias_info.is_write for each in _arguments(func)
    ]
    returned = [each.alias_info is not None and each.alias_info.is_write for each in _returns(func)]
    if func._schema.name.startswith(_ELEMENTWISE) and len(returned) < 2:
        return _LISTS
    # Nothing comes back but what was written to, whatever the numbers are.
    return _IN_PLACE if any(written) and all(returned) else _BY_LAYOUT


def _arguments(func: Any) -> Any:
    return func._schema.arguments


def _returns(func: Any) -> Any:
    return func._schema.returns


def _entry(value: Any, at: int, length: int) -> Any:
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


def _build(recipe: _Recipe, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors: list[torch.Tensor] | None = None
    made: list[Any] = []
    for output in recipe.outputs:
        if output.kind == _NEW:
            made.append(make(output))
        elif output.kind == _VALUE:
            made.append(output.value)
        else:
            if tensors is None:
                tensors = _tensors(args, kwargs)
            source = tensors[output.source]
            if output.kind == _VIEW and source.untyped_storage().nbytes() < output.nbytes:
                # FSDP has freed it for now; pointing a tensor at it would make it grow.
                return _NOT_BUILT
            made.append(source if output.kind == _SAME else _view(output, source))
    return made[0] if recipe.container is None else recipe.container(made)


def layout_of(tensor: torch.Tensor) -> Layout | None:
    """How to make a tensor like this one, in a storage of its own; None if it shares one."""
    if type(tensor) is not FakeTensor or tensor.layout is not torch.strided:
        return None
    layout = Layout(_NEW, **_layout_arguments(tensor))
    whole = tensor.untyped_storage().nbytes() == layout.nbytes and not layout.offset
    return layout if whole and tensor.constant is None else None


def _layout_arguments(tensor: FakeTensor) -> dict[str, Any]:
    return {
        "shape": tuple(tensor.shape),
        "stride": tensor.stride(),
        "offset": tensor.storage_offset(),
        "nbytes": _span(tensor),
        "dtype": tensor.dtype,
        "device": tensor._fake_device,
        "state": dict(vars(tensor)),
    }


def make(output: Layout) -> Any:
    """A fake tensor of this layout, in a new storage."""
    with _Without(_ABOVE_KERNELS):
        blank = _empty_strided(output.shape, output.stride, dtype=output.dtype, device=_META)
        made = _make_subclass(
            FakeTensor, blank, False, dispatch_device=True, device_for_backend_keys=output.device
        )
        _no_data(made)
    vars(made).update(output.state)
    return made


def _view(output: Layout, source: torch.Tensor) -> Any:
    with _Without(_ABOVE_KERNELS):
        made = _make_subclass(
            FakeTensor, source, False, dispatch_device=True, device_for_backend_keys=output.device
        )
        if output.kind == _VIEW:
            with _With(_K.Meta):
                made.set_(source.untyped_storage(), output.offset, output.shape, output.stride)
    vars(made).update(output.state)
    return made


def _span(tensor: torch.Tensor) -> int:
    """Bytes from the start of the storage to the end of the tensor's last element."""
    if tensor.numel() == 0:
        return 0
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset() + last + 1) * tensor.element_size()


def _layout(value: torch.Tensor) -> tuple[Any, ...]:
    return (
        type(value),
        tuple(value.shape),
        value.stride(),
        value.storage_offset(),
        value.dtype,
        getattr(value, "fake_device", value.device),
        value.untyped_storage().nbytes(),
        value.requires_grad,
        value.is_conj() or value.is_neg() or value.is_inference(),
        torch._C._dispatch_key_set(value),
        sorted(vars(value)),
    )


def _agree(one: Any, other: Any) -> bool:
    if isinstance(one, tuple | list):
        if type(one) is not type(other) or len(one) != len(other):
            return False
        return all(_agree(left, right) for left, right in zip(one, other, strict=True))
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and _layout(one) == _layout(other)
    return type(one) is type(other) and bool(one == other)


def _check(func: Any, quick: Any, asked: Any) -> None:
    if not _agree(quick, asked):
        raise AssertionError(f"{func} gives {asked}, its recipe {quick}")
