"""The settings of the matrix language: their names, what they accept, and how to say so.

Everything is read off the pydantic models of `matrices.cell`, so a field added there is a setting,
with its checks, messages and line in the reference.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from matrices.cell import SECTIONS, TOP_LEVEL, Cell
from matrices.errors import UserError, closest, nearest
from matrices.language.presets import PRESETS
from matrices.libraries.hints import LIBRARY_NAMES, hint

PRESET = "preset"
# Written as a path; a cell holds the content.
PROFILE = "profile"
# Top-level keys of a matrix that are no settings.
MATRIX_KEYS = (
    "name",
    "question",
    "axes",
    "exclude",
    "include",
    "score_base",
    "timeout_seconds",
    "phase_timeout_seconds",
)
# `model: x` and `data: x`.
SHORT = {"model": "model.name", "data": "data.source"}
# Filled in by tunebench, never written by hand.
COMPUTED = {"model.fingerprint", "data.fingerprint"}
# Would be taken for something else, or stand for two things.
MISLEADING = {
    "batch_size": "evaluate.batch_size (lm-eval's) or train.micro_batch_size",
    "config": "data.config (of a hub dataset) or model.config (a config.json)",
}


def _leaves() -> dict[str, tuple[type[BaseModel], str]]:
    """Dotted name to the model and field that check it."""
    found: dict[str, tuple[type[BaseModel], str]] = {name: (Cell, name) for name in TOP_LEVEL}
    for section, model in SECTIONS.items():
        found |= {f"{section}.{leaf}": (model, leaf) for leaf in model.model_fields}
    return {name: place for name, place in found.items() if name not in COMPUTED}


LEAVES = _leaves()
SCHEMAS: dict[str, dict[str, Any]] = {
    dotted: schema["properties"][leaf]
    for dotted, (model, leaf) in LEAVES.items()
    for schema in (model.model_json_schema(),)
} | {PRESET: {"enum": list(PRESETS)}, PROFILE: {"type": "string", "format": "path"}}


def _bare() -> dict[str, str]:
    """Names that need no section: those only one section has."""
    bare = {name: name for name in (*TOP_LEVEL, PRESET)}
    leaves = [leaf for model in SECTIONS.values() for leaf in model.model_fields]
    for dotted, (_, leaf) in LEAVES.items():
        taken = leaf in MATRIX_KEYS or leaf in SECTIONS or leaf in MISLEADING
        if leaves.count(leaf) == 1 and not taken:
            bare[leaf] = dotted
    return bare


BARE = _bare()
DEFAULTS: dict[str, Any] = {
    dotted: model.model_fields[leaf].get_default(call_default_factory=True)
    for dotted, (model, leaf) in LEAVES.items()
}


def resolve(name: str, where: str, section: str | None = None, values: Sequence[Any] = ()) -> str:
    """The dotted name of a setting as written, inside `section` or at top level. The `values`
    written for it only make messages better.

    Raises UserError naming the nearest valid ones."""
    dotted = f"{section}.{name}" if section else BARE.get(name, SHORT.get(name, name))
    if dotted in SCHEMAS:
        return dotted
    if dotted in COMPUTED:
        raise UserError("filled in by tunebench; remove it", key=dotted, where=where)
    if not section and name in MISLEADING:
        raise UserError(f"ambiguous; write {MISLEADING[name]}", key=name, where=where)
    raise UserError(f"unknown setting{_hint(name, section, values)}", key=dotted, where=where)


def _hint(name: str, section: str | None, values: Sequence[Any]) -> str:
    leaf = name.rpartition(".")[2]
    if section and leaf in BARE:
        return f"; it belongs to {BARE[leaf].rpartition('.')[0] or 'the top level'}: {BARE[leaf]}"
    same_leaf = [dotted for dotted, (_, last) in LEAVES.items() if last == leaf]
    if same_leaf and leaf not in BARE:
        return f"; write {MISLEADING.get(leaf) or ' or '.join(same_leaf)}"
    shown = [flow(value) for value in values]
    if elsewhere := hint(leaf, shown):
        return f"; {elsewhere}"
    own = [last for dotted, (_, last) in LEAVES.items() if dotted.startswith(f"{section}.")]
    known = own if section else list(SCHEMAS) if "." in name else [*BARE, *SECTIONS, *MATRIX_KEYS]
    if near := nearest(name, known):
        return near
    for theirs in closest(leaf, LIBRARY_NAMES, 1):
        return f"; did you mean {theirs!r}? {hint(theirs, shown)}"
    return (
        f"; {section} has {', '.join(own)}"
        if section
        else ("; 'python -m matrices.reference' lists them")
    )


def validate(dotted: str, value: Any, where: str) -> Any:
    """The value as the cell's model holds it (lists as tuples, whole numbers as floats where a
    number is asked for). Raises UserError naming what would be right."""
    if dotted == PRESET:
        accepted = isinstance(value, str) and value in PRESETS
        normal = value
    else:
        model, leaf = LEAVES[dotted]
        try:
            normal = getattr(model.model_validate({leaf: _tupled(dotted, value)}), leaf)
            accepted = True
        except ValidationError:
            accepted = False
    if not accepted:
        hint = nearest(value, choices(SCHEMAS[dotted])) if isinstance(value, str) else ""
        fix = hint or f"; for example {dotted.rpartition('.')[2]}: {example(dotted)}"
        raise UserError(
            f"{show(value)} is not {describe(SCHEMAS[dotted])}{fix}", key=dotted, where=where
        )
    return normal


def takes_list(dotted: str) -> bool:
    """Whether the setting's own value can only be a list, so that a list is no axis of it."""
    return SCHEMAS[dotted].get("type") == "array"


