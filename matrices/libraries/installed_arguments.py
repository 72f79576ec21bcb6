"""The arguments that installed libraries accept, read from their source without importing them."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

# Where each class and the classes it inherits from are defined.
SOURCES: dict[str, tuple[tuple[str, str, str], ...]] = {
    "SFTConfig": (
        ("trl", "trainer/sft_config.py", "SFTConfig"),
        ("trl", "trainer/base_config.py", "_BaseConfig"),
        ("transformers", "training_args.py", "TrainingArguments"),
    ),
    "LoraConfig": (
        ("peft", "tuners/lora/config.py", "LoraConfig"),
        ("peft", "config.py", "PeftConfig"),
        ("peft", "config.py", "PeftConfigMixin"),
    ),
}
_WORDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "dict": "a mapping",
    "list": "a list",
    "None": "null",
}
UNKNOWN = object()


@dataclass(frozen=True)
class Field:
    """One argument: the type it is declared with and the values it is limited to, if known."""

    annotation: ast.expr
    choices: tuple[Any, ...] = ()
    default: Any = UNKNOWN

    def accepts(self, value: Any) -> bool:
        """Whether the declared type takes the value; a type that is not understood takes all."""
        if self.choices and isinstance(value, str):
            return value in self.choices
        return _accepts(self.annotation, value) is not False

    def is_default(self, value: Any) -> bool:
        same_kind = isinstance(self.default, bool) == isinstance(value, bool)
        return self.default is not UNKNOWN and same_kind and bool(self.default == value)

    def words(self) -> list[str]:
        """The words it is limited to."""
        return [each for each in self.choices or _literals(self.annotation) if type(each) is str]

    def described(self) -> str:
        """What it accepts, in words."""
        if self.choices:
            return f"one of {', '.join(map(str, self.choices))}"
        return " or ".join(dict.fromkeys(_described(self.annotation)))


def version(class_name: str) -> str:
    """`trl 1.16.0`: the package that the class comes from."""
    package = SOURCES[class_name][0][0]
    return f"{package} {importlib.metadata.version(package)}"


@cache
def fields(class_name: str) -> dict[str, Field] | None:
    """The fields of an installed dataclass by name; none where its source is not to be found."""
    found: dict[str, Field] = {}
    for package, path, name in SOURCES[class_name]:
        body = _class_body(package, path, name)
        if body is None:
            return None
        for node in body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.setdefault(node.target.id, _field(node))
    return found


def _class_body(package: str, path: str, name: str) -> Sequence[ast.stmt] | None:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    file = Path(spec.submodule_search_locations[0], path)
    if not file.is_file():
        return None
    tree = ast.parse(file.read_text(encoding="utf-8"))
    bodies = (n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
    return next(bodies, None)


def _field(node: ast.AnnAssign) -> Field:
    value = node.value
    if not isinstance(value, ast.Call):
        return Field(node.annotation, default=_literal(value))
    keywords = {word.arg: word.value for word in value.keywords}
    metadata = keywords.get("metadata")
    choices: tuple[Any, ...] = ()
    if isinstance(metadata, ast.Dict):
        for key, entry in zip(metadata.keys, metadata.values, strict=True):
            if isinstance(key, ast.Constant) and key.value == "choices":
                listed = _literal(entry)
                choices = tuple(listed) if isinstance(listed, list) else ()
    factory = keywords.get("default_factory")
    if isinstance(factory, ast.Name) and factory.id in ("dict", "list"):
        return Field(node.annotation, choices, {} if factory.id == "dict" else [])
    return Field(node.annotation, choices, _literal(keywords.get("default")))


def _literal(node: ast.expr | None) -> Any:
    try:
        return UNKNOWN if node is None else ast.literal_eval(node)
    except ValueError:
        return UNKNOWN


def _branches(node: ast.expr) -> list[ast.expr]:
    """The alternatives of a type: of `a | b`, `Union[a, b]` and `Optional[a]`."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _branches(ast.parse(node.value, mode="eval").body)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _branches(node.left) + _branches(node.right)
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if node.value.id == "Optional":
            return [*_branches(inner[0]), ast.Constant(None)]
        if node.value.id == "Union":
            return [branch for each in inner for branch in _branches(each)]
    return [node]


def _literals(node: ast.expr) -> list[Any]:
    """The values of a type's `Literal[...]`."""
    found: list[Any] = []
    for branch in _branches(node):
        if _generic(branch) == "Literal" and isinstance(branch, ast.Subscript):
            listed = _literal(branch.slice)
            found += listed if isinstance(listed, tuple) else [listed]
    return found


def _generic(node: ast.expr) -> str:
    if isinstance(node, ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def _accepts(node: ast.expr, value: Any) -> bool | None:
    """None where it cannot be told."""
    answers = [_branch_accepts(branch, value) for branch in _branches(node)]
    return True if True in answers else None if None in answers else False


def _branch_accepts(node: ast.expr, value: Any) -> bool | None:
    if isinstance(node, ast.Constant) and node.value is None:
        return value is None
    name = _generic(node)
    if name == "Literal":
        return any(_matches(each, value) for each in _literals(node))
    if name == "bool":
        return isinstance(value, bool)
    if name in ("int", "float"):
        kinds = (int,) if name == "int" else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool)
    if name == "str":
        return isinstance(value, str)
    if name in ("dict", "Dict"):
        return isinstance(value, dict)
    if name in ("list", "List"):
        if not isinstance(value, list | tuple):
            return False
        if isinstance(node, ast.Subscript):
            answers = [_accepts(node.slice, each) for each in value]
            return False if False in answers else None if None in answers else True
        return True
    return None


def _matches(literal: Any, value: Any) -> bool:
    """`pissa_niter_[number of iters]` stands for a text with a number in its place."""
    if isinstance(literal, str) and isinstance(value, str) and "[" in literal:
        pattern = re.escape(literal.partition("[")[0]) + r"\d+"
        return re.fullmatch(pattern, value) is not None
    return type(literal) is type(value) and bool(literal == value)


def _described(node: ast.expr) -> list[str]:
    words = []
    for branch in _branches(node):
        name = _generic(branch)
        if isinstance(branch, ast.Constant) and branch.value is None:
            words.append("null")
        elif name == "Literal":
            words.append(f"one of {', '.join(map(str, _literals(branch)))}")
        elif name.lower() == "list" and isinstance(branch, ast.Subscript):
            words.append(f"a list of {ast.unparse(branch.slice)}")
        else:
            words.append(_WORDS.get(name.lower(), ast.unparse(branch)))
    return words
