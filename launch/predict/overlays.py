"""Another software stack to predict under. It is laid over this environment and changes nothing in
it.

A stack is a directory of packages (`pip install --no-deps --target DIR`), the packages of another
interpreter, or a set of pins from which such a directory is made. Its packages come first on the
import path; all others come from this environment.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from harness.records.provenance import MEASURED_PACKAGES, NOTED_PACKAGES
from harness.system.child_process import python_module, run
from matrices.errors import UserError
from matrices.files.cache import cache_directory, cache_errors

# Prints an interpreter's version and the directories of its packages, without the user's.
PATHS_PROGRAM = (
    "import json, sys, sysconfig; paths = sysconfig.get_paths(); "
    "print(json.dumps([list(sys.version_info[:2]), paths['purelib'], paths['platlib']]))"
)
PIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(\[[A-Za-z0-9,._-]+\])?==[A-Za-z0-9.!+_-]+")
INTERPRETER_SECONDS = 60.0


@dataclass(frozen=True)
class Overlay:
    """Directories that come before this environment's packages on the import path."""

    directories: tuple[Path, ...] = ()

    def packages(self) -> dict[str, importlib.metadata.Distribution]:
        """Distributions by normalized name, as the simulation would find them: the overlay's
        first."""
        found: dict[str, importlib.metadata.Distribution] = {}
        for directory in self.directories:
            for distribution in importlib.metadata.distributions(path=[str(directory)]):
                found.setdefault(normalized(distribution.metadata["Name"]), distribution)
        for name in (*MEASURED_PACKAGES, *NOTED_PACKAGES):
            if name not in found:
                try:
                    found[name] = importlib.metadata.distribution(name)
                except importlib.metadata.PackageNotFoundError:
                    continue
        return found

    def identity(self) -> str:
        """sha256, hex, of the packages that would be executed: names, versions and the RECORD
        files."""
        packages = {
            name: [distribution.version, _digest(distribution.read_text("RECORD") or "")]
            for name, distribution in self.packages().items()
        }
        text = json.dumps([packages, sys.version_info[:2]], sort_keys=True)
        return _digest(text)

    def unmet(self) -> list[str]:
        """Requirements of the overlay's packages that are not met, one line each."""
        from packaging.requirements import Requirement

        if not self.directories:
            return []
        have = self.packages()
        lines = []
        for name, distribution in have.items():
            if not any(_within(distribution, directory) for directory in self.directories):
                continue
            for text in distribution.requires or ():
                wanted = Requirement(text)
                if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
                    continue
                got = have.get(normalized(wanted.name))
                if got and not wanted.specifier.contains(got.version, prereleases=True):
                    lines.append(
                        f"the stack's {name} {distribution.version} asks for {wanted.name}"
                        f"{wanted.specifier} and would get {got.version}; add it to the stack if "
                        "the import fails"
                    )
        return lines


