"""Reading a matrix: YAML, command-line overrides and local files into a checked `Matrix`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from matrices.accelerate_profiles import profile_at
from matrices.catalogue.models import plain_config
from matrices.cell import SECTIONS
from matrices.errors import UserError, nearest
from matrices.files import yaml_lines
from matrices.files.data_columns import first_columns
from matrices.files.fingerprint import (
    FINGERPRINTED,
    fingerprint,
    is_written_as_path,
    local_path,
)
from matrices.files.yaml_lines import Spot
from matrices.language import matrix_keys
from matrices.language.settings import (
    MATRIX_KEYS,
    PROFILE,
    SHORT,
    example,
    resolve,
    show,
    takes_list,
    validate,
)

SHIPPED = Path(__file__).parent
MAX_COMBINATIONS = 1_000_000


@dataclass(frozen=True)
class MatrixEntry:
    """One `exclude` or `include`: dotted settings, and where it is written."""

    settings: Mapping[str, Any]
    where: str


@dataclass(frozen=True)
class Matrix:
    """A matrix as written, every value checked. Settings are dotted (`preset` is one of them)."""

    name: str
    path: Path
    question: str = ""
    constants: Mapping[str, Any] = field(default_factory=dict)
    axes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    exclude: tuple[MatrixEntry, ...] = ()
    include: tuple[MatrixEntry, ...] = ()
    score_base: bool = True
    timeout_seconds: float | None = None
    phase_timeout_seconds: float | None = None
    places: Mapping[str, str] = field(default_factory=dict)
    """Dotted setting, section or matrix key to `file:line`."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """Absolute path of each local model and data file to its content hash."""
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Absolute path of each local data file to its columns."""
    notes: tuple[str, ...] = ()

    def locate(self, key: str) -> str:
        """`file:line` of a setting; where it is not written, of what it most likely comes from:
        its section, the preset, or else the file."""
        section = key.partition(".")[0]
        for name in (key, section, "preset"):
            if name in self.places:
                return self.places[name]
        return str(self.path)


def shipped() -> list[str]:
    """Names of the matrices that come with tunebench."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def load(source: str | Path, overrides: Sequence[str] = (), seeds: int | None = None) -> Matrix:
    """Read a matrix file, or a shipped matrix by name, and apply `--set` and `--seeds`.

    An override `KEY=VALUE` replaces a constant or a whole axis; a list makes an axis (for a
    setting that is itself a list, a list of lists does). `seeds` N is the axis 0 to N-1. Local
    models and data are hashed. Raises UserError with file and line for anything wrong in it.
    """
    path = find(source)
    top = yaml_lines.read(path)
    if not isinstance(top.value, dict) or not top.value:
        raise UserError("a matrix is a mapping of keys, e.g. 'name: my-sweep'", where=top.where)
    own = {key: spot for key, spot in top.value.items() if key in MATRIX_KEYS}
    rest = {key: spot for key, spot in top.value.items() if key not in MATRIX_KEYS}
    reader = _Reader(path.parent)
    constants = reader.settings(rest)
    axes = reader.axes(own.get("axes"))
    for key in constants.keys() & axes.keys():
        raise UserError(
            f"an axis here and a constant at {constants[key].where}; keep one",
            key=key,
            where=axes[key].where,
        )
    matrix = Matrix(
        name=matrix_keys.name(own.get("name"), path),
        path=path,
        question=matrix_keys.text(own.get("question")),
        constants={key: spot.value for key, spot in constants.items()},
        axes={key: spot.value for key, spot in axes.items()},
        exclude=reader.entries("exclude", own.get("exclude")),
        include=reader.entries("include", own.get("include")),
        score_base=matrix_keys.flag(own.get("score_base")),
        timeout_seconds=matrix_keys.seconds("timeout_seconds", own.get("timeout_seconds")),
        phase_timeout_seconds=matrix_keys.seconds(
            "phase_timeout_seconds", own.get("phase_timeout_seconds")
        ),
        fingerprints=reader.fingerprints,
        columns=reader.columns,
        notes=tuple(reader.notes),
        places={key: spot.where for key, spot in top.value.items()} | reader.places,
    )
    return _overridden(matrix, overrides, seeds)


def find(source: str | Path) -> Path:
    """The file of a path or of a shipped matrix's name; raises UserError when there is none."""
    text = str(source)
    if isinstance(source, str) and text in shipped():
        return SHIPPED / f"{text}.yaml"
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError("is a directory; name a matrix file in it", where=text)
    if isinstance(source, Path) or path.suffix in (".yaml", ".yml") or "/" in text:
        raise UserError("no such file", where=text)
    raise UserError(
        f"no matrix is called {text!r}{nearest(text, shipped())}; shipped are "
        f"{', '.join(shipped())}, or give the path of a YAML file"
    )


