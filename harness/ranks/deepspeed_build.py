"""What DeepSpeed compiles for this CPU at first use: its collectives through shared memory.

torch guards a compilation by a file. A process that is killed meanwhile leaves it behind, and
every later one waits for ever without a word; so the directory is our own, and the file is removed
by whoever holds a lock that the operating system takes from the dead.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock

from harness import device
from harness.models.packaged import cache_directory
from matrices.errors import UserError, first_line


def directory() -> Path:
    """Of this torch and this DeepSpeed."""
    return cache_directory() / "extensions" / f"{version('torch')}-{version('deepspeed')}"


def load_host_collectives() -> None:
    """Load them into this process, compiling them if nobody has yet (about half a minute).

    Nothing to do on a GPU, or where DeepSpeed finds no compiler and goes without. Raises UserError
    when the compilation fails.
    """
    if device.has_cuda():
        return
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        return
    place = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(directory())))
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place / "tunebench.lock"):
        for left_behind in place.glob("*/lock"):
            left_behind.unlink()
        try:
            builder.load(verbose=False)
        except RuntimeError as error:
            raise UserError(
                f"DeepSpeed cannot compile its collectives for this CPU: {first_line(error)}; see "
                "that a C++ compiler and ninja work here",
                key="parallelism",
            ) from error
