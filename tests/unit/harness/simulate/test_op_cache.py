"""Results from the op cache against the same ops on real tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from harness.simulate.memory.op_cache import OpCache


class _Through(TorchDispatchMode):
    """Sends every op through an OpCache, twice, and keeps the second answer."""

    def __init__(self, cache: OpCache) -> None:
        super().__init__()
        self.cache = cache

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.cache(func, args, kwargs or {})
        return self.cache(func, args, kwargs or {})


@pytest.fixture
def through() -> Iterator[_Through]:
    with FakeTensorMode() as fake:
        mode = _Through(OpCache(fake))
        with mode:
            yield mode


def _floats() -> torch.Tensor:
    return torch.empty(4, 6, 8)


def _integers() -> torch.Tensor:
    return torch.zeros(4, 6, dtype=torch.int64)


OPS: dict[str, Callable[[], Any]] = {
    "a new tensor": lambda: _floats() + 1,
    "integer times integer": lambda: _integers() * 1,
    "integer times float": lambda: _integers() * 1.0,
    "integer times truth": lambda: _integers() * True,
    "a product": lambda: _floats() @ _floats().transpose(1, 2),
    "a view": lambda: _floats().view(24, 8),
    "a transposed view": lambda: _floats().transpose(0, 2),
    "a slice with an offset": lambda: _floats()[1:, 2:4],
    "a slice of a view": lambda: _floats().transpose(0, 1)[2:, ::2],
    "an expanded view": lambda: torch.empty(4, 1, 8).expand(4, 5, 8),
    "several views": lambda: _floats().split([1, 2, 3], dim=1),
    "several new tensors": lambda: _floats().max(dim=-1),
    "into itself": lambda: _floats().mul_(2),
    "a copy in another dtype": lambda: _floats().to(torch.bfloat16),
    "a copy in another order": lambda: _floats().transpose(0, 2).contiguous(),
    "like another": lambda: torch.empty_like(_floats().transpose(0, 2)),
    "no elements": lambda: _floats()[:0] + 1,
    "a scalar": lambda: _floats().sum(),
    "another default dtype": lambda: torch.ones(3),
    "over lists": lambda: torch._foreach_add([_floats(), _integers()], 1),
    "norms over lists": lambda: torch._foreach_norm([_floats(), torch.empty(3)]),
    "an index": lambda: _floats()[_integers()[0, :3]],
    "dropout": lambda: torch.dropout(_floats(), 0.5, True),
}


def _layout(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        nbytes = value.untyped_storage().nbytes()
        offset = value.storage_offset()
        return (tuple(value.shape), value.stride(), offset, value.dtype, nbytes)
    if isinstance(value, tuple | list):
        return [_layout(part) for part in value]
    return value


@pytest.mark.parametrize("name", OPS)
def test_as_on_real_tensors(name: str, through: _Through) -> None:
    fake = _layout(OPS[name]())
    assert through.cache.hits
    with torch.utils._python_dispatch._disable_current_modes():
        real = _layout(OPS[name]())
    assert fake == real


def test_views_share_the_storage_and_new_tensors_do_not(through: _Through) -> None:
    base = _floats()
    assert base.view(-1).untyped_storage()._cdata == base.untyped_storage()._cdata
    assert (base + 1).untyped_storage()._cdata != base.untyped_storage()._cdata
    assert base.mul_(2) is base


def test_a_result_is_freed_with_its_last_name(through: _Through) -> None:
    made = _floats() + 1
    view = made.view(-1)
    raw = weakref.ref(made.untyped_storage())
    del made
    assert raw() is not None
    del view
    assert raw() is None


def test_a_result_is_outside_of_the_graph_until_autograd_says_otherwise(through: _Through) -> None:
    leaf = torch.empty(3, 4, requires_grad=True)
    squared = leaf * leaf
    raw = weakref.ref(squared.untyped_storage())
    cut = (squared + 0).detach().view(-1)
    assert not cut.requires_grad
    del squared
    assert raw() is None
    (leaf * leaf).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.shape == leaf.shape


def test_a_view_does_not_bring_freed_memory_back() -> None:
    with FakeTensorMode() as fake:
        cache = OpCache(fake)
        view = torch.ops.aten.view.default
        base = torch.empty(16)
        for _ in range(2):
            cache(view, (base, [4, 4]), {})
        assert cache.hits == 1
        base.untyped_storage().resize_(0)
        cache(view, (base, [4, 4]), {})
        assert cache.hits == 1


def test_values_are_asked_for_every_time() -> None:
    with FakeTensorMode() as fake:
        cache = OpCache(fake)
        constant = torch.tensor(2.0)
        for _ in range(3):
            cache(torch.ops.aten.add.Tensor, (constant, 1), {})
        assert cache.hits == 0


def test_tensors_of_another_mode_are_not_made_here() -> None:
    with FakeTensorMode() as fake:
        cache = OpCache(fake)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for _ in range(3):
            cache(torch.ops.aten.ones.default, ([2],), {})
    assert cache.hits == 0


def test_checking_finds_a_wrong_entry() -> None:
    with FakeTensorMode() as fake:
        cache = OpCache(fake, checked=True)
        add, given = torch.ops.aten.add.Tensor, torch.empty(4)
        for _ in range(2):
            cache(add, (given, 1), {})
        (key, entry), *_ = cache._entries.items()
        assert entry is not None
        wrong = entry.outputs[0]._replace(shape=(5,), stride=(1,))
        cache._entries[key] = entry._replace(outputs=(wrong,))
        with pytest.raises(AssertionError, match="the cache"):
            cache(add, (given, 1), {})
