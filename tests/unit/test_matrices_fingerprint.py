"""Content hashes, against sha256 computed by hand."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from matrices.errors import UserError
from matrices.fingerprint import MIB, fingerprint


def test_a_file_is_its_sha256(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(b"abc")
    # The test vector of FIPS 180-2.
    assert fingerprint(file) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_file_of_64_mib_is_read_whole(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    with file.open("wb") as out:
        out.truncate(64 * MIB)
    before = fingerprint(file)
    assert before == hashlib.sha256(bytes(64 * MIB)).hexdigest()
    with file.open("r+b") as out:
        out.seek(33 * MIB + 5)
        out.write(b"x")
    assert fingerprint(file) != before


def test_a_larger_file_is_sampled_first_and_last_block_included(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    size = 200 * MIB + 7
    with file.open("wb") as out:
        out.truncate(size)
    expected = hashlib.sha256(str(size).encode() + bytes(64 * MIB)).hexdigest()
    assert fingerprint(file) == expected
    for position in (0, MIB - 1, size - MIB, size - 1):
        with file.open("r+b") as out:
            out.seek(position)
            out.write(b"x")
            out.flush()
            assert fingerprint(file) != expected, position
            out.seek(position)
            out.write(b"\0")
    assert fingerprint(file) == expected
    with file.open("ab") as out:
        out.write(b"\0")
    assert fingerprint(file) != expected


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
