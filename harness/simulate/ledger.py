"""The memory ledger on fake tensors: the same list of births and deaths, plus what only a real
device would show: library workspaces, scratch inside kernels, storages resized in place, and an
answer wherever a program asks a tensor for its value.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from harness.meters.memory import Ledger, Storage

PRODUCTS = frozenset({"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear"})

# bytes an op needs for itself while it runs: (args, out) -> bytes
Scratch = Callable[[tuple[Any, ...], Any], int]


class SimulatedLedger(Ledger):
    """Follows fake storages on `device_type`.

    `workspace_bytes` is what cuBLAS takes for each thread that multiplies, at its first product,
    and keeps. `experts` is the number of experts that routing is assumed to be balanced over.
    """

    def __init__(self, device_type: str, workspace_bytes: int) -> None:
        super().__init__(device_type)
        self.workspace_bytes = workspace_bytes
        self.experts: int | None = None
        self.scratch: dict[str, Scratch] = {}
        self.composites: dict[str, Callable[..., Any]] = {}
        self.assumed: set[str] = set()
        self.op = ""
        self._fake_mode: FakeTensorMode | None = None
        self._paused = False
        self._multiplied: set[int] = set()
        self._made_by: dict[int, str] = {}

    def __enter__(self) -> Self:
        self._fake_mode = torch._guards.active_fake_mode()
        _followers.append(self)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        _followers.remove(self)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Shapes are being worked out, nothing is computed: count nothing."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # DTensor and its like take themselves apart; their local tensors come here afterwards.
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented
        kwargs = kwargs or {}
        name = func._schema.name
        if name == "aten::_local_scalar_dense":
            return self._value(args[0])
        if name == "aten::nonzero":
            return self._positions(args[0])
        self.op = name
        if name in PRODUCTS:
            self._take_workspace(args)
        composite = self.composites.get(name)
        if composite is not None:
            with _reentered(self):
                out = composite(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        for value in (out,) if isinstance(out, torch.Tensor) else tree_iter(out):
            if isinstance(value, torch.Tensor):
                self._see(value, name)
                if value.dtype is torch.bool and value.dim() == 0:
                    self._made_by[value.untyped_storage()._cdata] = name
        scratch = self.scratch.get(name)
        if scratch is not None:
            self._pass_through(name, scratch(args, out))
        return out

    def _see(self, tensor: torch.Tensor, op: str) -> Storage | None:
        if self._paused or tensor.device.type != self.device_type:
            return None
        mode = getattr(tensor, "fake_mode", None)
        # DTensor works shapes out in a fake mode of its own.
        if mode is not None and self._fake_mode is not None and mode is not self._fake_mode:
            return None
        return super()._see(tensor, op)

    def _take_workspace(self, args: Any) -> None:
        thread = threading.get_ident()
        if self._paused or not self.workspace_bytes or thread in self._multiplied:
            return
        if any(isinstance(a, torch.Tensor) and a.device.type == self.device_type for a in args):
            self._multiplied.add(thread)
            workspace = self._storage(self.workspace_bytes, "cublas workspace")
            workspace.category = "workspaces"
            self._note(workspace, workspace.block)

    def _pass_through(self, op: str, nbytes: int) -> None:
        """Scratch of one kernel: there and gone."""
        if nbytes and not self._paused:
            storage = self._storage(nbytes, op)
            storage.category = "temporaries"
            self._note(storage, storage.block)
            self._note(storage, -storage.block)

    def _storage(self, nbytes: int, op: str) -> Storage:
        return Storage(nbytes, op, (nbytes,), "uint8", self.module, self.phase, "", born=self.visit)

    def resized(self, raw: torch.UntypedStorage) -> None:
        """A storage has another size now: the old block is freed, a new one is taken."""
        known = self._live.get(raw._cdata)
        if self._paused or known is None or known[0]() is not raw:
            return
        storage, size = known[1], raw.nbytes()
        if size != storage.nbytes:
            self._note(storage, -storage.block)
            storage.nbytes = size
            self._note(storage, storage.block)

    def _value(self, tensor: torch.Tensor) -> bool | float | int:
        """What a program is told that reads a tensor's value: no padding, nothing overflows."""
        if tensor.dtype is torch.bool:
            # "Is everything unmasked?" yes; "is there any NaN?" no.
            return self._made_by.get(tensor.untyped_storage()._cdata) == "aten::all"
        return 1.0 if tensor.dtype.is_floating_point else 0

    def _positions(self, tensor: torch.Tensor) -> torch.Tensor:
        """Indices of true entries: every expert is hit, each by an equal share of the tokens."""
        rows = tensor.numel()
        if self.experts and tensor.dim() > 1:
            rows //= self.experts
            self.assumed.add("balanced-routing")
        else:
            self.assumed.add("all-true")
        found = torch.empty((rows, tensor.dim()), dtype=torch.int64, device=tensor.device)
        self._see(found, "aten::nonzero")
        return found


@contextmanager
def _reentered(mode: TorchDispatchMode) -> Iterator[None]:
    """Run ops under the mode again, from inside of it."""
    TorchDispatchMode.__enter__(mode)
    try:
        yield
    finally:
        TorchDispatchMode.__exit__(mode, None, None, None)


_followers: list[SimulatedLedger] = []
_resize = torch.UntypedStorage.resize_


def _resize_and_tell(raw: torch.UntypedStorage, size: int) -> Any:
    done = _resize(raw, size)
    for ledger in _followers:
        ledger.resized(raw)
    return done


def follow_resizes() -> None:
    """FSDP frees and refills its parameters by resizing storages, which no dispatch mode sees."""
    torch.UntypedStorage.resize_ = _resize_and_tell  # type: ignore[assignment,method-assign]
