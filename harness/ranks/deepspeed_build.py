"""DeepSpeed's shared-memory collectives, which it compiles for this CPU at first use.

torch guards a compilation by a file. A process that is killed while compiling leaves the file, and
all later ones wait for ever. So tunebench uses its own directory, and removes the file while it has
a lock that the operating system releases when its process dies.
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
    """The build directory of this torch and this DeepSpeed."""
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
    build = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(directory())))
    build.mkdir(parents=True, exist_ok=True)
    with FileLock(build / "tunebench.lock"):
        for stale_lock in build.glob("*/lock"):
            stale_lock.unlink()
        try:
            builder.load(verbose=False)
        except RuntimeError as error:
            raise UserError(
                f"DeepSpeed cannot compile its collectives for this CPU: {first_line(error)}; see "
                "that a C++ compiler and ninja work here",
                key="parallelism",
            ) from error
