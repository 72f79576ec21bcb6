"""YAML text to plain values that remember the line they stand on.

YAML 1.2's core schema, not PyYAML's 1.1: `1e-4` is a number, `no` and `2024-01-01` are text. What
could silently mean something else is refused: duplicate keys, merge keys, tags, keys that are not
text, infinite numbers. Every refusal is a UserError with file and line.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from matrices.errors import UserError
from matrices.files.text import CONTROL, visible

# Aliases may share nodes, so a short text can stand for an endless tree.
MAX_NODES = 100_000

_TAG = "tag:yaml.org,2002:"


class _CoreLoader(yaml.SafeLoader):
    """PyYAML's parser with YAML 1.2's idea of what a plain scalar is."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own declaration)


for _name, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
):
    _CoreLoader.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), _first)


@dataclass(frozen=True, slots=True)
class Spot:
    """A value and the place it was written: for a value in a mapping the line of its key, for a
    list item its own. `value` is a scalar, a list of spots, or a dict of spots."""

    value: Any
    where: str


def plain(spot: Spot) -> Any:
    """The value without its places."""
    if isinstance(spot.value, dict):
        return {key: plain(child) for key, child in spot.value.items()}
    if isinstance(spot.value, list):
        return [plain(child) for child in spot.value]
    return spot.value


def read(path: Path) -> Spot:
    """Read a YAML file. Raises UserError when it is not there, not UTF-8, or not our YAML."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text: {error.reason}", where=str(path)) from error
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from error
    return parse(text, str(path))


def parse(text: str, name: str, *, lines: bool = True) -> Spot:
    """Parse one YAML document. With `lines` a place is `name:line`, else just `name`."""
    try:
        node = yaml.compose(text, Loader=_CoreLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark and lines else name
        problem = " ".join(
            part for part in (error.context, error.problem or "it does not parse") if part
        )
        raise UserError(f"not YAML: {problem}", where=where) from error
    except yaml.YAMLError as error:
        raise UserError(f"not YAML: {' '.join(str(error).split())}", where=name) from error
    except RecursionError as error:
        raise UserError("not YAML: nested too deeply", where=name) from error
    if node is None:
        return Spot(None, name)
    try:
        return _YamlBuilder(name, lines).build(node)
    except RecursionError as error:
        raise UserError("an alias contains itself, or lists nest too deeply", where=name) from error


class _YamlBuilder:
    def __init__(self, name: str, lines: bool) -> None:
        self.name = name
        self.lines = lines
        self.nodes = 0

    def where(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}" if self.lines else self.name

    def build(self, node: yaml.Node, where: str | None = None) -> Spot:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise UserError(
                f"more than {MAX_NODES} values; aliases multiply what they stand for",
                where=self.name,
            )
        where = where or self.where(node)
        kind = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.ScalarNode):
            return Spot(_scalar(kind, node.value, where), where)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return Spot([self.build(child) for child in node.value], where)
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return Spot(self.mapping(node), where)
        raise UserError(f"the tag {node.tag!r} is not allowed here; remove it", where=where)

    def mapping(self, node: yaml.MappingNode) -> dict[str, Spot]:
        found: dict[str, Spot] = {}
        for key_node, value_node in node.value:
            where = self.where(key_node)
            if key_node.tag == _TAG + "merge":
                raise UserError(
                    "merge keys (<<) are not supported; write the keys out", where=where
                )
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _TAG + "str":
                shown = getattr(key_node, "value", "")
                shown = shown if isinstance(shown, str) else "a list or mapping"
                raise UserError(f"the key {shown} is not text; put it in quotes", where=where)
            key = key_node.value
            if key in found:
                raise UserError(
                    f"given twice, first at {found[key].where}; keep one", key=key, where=where
                )
            found[key] = self.build(value_node, where)
        return found


def _scalar(kind: str, text: str, where: str) -> Any:
    if kind == "str":
        if found := CONTROL.search(text):
            raise UserError(
                f"{visible(text)} holds a control character, {visible(found[0])}; remove it",
                where=where,
            )
        return text
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    try:
        if kind == "int":
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        if kind == "float":
            number = float(text.replace(".inf", "inf").replace(".nan", "nan").lower())
            if math.isfinite(number):
                return number
    except ValueError:
        number = math.nan
    if kind in ("int", "float"):
        raise UserError(f"{text} is not a finite number", where=where)
    raise UserError(f"the tag {_TAG + kind!r} is not allowed here; remove it", where=where)
