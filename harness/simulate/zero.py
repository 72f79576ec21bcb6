"""DeepSpeed ZeRO on a fake device."""
from __future__ import annotations
import contextlib
def environment(cell): return {}
def load_device(cell): return "cuda"
@contextlib.contextmanager
def patched():
    yield None
