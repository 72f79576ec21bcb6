"""Content hashes, against sha256 computed by hand."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import pytest

from matrices.errors import UserError
from matrices.files.file_hash import MIB
from matrices.files.fingerprint import fingerprint, is_unchanged


def test_a_file_is_its_sha256(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(b"abc")
    # The test vector of FIPS 180-2.
    assert fingerprint(file) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNEBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hashes"


def sparse(path: Path, size: int) -> Path:
    with path.open("wb") as out:
        out.truncate(size)
    return path


def write_at(path: Path, position: int, byte: bytes) -> None:
    with path.open("r+b") as out:
        out.seek(position)
        out.write(byte)


@pytest.mark.usefixtures("cache")
def test_a_large_file_is_read_whole(tmp_path: Path) -> None:
    file = sparse(tmp_path / "weights", 65 * MIB)
    assert fingerprint(file) == hashlib.sha256(bytes(65 * MIB)).hexdigest()
    # Between two blocks that were sampled once.
    write_at(file, 65 * MIB // 2 + 5, b"x")
    with file.open("rb") as content:
        assert fingerprint(file) == hashlib.file_digest(content, "sha256").hexdigest()


@pytest.mark.usefixtures("cache")
def test_a_fingerprint_of_samples_still_holds(tmp_path: Path) -> None:
    """As the first records have it of files above 64 MiB: the size and 64 blocks of 1 MiB."""
    size = 200 * MIB + 7
    file = sparse(tmp_path / "weights", size)
    sampled = hashlib.sha256(str(size).encode() + bytes(64 * MIB)).hexdigest()
    assert is_unchanged(file, sampled)
    assert is_unchanged(file, fingerprint(file))
    write_at(file, size - 1, b"x")
    assert not is_unchanged(file, sampled)


def test_a_settled_large_file_is_read_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = sparse(tmp_path / "weights", 5 * MIB)
    digest = hashlib.sha256(bytes(5 * MIB)).hexdigest()
    assert fingerprint(file) == digest
    assert not cache.exists(), "it may change once more within the clock's grain"

    monkeypatch.setattr("matrices.files.file_hash.time.time", lambda: file.stat().st_ctime + 60)
    assert fingerprint(file) == digest
    [entry] = cache.iterdir()
    monkeypatch.setattr("matrices.files.file_hash.hashlib.file_digest", _must_not_be_read)
    assert fingerprint(file) == digest
    link = tmp_path / "link"
    link.symlink_to(file)
    assert fingerprint(link) == digest

    monkeypatch.undo()
    monkeypatch.setenv("TUNEBENCH_CACHE", str(cache.parent))
    for damaged in (
        b"",
        entry.read_bytes()[:80],
        entry.read_bytes().replace(b"0", b"1", 1),
        b"\xff",
    ):
        entry.write_bytes(damaged)
        assert fingerprint(file) == digest


def _must_not_be_read(*_: object) -> None:
    raise AssertionError("read again")


def test_an_edit_that_keeps_size_and_mtime_is_seen(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = sparse(tmp_path / "weights", 5 * MIB)
    state = file.stat()
    monkeypatch.setattr("matrices.files.file_hash.time.time", lambda: state.st_ctime + 60)
    before = fingerprint(file)
    assert len(list(cache.iterdir())) == 1
    time.sleep(0.02)
    write_at(file, 77, b"x")
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert fingerprint(file) != before


def test_a_cache_that_cannot_be_written_costs_time_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TUNEBENCH_CACHE", str(tmp_path / "file"))
    file = sparse(tmp_path / "weights", 5 * MIB)
    monkeypatch.setattr("matrices.files.file_hash.time.time", lambda: file.stat().st_ctime + 60)
    assert fingerprint(file) == hashlib.sha256(bytes(5 * MIB)).hexdigest()


def test_a_file_that_grows_while_it_is_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = sparse(tmp_path / "weights", 5 * MIB)
    read = hashlib.file_digest

    def grow(opened: Any, name: str) -> Any:
        digest = read(opened, name)
        with file.open("ab") as out:
            out.write(b"x")
        return digest

    monkeypatch.setattr("matrices.files.file_hash.hashlib.file_digest", grow)
    with pytest.raises(UserError, match="changed while it was read"):
        fingerprint(file)


def test_a_directory_is_its_names_and_contents(tmp_path: Path) -> None:
    def make(name: str, files: dict[str, str]) -> Path:
        for relative, text in files.items():
            path = tmp_path / name / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path / name

    def sha(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    one = make("one", {"config.json": "{}", "sub/weights": "w"})
    listing = f"config.json\0{sha('{}')}\nsub/weights\0{sha('w')}\n"
    assert fingerprint(one) == sha(listing)
    assert fingerprint(make("two", {"sub/weights": "w", "config.json": "{}"})) == fingerprint(one)
    dotted = make("three", {"config.json": "{}", "sub/weights": "w", ".git/HEAD": "x", ".a": "b"})
    assert fingerprint(dotted) == fingerprint(one)
    for other in (
        {"config.json": "{}", "sub/weights": "v"},
        {"config.json": "{}", "weights": "w"},
        {"config.json": "{}"},
    ):
        name = f"other{len(list(tmp_path.iterdir()))}"
        assert fingerprint(make(name, other)) != fingerprint(one)


def test_links_to_files_count_as_their_content(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("w")
    for name in ("linked", "plain"):
        (tmp_path / name).mkdir()
    (tmp_path / "linked" / "weights").symlink_to(tmp_path / "blob")
    (tmp_path / "plain" / "weights").write_text("w")
    assert fingerprint(tmp_path / "linked") == fingerprint(tmp_path / "plain")


def test_what_cannot_be_hashed_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no files"):
        fingerprint(tmp_path / "empty")
    (tmp_path / "empty" / "broken").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="broken: No such file"):
        fingerprint(tmp_path / "empty")