def _within(distribution: importlib.metadata.Distribution, directory: Path) -> bool:
    return Path(str(distribution.locate_file(""))).resolve() == directory.resolve()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def normalized(name: str) -> str:
    """A distribution's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def overlay(text: str | None, message: Callable[[str], None]) -> Overlay:
    """The overlay that `--stack TEXT` names; an empty one without a text. `message` is called
    before slow work.

    Raises UserError when it is not a stack, or cannot be installed.
    """
    if text is None:
        return Overlay()
    where = f"--stack {text}"
    path = Path(text).expanduser()
    if path.is_dir():
        inner = path / "bin" / "python"
        if (path / "pyvenv.cfg").is_file() and inner.exists():
            return _of_interpreter(str(inner), where)
        return Overlay((_checked(path, where),))
    if path.is_file():
        if path.suffix in (".txt", ".in"):
            return Overlay((_installed(_pins_of_file(path, where), where, message),))
        if "python" in path.name:
            return _of_interpreter(str(path), where)
        raise _no_stack(where)
    pins = [part.strip() for part in text.split(",") if part.strip()]
    if pins and "==" in text:
        return Overlay((_installed(_pins(pins, where), where, message),))
    if text.startswith("python") and (program := shutil.which(text)):
        return _of_interpreter(program, where)
    raise _no_stack(where)


def _no_stack(where: str) -> UserError:
    return UserError(
        "no such directory or interpreter; give a directory made by 'pip install --no-deps "
        "--target DIR ...', a Python interpreter, a requirements file (.txt), or pins like "
        "transformers==4.48.1,peft==0.13.2",
        where=where,
    )


def _checked(directory: Path, where: str) -> Path:
    if not any(directory.iterdir()):
        raise UserError(
            "the directory is empty; fill it with 'pip install --no-deps --target "
            f"{directory} PACKAGE==VERSION ...'",
            where=where,
        )
    if not any(directory.glob("*.dist-info")):
        raise UserError(
            "no package with its metadata (*.dist-info) is in this directory, so its versions "
            f"cannot be told; make it with 'pip install --no-deps --target {directory} ...'",
            where=where,
        )
    return directory.resolve()


def _of_interpreter(program: str, where: str) -> Overlay:
    """The site-packages of another interpreter. It must have the same minor version, as compiled
    packages of another one cannot be imported."""
    try:
        done = run([program, "-I", "-c", PATHS_PROGRAM], INTERPRETER_SECONDS)
        done.check_returncode()
        version, *paths = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise UserError(
            f"is not a Python interpreter that answers ({_brief(error)}); give its path, e.g. "
            ".venv/bin/python",
            where=where,
        ) from error
    ours = list(sys.version_info[:2])
    if version != ours:
        theirs, here = (".".join(map(str, each)) for each in (version, ours))
        raise UserError(
            f"is Python {theirs} and tunebench runs on {here}, which cannot import its compiled "
            f"packages; install tunebench there, or use an environment of Python {here}",
            where=where,
        )
    return Overlay(tuple(_checked(Path(path), where) for path in dict.fromkeys(paths)))


def _brief(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = error.stderr.strip().splitlines()
        return lines[-1] if lines else f"exit code {error.returncode}"
    return getattr(error, "strerror", None) or type(error).__name__


def _pins_of_file(path: Path, where: str) -> list[str]:
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return _pins([line for line in lines if line], where)


def _pins(pins: Sequence[str], where: str) -> list[str]:
    if not pins:
        raise UserError("names no package; write e.g. transformers==4.48.1", where=where)
    for pin in pins:
        if not PIN.fullmatch(pin):
            raise UserError(
                f"{pin!r} is not an exact pin; write NAME==VERSION, e.g. transformers==4.48.1",
                where=where,
            )
    return sorted(pins)


def _installed(pins: Sequence[str], where: str, message: Callable[[str], None]) -> Path:
    """The overlay of these pins in the cache directory; pip makes it the first time."""
    minor = "{}.{}".format(*sys.version_info[:2])
    name = _digest(json.dumps([pins, minor]))[:16]
    target = cache_directory() / "stacks" / name
    if target.is_dir():
        return target
    with cache_errors(target.parent, where=where):
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f"{name}.lock"):
            if not target.is_dir():
                message(f"installing {', '.join(pins)} into {target}, once ...")
                _install(pins, target, where)
    return target


def _install(pins: Iterable[str], target: Path, where: str) -> None:
    """Installs into a scratch directory and renames it, so that an overlay is whole or not
    there."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as scratch:
        made = Path(scratch) / "overlay"
        options = ["--no-deps", "--quiet", "--no-input", "--disable-pip-version-check"]
        command = python_module("pip", "install", *options, "--target", str(made), *pins)
        done = run(command, environment={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            errors = [line for line in lines if line.startswith("ERROR:")]
            last = (errors or lines or ["pip said nothing"])[-1].removeprefix("ERROR: ")
            raise UserError(f"pip could not install the stack: {last}", where=where)
        made.rename(target)
