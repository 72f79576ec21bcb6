"""The memory ledger: every live tensor storage on one device, by category and phase.

It runs in separate, untimed steps as a `TorchDispatchMode` and lists the allocation and the freeing
of each storage in 512-byte blocks (the unit of torch's CUDA caching allocator, `kMinBlockSize`).
Peaks and categories are computed from that list afterwards, because the category of a storage (a
gradient, an optimizer state) may only be known after it was allocated.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from harness.records.part import TRAINING_PHASES, Phase

BLOCK_BYTES = 512


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The local part of a DTensor, whose own storage has the full size; any other tensor itself."""
    return getattr(tensor, "_local_tensor", tensor)


def wraps_tensors(types: Iterable[type]) -> bool:
    """Whether a DTensor or another wrapper subclass takes part in an op: it calls the ops of its
    local tensors, which reach the dispatch mode later."""
    return any(hasattr(each, "__tensor_flatten__") for each in types)


def parameter_data(parameter: torch.Tensor) -> torch.Tensor:
    """The data of a parameter; for a parameter that ZeRO-3 has partitioned, this rank's part."""
    part = getattr(parameter, "ds_tensor", None)
    return parameter.data if part is None else part


def block_bytes(size: int) -> int:
    """`size` in bytes, rounded up to whole blocks; 0 for an empty storage."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


@dataclass(slots=True, eq=False)
class Storage:
    """One storage. `category` is None until it is tagged, and `guess` counts instead; `born` and
    `died` are numbers of phase visits."""

    nbytes: int
    op: str
    shape: tuple[int, ...]
    dtype: str
    module: str
    phase: str
    guess: str
    category: str | None = None
    born: int = 0
    died: int | None = None

    @property
    def block(self) -> int:
        return block_bytes(self.nbytes)


class MemoryEvent(NamedTuple):
    """An allocation (`delta` > 0) or freeing (`delta` < 0) of `storage`, in block bytes, during
    `phase`, which is the `visit`-th phase entered."""

    storage: Storage
    delta: int
    phase: str
    visit: int


_PHASE_START = Storage(0, "", (), "", "", "", "")


class Peak(NamedTuple):
    """`bytes` were live right after event number `at`."""

    bytes: int
    at: int


class Ledger(TorchDispatchMode):
    """Counts storages on `device_type`. Tensors with `vocabulary` as last dimension are logits."""

    def __init__(self, device_type: str, vocabulary: int | None = None) -> None:
        super().__init__()
        self.device_type = device_type
        # Widths of logits: the vocabulary's, and those of the tiles a fused head cuts it into.
        self.logit_widths: set[int] = set() if vocabulary is None else {vocabulary}
        self.head_modules: set[str] = set()
        self.hidden_width: int | None = None
        self.events: list[MemoryEvent] = []
        self.phase = "load"
        self.visit = 0
        self.module = ""
        self.closed = False
        self._live: dict[int, tuple[weakref.ref[Any], Storage]] = {}

    def enter_phase(self, phase: str) -> None:
        self.phase = phase
        self.visit += 1
        # A phase without allocations has a peak too: the bytes that were live when it began.
        if not self.closed:
            self.events.append(MemoryEvent(_PHASE_START, 0, phase, self.visit))

    def close(self) -> None:
        """Stop counting: later frees are not part of the measured steps."""
        self.closed = True

    def tag(self, tensor: torch.Tensor, category: str) -> None:
        """Set the category of a tensor's storage; a new storage is counted from now on."""
        storage = self._track(tensor, "existing")
        if storage is not None:
            storage.category = category

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if wraps_tensors(types):
            return NotImplemented
        kwargs = kwargs or {}
        composite = _composite(func)
        if composite is not None:
            with self:
                out = composite(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        name = str(func)
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor):
                self._track(value, name)
        return out

    def _track(self, tensor: torch.Tensor, op: str) -> Storage | None:
        """The storage of a tensor, counted from now on; None when this ledger does not count it."""
        tensor = local_tensor(tensor)
        raw = tensor.untyped_storage()
        key = raw._cdata
        known = self._live.get(key)
        if known is not None and known[0]() is raw:
            return known[1]
        if not self._is_tracked(tensor):
            return None
        storage = Storage(
            raw.nbytes(),
            op,
            tuple(tensor.shape),
            str(tensor.dtype).removeprefix("torch."),
            self.module,
            self.phase,
            self._guess(tensor),
            born=self.visit,
        )
        self._live[key] = (weakref.ref(raw, lambda _: self._mark_freed(key, storage)), storage)
        self._add_event(storage, storage.block)
        return storage

    def _is_tracked(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == self.device_type

    def _mark_freed(self, key: int, storage: Storage) -> None:
        if key in self._live and self._live[key][1] is storage:
            del self._live[key]
        storage.died = self.visit
        self._add_event(storage, -storage.block)

    def _add_event(self, storage: Storage, delta: int) -> None:
        if delta and not self.closed:
            self.events.append(MemoryEvent(storage, delta, self.phase, self.visit))

    def _guess(self, tensor: torch.Tensor) -> str:
        """Category of a new tensor unless it is tagged. In backward, autograd's formulas run with
        gradients disabled, a checkpoint's recomputation with gradients enabled."""
        if self.phase not in ("forward", "backward"):
            return "temporaries"
        if self._is_logits(tensor):
            return "logits_and_loss"
        recorded = self.phase == "forward" or torch.is_grad_enabled()
        return "activations" if recorded else "temporaries"

    def _is_logits(self, tensor: torch.Tensor) -> bool:
        """By the last dimension. Widths of tensors made at the output head in forward are
        remembered, so that the same tensors are recognized in backward."""
        if tensor.dim() < 2:
            return False
        width = tensor.shape[-1]
        at_head = self.phase == "forward" and self.module in self.head_modules
        if at_head and width not in (1, self.hidden_width) and tensor.dtype.is_floating_point:
            self.logit_widths.add(width)
        return width in self.logit_widths


def _composite(func: Any) -> Callable[..., Any] | None:
    """For bitsandbytes' fused 4-bit product, a function that computes it with separate ops.

    On CPU, and on CUDA for more than a few rows, the kernel dequantizes the whole weight first;
    inside the fused op the ledger would not see that temporary.
    """
    if func.namespace != "bitsandbytes" or func._schema.name != "bitsandbytes::gemm_4bit":
        return None
    from bitsandbytes.backends.default.ops import _gemm_4bit_default_impl

    made: Callable[..., Any] = _gemm_4bit_default_impl
    return made


def category(storage: Storage) -> str:
    """The tagged category, else the guess. An activation freed in the forward that made it counts
    as a temporary."""
    if storage.category is not None:
        return storage.category
    dropped = storage.phase == "forward" and storage.died == storage.born
    return "temporaries" if dropped and storage.guess == "activations" else storage.guess


def phase_peaks(events: Iterable[MemoryEvent]) -> dict[str, Peak]:
    """Highest live bytes within each phase; a phase starts with what was live before it."""
    live = 0
    peaks: dict[str, Peak] = {}
    visit = None
    for at, event in enumerate(events):
        if event.visit != visit:
            visit = event.visit
            _update_peak(peaks, event.phase, live, at - 1)
        live += event.delta
        _update_peak(peaks, event.phase, live, at)
    return peaks


def _update_peak(peaks: dict[str, Peak], phase: str, live: int, at: int) -> None:
    if phase not in peaks or live > peaks[phase].bytes:
        peaks[phase] = Peak(live, at)


def phase_ends(events: Iterable[MemoryEvent]) -> dict[str, int]:
    """Live bytes at the last event of each phase."""
    live = 0
    ends: dict[str, int] = {}
    for event in events:
        live += event.delta
        ends[event.phase] = live
    return ends


def live_at(events: list[MemoryEvent], at: int) -> list[Storage]:
    """Storages alive right after event number `at`, largest first."""
    live: dict[Storage, None] = {}
    for event in events[: at + 1]:
        if event.delta > 0:
            live[event.storage] = None
        else:
            live.pop(event.storage, None)
    return sorted(live, key=lambda storage: -storage.block)


def by_category(storages: Iterable[Storage]) -> dict[str, int]:
    """Block bytes by category; categories without storages are left out."""
    total: dict[str, int] = {}
    for storage in storages:
        name = category(storage)
        total[name] = total.get(name, 0) + storage.block
    return total


def training_peak(events: list[MemoryEvent]) -> tuple[Phase, Peak] | None:
    """The training phase with the highest peak, and that peak; None without training events."""
    peaks = phase_peaks(events)
    found = [(name, peaks[name]) for name in TRAINING_PHASES if name in peaks]
    return max(found, key=lambda item: item[1].bytes) if found else None


def tensors_by_category(model: nn.Module) -> list[tuple[torch.Tensor, str]]:
    """Every tensor a model holds with its category, the 4-bit quantization state included."""
    found: list[tuple[torch.Tensor, str]] = []
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        data = parameter_data(parameter)
        if state is not None:
            found.append((data, "quantized_weights"))
            found += [(tensor, "quantization_state") for tensor in quantization_tensors(state)]
        elif ".lora_" in name or ".modules_to_save." in name:
            found.append((data, "adapters"))
        else:
            found.append((data, "weights"))
    found += [(buffer, "weights") for buffer in model.buffers()]
    return found


def quantization_tensors(state: Any) -> list[torch.Tensor]:
    """absmax and code table of a bitsandbytes QuantState; when the absmax is itself quantized,
    also its offset and its own absmax and code table."""
    found = [state.absmax, state.code]
    if state.nested:
        found += [state.offset, state.state2.absmax, state.state2.code]
    return found


def resident_bytes(model: nn.Module) -> dict[str, int]:
    """Exact bytes of the model's tensors by category; shared storages count once."""
    total: dict[str, int] = {}
    seen: set[int] = set()
    for tensor, name in tensors_by_category(model):
        # Not by address: fake tensors have none.
        raw = local_tensor(tensor).untyped_storage()
        if raw._cdata not in seen:
            seen.add(raw._cdata)
            total[name] = total.get(name, 0) + raw.nbytes()
    return total


def tag_model(ledger: Ledger, model: nn.Module) -> None:
    for tensor, name in tensors_by_category(model):
        ledger.tag(tensor, name)


def tag_gradients(ledger: Ledger, model: nn.Module) -> list[Any]:
    """Hooks that tag each gradient when it is accumulated; returned so that they can be removed."""

    def accumulated(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            ledger.tag(parameter.grad, "gradients")

    return [
        parameter.register_post_accumulate_grad_hook(accumulated)
        for parameter in model.parameters()
        if parameter.requires_grad
    ]


def tag_optimizer(ledger: Ledger, optimizer: torch.optim.Optimizer) -> None:
    for value in tree_iter(list(optimizer.state.values())):
        if isinstance(value, torch.Tensor):
            ledger.tag(value, "optimizer_states")


def track_modules(ledger: Ledger, model: Any) -> list[Any]:
    """Hooks that set `ledger.module` to the module whose forward is running; returned so that they
    can be removed."""
    stack: list[str] = []
    names = {module: name for name, module in model.named_modules()}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None:
        # The head and every module that contains it; the backbone does not.
        parts = names[head].split(".")
        ledger.head_modules = {".".join(parts[:length]) for length in range(len(parts) + 1)}
        ledger.hidden_width = head.weight.shape[-1]

    def enter(module: nn.Module, _: Any) -> None:
        stack.append(ledger.module)
        ledger.module = names[module]

    def leave(*_: Any) -> None:
        ledger.module = stack.pop() if stack else ""

    hooks: list[Any] = []
    for module in names:
        hooks.append(module.register_forward_pre_hook(enter))
        hooks.append(module.register_forward_hook(leave, always_call=True))
    return hooks
