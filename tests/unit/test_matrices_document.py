"""YAML as the matrix language reads it, and the line of everything."""

from __future__ import annotations

from pathlib import Path

import pytest

from matrices.errors import UserError
from matrices.files.yaml_lines import parse, plain, read


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2.0e-4", 2e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("1.", 1.0),
        ("-3", -3),
        ("+3", 3),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        # YAML 1.1 would read these as a boolean, a date, base-60 and thousands.
        ("no", "no"),
        ("on", "on"),
        ("2024-01-01", "2024-01-01"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ('"1e-4"', "1e-4"),
        ("'8'", "8"),
        ("e5", "e5"),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    found = plain(parse(f"key: {text}", "m.yaml"))["key"]
    assert found == value
    assert type(found) is type(value)


def test_every_key_and_item_knows_its_line() -> None:
    top = parse(
        "a: 1\nb:\n  c: {d: 2,\n      e: 3}\n  f:\n    - 4\n    - [5,\n       6]\n", "m.yaml"
    )
    b = top.value["b"].value
    c, f = b["c"].value, b["f"].value
    assert [top.value["a"].where, top.value["b"].where] == ["m.yaml:1", "m.yaml:2"]
    assert [b["c"].where, c["d"].where, c["e"].where] == ["m.yaml:3", "m.yaml:3", "m.yaml:4"]
    assert [b["f"].where, f[0].where, f[1].where] == ["m.yaml:5", "m.yaml:6", "m.yaml:7"]
    assert [item.where for item in f[1].value] == ["m.yaml:7", "m.yaml:8"]
    assert plain(top) == {"a": 1, "b": {"c": {"d": 2, "e": 3}, "f": [4, [5, 6]]}}


def test_anchors_and_aliases_are_plain_yaml() -> None:
    assert plain(parse("a: &x [1, 2]\nb: *x\n", "m.yaml")) == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "m.yaml:3: a: given twice, first at m.yaml:1; keep one"),
        ("a:\n  b: 1\n  b: 1\n", "m.yaml:3: b: given twice, first at m.yaml:2; keep one"),
        ("a: 1\n1: 2\n", "m.yaml:2: the key 1 is not text; put it in quotes"),
        ("true: 2\n", "m.yaml:1: the key true is not text; put it in quotes"),
        ("? [a]\n: 2\n", "m.yaml:1: the key a list or mapping is not text; put it in quotes"),
        ("a: 1\nb: .inf\n", "m.yaml:2: .inf is not a finite number"),
        ("a: -.INF\n", "m.yaml:1: -.INF is not a finite number"),
        ("a: .nan\n", "m.yaml:1: .nan is not a finite number"),
        ("a: 1e999\n", "m.yaml:1: 1e999 is not a finite number"),
        ("a: !!int x\n", "m.yaml:1: x is not a finite number"),
        (
            "a: 1\nb: !!python/object/apply:os.system [ls]\n",
            "m.yaml:2: the tag 'tag:yaml.org,2002:python/object/apply:os.system' is not allowed "
            "here; remove it",
        ),
        (
            "a: !!set {x}\n",
            "m.yaml:1: the tag 'tag:yaml.org,2002:set' is not allowed here; remove it",
        ),
        (
            "a: !!binary aGk=\n",
            "m.yaml:1: the tag 'tag:yaml.org,2002:binary' is not allowed here; remove it",
        ),
        (
            "a: &x {b: 1}\nc:\n  <<: *x\n",
            "m.yaml:3: merge keys (<<) are not supported; write the keys out",
        ),
    ],
)
def test_what_could_mean_something_else_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(text, "m.yaml")
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", 3),
        ("a: 1\n\tb: 2\n", 2),
        ("a: b: c\n", 1),
        ("a: 'open\n", 2),
        ("a: 1\n---\nb: 2\n", 2),
        ("a: *nowhere\n", 1),
    ],
)
def test_syntax_errors_are_one_line_with_the_place(text: str, line: int) -> None:
    with pytest.raises(UserError) as caught:
        parse(text, "m.yaml")
    assert caught.value.where == f"m.yaml:{line}"
    assert caught.value.message.startswith("not YAML: ")
    assert "\n" not in str(caught.value)


def test_control_characters_are_refused() -> None:
    with pytest.raises(UserError, match=r"^m\.yaml: not YAML: unacceptable character"):
        parse("a: \x07", "m.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [*a]",
        "[" * 1500,
        "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n"
        + "\n".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)),
    ],
    ids=["itself", "deep", "billion laughs"],
)
def test_endless_documents_end(text: str) -> None:
    with pytest.raises(UserError):
        parse(text, "m.yaml")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"name: caf\xe9\n")
    with pytest.raises(UserError, match="not UTF-8 text") as caught:
        read(latin)
    assert caught.value.where == str(latin)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read(tmp_path / "none.yaml")
