"""The memory ledger on fake tensors: the same list of allocations and frees, and in addition cuBLAS
workspaces, scratch memory inside kernels, storages that are resized in place, and a value for each
program that reads one from a tensor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Self

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from harness.meters.memory.ledger import Ledger, MemoryEvent, Storage, wraps_tensors
from harness.simulate.memory.op_cache import OpCache

if TYPE_CHECKING:
    from harness.simulate.step_time.roofline import Traffic

PRODUCTS = frozenset({"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear"})

# For scalars of these dtypes the op that made them decides the value (SimulatedLedger._value).
ASKED_DTYPES = frozenset({torch.bool, torch.int64})

# bytes an op needs for itself while it runs: (args, out) -> bytes
Scratch = Callable[[tuple[Any, ...], Any], int]


# For tests: whether ops are answered from a cache, and whether each answer is compared with
# FakeTensorMode's.
cached, checked = True, False
_DEVICE = torch.ops.prim.device.default


def _ask(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)


# Storage of the event that the allocator returns its cached blocks to the device.
RELEASED = Storage(0, "empty_cache", (), "", "", "", "")


class SimulatedLedger(Ledger):
    """Counts fake storages on `device_type`.

    `workspace_bytes` is what cuBLAS allocates for each thread at its first product and keeps.
    `experts` is the number of experts that routing is assumed to be balanced over; `packed_rows`
    says that the current batch has several sequences in a row; `scratch` has kernels' own memory by
    op, `composites` ops to run in place of an op (harness.simulate.libraries.kernels); `assumed`
    collects the assumptions that were needed.
    """

    def __init__(self, device_type: str, workspace_bytes: int) -> None:
        super().__init__(device_type)
        self.workspace_bytes = workspace_bytes
        self.experts: int | None = None
        self.scratch: dict[str, Scratch] = {}
        self.composites: dict[str, Callable[..., Any]] = {}
        self.assumed: set[str] = set()
        self.packed_rows = False
        self.traffic: Traffic | None = None
        self.op = ""
        self._fake_mode: FakeTensorMode | None = None
        self._call: Callable[[Any, Any, dict[str, Any]], Any] = _ask
        self._paused = False
        self._multiplied: set[int] = set()
        self._made_by: dict[int, str] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled here, and the guard against it would wrap every op.
        return False

    def __enter__(self) -> Self:
        self._fake_mode = torch._guards.active_fake_mode()
        if self._fake_mode is not None and cached:
            self._call = OpCache(self._fake_mode, checked)
        _active.append(self)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        _active.remove(self)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing within: a library works out shapes."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _DEVICE:
            # The autograd engine asks this more often than it calls all other ops together.
            return args[0].device
        if wraps_tensors(types):
            return NotImplemented
        kwargs = kwargs or {}
        name = func._schema.name
        if name == "aten::_local_scalar_dense":
            return self._value(args[0])
        if name == "aten::nonzero":
            return self._positions(args[0])
        self.op = name
        composite = self.composites.get(name)
        if composite is not None:
            # Memory is counted op by op, operations and bytes moved as one call of the whole.
            traffic, self.traffic = self.traffic, None
            with _reentered(self):
                out = composite(*args, **kwargs)
            self.traffic = traffic
        else:
            out = self._call(func, args, kwargs)
        for value in (out,) if isinstance(out, torch.Tensor) else tree_iter(out):
            if isinstance(value, torch.Tensor):
                self._track(value, name)
                if value.dtype in ASKED_DTYPES and value.dim() == 0:
                    made_by = "aten::all" if self._counts_all(name, args) else name
                    self._made_by[value.untyped_storage()._cdata] = made_by
        if name in PRODUCTS:
            # torch allocates the result before the workspace.
            self._take_workspace(args)
        scratch = self.scratch.get(name)
        if scratch is not None:
            self._pass_through(name, scratch(args, out))
        if self.traffic is not None and not self._paused:
            self.traffic.note(func, args, kwargs, out)
        return out

    def _is_tracked(self, tensor: torch.Tensor) -> bool:
        if self._paused or not super()._is_tracked(tensor):
            return False
        mode = getattr(tensor, "fake_mode", None)
        # DTensor works out shapes in a fake mode of its own.
        return mode is None or self._fake_mode is None or mode is self._fake_mode

    def release_cached(self) -> None:
        """The program called `torch.cuda.empty_cache()`."""
        if not (self._paused or self.closed):
            self.events.append(MemoryEvent(RELEASED, 0, self.phase, self.visit))

    def _take_workspace(self, args: Any) -> None:
        thread = threading.get_ident()
        if self._paused or not self.workspace_bytes or thread in self._multiplied:
            return
        if any(isinstance(a, torch.Tensor) and a.device.type == self.device_type for a in args):
            self._multiplied.add(thread)
            workspace = self._storage(self.workspace_bytes, "cublas workspace")
            workspace.category = "workspaces"
            self._add_event(workspace, workspace.block)

    def _pass_through(self, op: str, nbytes: int) -> None:
        """Scratch memory of one kernel: allocated and freed at once."""
        if nbytes and not self._paused:
            storage = self._storage(nbytes, op)
            storage.category = "temporaries"
            storage.died = self.visit
            self._add_event(storage, storage.block)
            self._add_event(storage, -storage.block)

    def _storage(self, nbytes: int, op: str) -> Storage:
        return Storage(nbytes, op, (nbytes,), "uint8", self.module, self.phase, "", born=self.visit)

    def resized(self, raw: torch.UntypedStorage) -> None:
        """A storage has another size now: its block is freed and a new one is allocated."""
        known = self._live.get(raw._cdata)
        if self._paused or known is None or known[0]() is not raw:
            return
        storage, size = known[1], raw.nbytes()
        if size != storage.nbytes:
            self._add_event(storage, -storage.block)
            storage.nbytes = size
            self._add_event(storage, storage.block)

    def _value(self, tensor: torch.Tensor) -> bool | float | int:
        """The value a program reads from a scalar tensor: no padding, no overflow, no NaN."""
        if tensor.dtype is torch.bool:
            # "Is everything unmasked?" yes; "is there any NaN?" no. Packed rows have no mask: of
            # them it is asked whether all positions belong to one sequence.
            made_by = self._made_by.get(tensor.untyped_storage()._cdata)
            return made_by == "aten::all" and not self.packed_rows
        return 1.0 if tensor.dtype.is_floating_point else 0

    def _counts_all(self, op: str, args: Any) -> bool:
        """Whether this is `mask.sum() == mask.numel()`, by which transformers asks if a mask is all
        true (`fast_all`)."""
        if op != "aten::eq" or isinstance(args[1], torch.Tensor) or not args[1]:
            return False
        return self._made_by.get(args[0].untyped_storage()._cdata) == "aten::sum"

    def _positions(self, tensor: torch.Tensor) -> torch.Tensor:
        """Indices of true entries (n, dims). Routing is assumed to be balanced: every expert gets
        an equal share of the tokens. Of other tensors all entries are assumed to be true."""
        rows = tensor.numel()
        if self.experts and tensor.dim() > 1:
            rows //= self.experts
            self.assumed.add("balanced-routing")
        else:
            self.assumed.add("all-true")
        found = torch.empty((rows, tensor.dim()), dtype=torch.int64, device=tensor.device)
        self._track(found, "aten::nonzero")
        return found


@contextmanager
def _reentered(mode: TorchDispatchMode) -> Iterator[None]:
    """Run ops under the mode from within its own `__torch_dispatch__`."""
    TorchDispatchMode.__enter__(mode)
    try:
        yield
    finally:
        TorchDispatchMode.__exit__(mode, None, None, None)


_active: list[SimulatedLedger] = []


@contextmanager
def pause_all() -> Iterator[None]:
    """Count nothing within, in any active ledger."""
    with ExitStack() as stack:
        for ledger in _active:
            stack.enter_context(ledger.paused())
        yield


def release_cached() -> None:
    for ledger in _active:
        ledger.release_cached()


_resize = torch.UntypedStorage.resize_


def _resize_and_count(raw: torch.UntypedStorage, size: int) -> Any:
    done = _resize(raw, size)
    for ledger in _active:
        ledger.resized(raw)
    return done


def follow_resizes() -> None:
    """Count storage resizes, by which FSDP frees and refills its parameters; no dispatch mode sees
    them."""
    torch.UntypedStorage.resize_ = _resize_and_count  # type: ignore[assignment,method-assign]