def _tupled(dotted: str, value: Any) -> Any:
    branches = SCHEMAS[dotted].get("anyOf", [SCHEMAS[dotted]])
    if isinstance(value, list) and any(branch.get("type") == "array" for branch in branches):
        return tuple(value)
    return value


def choices(schema: dict[str, Any]) -> list[str]:
    """The words a setting accepts, if it only accepts some."""
    branches = schema.get("anyOf", [schema])
    return [word for branch in branches for word in branch.get("enum", [])]


def describe(schema: dict[str, Any]) -> str:
    """What a JSON schema accepts, in words."""
    if "anyOf" in schema:
        return " or ".join(describe(branch) for branch in schema["anyOf"])
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    bounds = {
        "minimum": "of at least",
        "exclusiveMinimum": "above",
        "maximum": "of at most",
        "exclusiveMaximum": "below",
    }
    limits = [f"{words} {schema[name]:g}" for name, words in bounds.items() if name in schema]
    noun = {
        "integer": "a whole number",
        "number": "a number",
        "boolean": "true or false",
        "string": "text",
        "array": "a list of text",
        "object": "a mapping",
        "null": "null",
    }[schema["type"]]
    if schema.get("format") == "path":
        noun = "the path of a file"
    if schema.get("minLength") or schema.get("minItems"):
        noun = f"{noun} that is not empty"
    return " ".join([noun, " and ".join(limits)]) if limits else noun


def example(dotted: str) -> str:
    """A value the setting accepts, as YAML: the default where that says something."""
    if dotted == PROFILE:
        return "./mine.yaml"
    default = DEFAULTS.get(dotted)
    if default not in (None, {}, ()):
        return flow(default)
    kind = SCHEMAS[dotted].get("anyOf", [SCHEMAS[dotted]])[0].get("type")
    return {"integer": "8", "object": "{argument: value}", "string": "name"}.get(
        str(kind), choices(SCHEMAS[dotted])[0] if choices(SCHEMAS[dotted]) else "8"
    )


def flow(value: Any) -> str:
    """A value as one line of YAML; plain words without quotes."""
    if isinstance(value, str) and value.replace("-", "").replace("_", "").isalnum():
        return value
    if isinstance(value, list | tuple):
        return f"[{', '.join(flow(item) for item in value)}]"
    return json.dumps(value, ensure_ascii=False)


def show(value: Any) -> str:
    """A value as it goes into a message: one line, not too long, text in quotes."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