class _Reader:
    """Turns the parts of a matrix written in one place (a file, a `--set`) into checked values;
    relative paths start at `base`."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.fingerprints: dict[str, str] = {}
        self.columns: dict[str, tuple[str, ...]] = {}
        self.notes: dict[str, None] = {}
        self.places: dict[str, str] = {}

    def settings(self, written: Mapping[str, Spot]) -> dict[str, Spot]:
        """Dotted settings with checked values."""
        return {
            key: Spot(self.checked(key, spot), spot.where) for key, spot in flat(written).items()
        }

    def checked(self, key: str, spot: Spot) -> Any:
        self.places.setdefault(key, spot.where)
        if key == PROFILE:
            return profile_at(self.base, spot)
        value = validate(key, yaml_lines.plain(spot), spot.where)
        local = local_path(key, value, self.base, spot.where)
        if local is None:
            return value
        if key == "data.source":
            self.columns[str(local)] = first_columns(local)
        if key == "model.name" and "/" not in value and not is_written_as_path(value):
            note = f"{spot.where}: model {value!r} is the directory {local}; write ./{value}"
            self.notes[f"{note} to say so"] = None
        if key in FINGERPRINTED and str(local) not in self.fingerprints:
            try:
                if key == "model.config":
                    plain_config(local)
                self.fingerprints[str(local)] = fingerprint(local)
            except UserError as error:
                # The file and the key in it, for a config; then where the matrix names it.
                inner = ": ".join(part for part in (error.where, error.key, error.message) if part)
                raise UserError(inner, key=key, where=spot.where) from error
        return str(local)

    def axes(self, spot: Spot | None) -> dict[str, Spot]:
        if spot is None:
            return {}
        if not isinstance(spot.value, dict):
            raise UserError(
                "is a mapping of settings to lists, e.g. axes: {rank: [8, 64]}",
                key="axes",
                where=spot.where,
            )
        return {key: self.axis(key, values) for key, values in flat(spot.value, True).items()}

    def axis(self, key: str, spot: Spot) -> Spot:
        self.places.setdefault(key, spot.where)
        if not isinstance(spot.value, list):
            raise UserError(
                f"an axis is a list of values, e.g. [{example(key)}], not "
                f"{show(yaml_lines.plain(spot))}; a single value is a constant, outside of axes",
                key=key,
                where=spot.where,
            )
        if not spot.value:
            raise UserError(
                f"an axis without values makes no cells; give some, e.g. [{example(key)}], or "
                "remove it",
                key=key,
                where=spot.where,
            )
        values: list[Any] = []
        seen: set[str] = set()
        for item in spot.value:
            value = self.checked(key, item)
            if (text := repr(value)) in seen:
                raise UserError(
                    f"{show(value)} stands twice in this axis; remove one",
                    key=key,
                    where=item.where,
                )
            seen.add(text)
            values.append(value)
        return Spot(tuple(values), spot.where)

    def entries(self, kind: str, spot: Spot | None) -> tuple[MatrixEntry, ...]:
        if spot is None:
            return ()
        if not isinstance(spot.value, list):
            raise UserError(
                f"is a list of settings, e.g. {kind}: [{{method: full, rank: 64}}]",
                key=kind,
                where=spot.where,
            )
        found = []
        for item in spot.value:
            if not isinstance(item.value, dict) or not item.value:
                raise UserError(
                    f"an entry names settings, e.g. {{method: full, rank: 64}}, not "
                    f"{show(yaml_lines.plain(item))}",
                    key=kind,
                    where=item.where,
                )
            settings = self.settings(item.value)
            found.append(MatrixEntry({key: s.value for key, s in settings.items()}, item.where))
        return tuple(found)


def flat(written: Mapping[str, Spot], axes: bool = False) -> dict[str, Spot]:
    """Settings written in sections, bare or dotted, under their dotted names, unchecked; with
    `axes`, each with a list of values.

    Raises UserError for unknown names and for a setting written twice in different ways."""
    found: dict[str, Spot] = {}
    for name, spot in written.items():
        if name in SECTIONS and isinstance(spot.value, dict):
            inner = {
                resolve(leaf, s.where, name, _values(s, axes)): s for leaf, s in spot.value.items()
            }
        elif name in SECTIONS and name not in SHORT:
            raise UserError(
                f"is a section of settings, not {show(yaml_lines.plain(spot))}; write for example "
                f"{name}: {{{next(iter(SECTIONS[name].model_fields))}: ...}}",
                key=name,
                where=spot.where,
            )
        else:
            inner = {resolve(name, spot.where, None, _values(spot, axes)): spot}
        _once(found, inner)
    return found


def _values(spot: Spot, axis: bool) -> list[Any]:
    value = yaml_lines.plain(spot)
    return value if axis and isinstance(value, list) else [value]


def _overridden(matrix: Matrix, overrides: Sequence[str], seeds: int | None) -> Matrix:
    reader = _Reader(Path.cwd())
    written: dict[str, Spot] = {}
    changes: dict[str, Any] = {}
    for override in overrides:
        where = f"--set {override}"
        name, equals, text = (part.strip() for part in override.partition("="))
        if not equals or not name:
            raise UserError("write KEY=VALUE, e.g. --set rank=8 or --set rank=[8,64]", where=where)
        spot = yaml_lines.parse(text, where, lines=False)
        if name in ("timeout_seconds", "phase_timeout_seconds"):
            changes[name] = matrix_keys.seconds(name, spot)
        elif name == "score_base":
            changes[name] = matrix_keys.flag(spot)
        elif name in MATRIX_KEYS:
            raise UserError("can only be changed in the matrix itself", key=name, where=where)
        else:
            _once(written, flat({name: spot}))
    if seeds is not None:
        where = f"--seeds {seeds}"
        if seeds < 1:
            raise UserError("write a count of at least 1", key="seed", where=where)
        if seeds > MAX_COMBINATIONS:
            raise UserError(
                f"makes {seeds:,} cells of each; at most {MAX_COMBINATIONS:,} combinations are "
                "expanded",
                key="seed",
                where=where,
            )
        _once(written, {"seed": Spot(seeds, where)})
        del written["seed"]
    constants, axes = dict(matrix.constants), dict(matrix.axes)
    if seeds is not None:
        reader.places["seed"] = f"--seeds {seeds}"
        constants.pop("seed", None)
        axes["seed"] = tuple(range(seeds))
    for key, spot in written.items():
        if is_axis(key, spot):
            constants.pop(key, None)
            axes[key] = reader.axis(key, spot).value
        else:
            axes.pop(key, None)
            constants[key] = reader.checked(key, spot)
    return replace(
        matrix,
        constants=constants,
        axes=axes,
        places={**matrix.places, **reader.places},
        fingerprints={**matrix.fingerprints, **reader.fingerprints},
        columns={**matrix.columns, **reader.columns},
        notes=(*matrix.notes, *reader.notes),
        **changes,
    )


def _once(found: dict[str, Spot], more: Mapping[str, Spot]) -> None:
    """Add settings to those found, refusing one that is already there."""
    for key, spot in more.items():
        if key in found:
            raise UserError(
                f"given twice, first at {found[key].where}; keep one", key=key, where=spot.where
            )
        found[key] = spot


def is_axis(key: str, spot: Spot) -> bool:
    """Whether an override's value is an axis: a list, or a list of lists for a list setting."""
    if not isinstance(spot.value, list):
        return False
    return not takes_list(key) or any(isinstance(item.value, list) for item in spot.value)
