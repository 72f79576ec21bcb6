"""The tensors of a .safetensors file, read from its header alone: no torch, milliseconds.

The format: 8 bytes with the header's length, a JSON header with each tensor's dtype, shape and
place, then the tensors without a gap.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from matrices.errors import UserError

# The format's own limit on the header.
HEADER_LIMIT_BYTES = 100_000_000
LFS_POINTER = b"version https://git-lfs"
BITS = {
    **dict.fromkeys(("F4", "F4_E2M1"), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


class Tensor(NamedTuple):
    """One tensor of a file; `dtype` in the format's own words (BF16)."""

    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, Tensor]:
    """Every tensor of the file by its name. Raises UserError when it is not a safetensors file, or
    is truncated or damaged."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(max(8, len(LFS_POINTER)))
            _refuse_other_content(path, start, size)
            length = int.from_bytes(start[:8], "little")
            if length > HEADER_LIMIT_BYTES:
                raise wrong_file(path, "is not a safetensors file; download it again")
            if 8 + length > size:
                raise _truncated(path, size, 8 + length)
            file.seek(8)
            header = file.read(length)
    except OSError as error:
        raise wrong_file(path, f"cannot be read: {error.strerror}") from error
    tensors, end = _tensors(path, header)
    if 8 + length + end > size:
        raise _truncated(path, size, 8 + length + end)
    if 8 + length + end < size:
        raise wrong_file(
            path,
            f"holds {size - 8 - length - end} bytes after its last tensor; download it again",
        )
    return tensors


def _refuse_other_content(path: Path, start: bytes, size: int) -> None:
    refuse_empty_or_pointer(path, start)
    if size < 8:
        raise wrong_file(path, f"is truncated: {size} bytes; download it again")


def refuse_empty_or_pointer(path: Path, start: bytes) -> None:
    """Raise UserError for a file of weights that starts so and holds none."""
    if not start:
        raise wrong_file(path, "is empty; download it again")
    if start.startswith(LFS_POINTER):
        raise wrong_file(path, "is a Git LFS pointer and not the weights; run 'git lfs pull' there")


def _tensors(path: Path, header: bytes) -> tuple[dict[str, Tensor], int]:
    """The tensors of a header, and where the last one ends."""
    try:
        entries: dict[str, Any] = json.loads(header)
        entries.pop("__metadata__", None)
        places = sorted(tuple(entry["data_offsets"]) for entry in entries.values())
        found = {
            name: Tensor(str(entry["dtype"]), tuple(int(size) for size in entry["shape"]))
            for name, entry in entries.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise wrong_file(
            path, "is not a safetensors file: its header is no list of tensors"
        ) from error
    reached = 0
    for start, end in places:
        if start != reached or end < start:
            raise wrong_file(path, f"is damaged: no tensor starts at byte {reached} of its data")
        reached = end
    for name, entry in entries.items():
        start, end = entry["data_offsets"]
        bits = BITS.get(found[name].dtype)
        needed = None if bits is None else _product(found[name].shape) * bits
        if needed is not None and needed != (end - start) * 8:
            raise wrong_file(
                path, f"is damaged: {name} has {end - start} bytes and needs {needed // 8}"
            )
    return found, reached


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _truncated(path: Path, size: int, needed: int) -> UserError:
    return wrong_file(
        path, f"is truncated: it has {size} bytes and needs {needed}; download it again"
    )


def wrong_file(path: Path, problem: str) -> UserError:
    """The error for a file of a model that is damaged or of another format."""
    return UserError(f"{path} {problem}", key="model.name")
