"""FSDP on a machine without a GPU: accelerate supports it on GPU ranks only, and silently uses DDP
on CPU ranks (accelerate 1.15, accelerate/state.py, AcceleratorState.__init__)."""

from __future__ import annotations

from typing import Any

SUBSTITUTION = (
    "accelerate makes FSDP of GPU ranks only: on this CPU its choice of DDP was overruled, and "
    "FSDP's own code ran over gloo"
)


def install() -> None:
    """Make accelerate use FSDP for CPU ranks in this process, which trains once."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    chosen = AcceleratorState.__init__
    if getattr(chosen, "chooses_fsdp", False):
        return

    def choose(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        chosen(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is None or self.distributed_type != DistributedType.MULTI_CPU:
            return
        self.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        fsdp_plugin.cpu_offload = _unpinned(fsdp_plugin.cpu_offload)
        self.fsdp_plugin = fsdp_plugin

    choose.chooses_fsdp = True  # type: ignore[attr-defined]
    AcceleratorState.__init__ = choose


def _unpinned(offload: Any) -> Any:
    """Host memory can be pinned for a GPU only."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    return CPUOffloadPolicy(pin_memory=False) if isinstance(offload, CPUOffloadPolicy) else offload
