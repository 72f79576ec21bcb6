"""What `--stack` accepts, what it becomes, and what it says when it cannot be had."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from launch.predict import overlays
from launch.predict.overlays import Overlay, normalized, overlay
from matrices.errors import UserError


def package(
    directory: Path, name: str, version: str, requires: tuple[str, ...] = (), code: str = ""
) -> Path:
    """A distribution as pip would leave it in a target directory."""
    info = directory / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {one}" for one in requires]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    (info / "RECORD").write_text(f"{name}/__init__.py,sha256=0,0\n")
    (directory / name).mkdir(exist_ok=True)
    (directory / name / "__init__.py").write_text(code)
    return directory


def silent(text: str) -> None:
    pass


def test_none_is_this_environment() -> None:
    assert overlay(None, silent) == Overlay(())
    assert Overlay().packages()["transformers"].version
    assert Overlay().unmet() == []


def test_a_directory_comes_first_and_the_rest_stays(tmp_path: Path) -> None:
    found = overlay(str(package(tmp_path / "over", "peft", "0.0.1")), silent)
    assert found.directories == (tmp_path / "over",)
    packages = found.packages()
    assert packages["peft"].version == "0.0.1"
    assert packages["transformers"].version == Overlay().packages()["transformers"].version


def test_the_identity_is_that_of_the_packages_not_of_the_path(tmp_path: Path) -> None:
    here = Overlay((package(tmp_path / "a", "peft", "0.0.1"),))
    there = Overlay((package(tmp_path / "b", "peft", "0.0.1"),))
    newer = Overlay((package(tmp_path / "c", "peft", "0.0.2"),))
    assert here.identity() == there.identity()
    assert len({here.identity(), newer.identity(), Overlay().identity()}) == 3
    record = tmp_path / "b/peft-0.0.1.dist-info/RECORD"
    record.write_text("peft/__init__.py,sha256=1,0\n")
    assert here.identity() != there.identity(), "other files under the same version"


def test_what_it_asks_for_and_would_not_get_is_told(tmp_path: Path) -> None:
    requires = ("transformers<2", "numpy>=1", "no-such-thing>1", 'tokenizers<0; extra == "dev"')
    [line] = Overlay((package(tmp_path, "peft", "0.0.1", requires),)).unmet()
    version = Overlay().packages()["transformers"].version
    assert line.startswith(
        f"the stack's peft 0.0.1 asks for transformers<2 and would get {version}"
    )


def test_an_interpreter_stands_for_its_packages() -> None:
    found = overlay(sys.executable, silent)
    assert Path(sysconfig.get_paths()["purelib"]).resolve() in found.directories
    directory = Path(sys.executable).parents[1]
    if (directory / "pyvenv.cfg").is_file():
        assert overlay(str(directory), silent) == found, "a venv's directory means its interpreter"


def interpreter(tmp_path: Path, body: str) -> str:
    path = tmp_path / "python9"
    path.write_text(f"#!{sys.executable}\n{body}\n")
    path.chmod(0o755)
    return str(path)


def mistakes(tmp_path: Path) -> dict[str, tuple[str, str]]:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "module.py").write_text("")
    (tmp_path / "file.bin").write_text("")
    (tmp_path / "loose.txt").write_text("peft>=1  # not a pin\n")
    (tmp_path / "none.txt").write_text("# nothing\n")
    other = interpreter(tmp_path, 'print(\'[[3, 9], "/a", "/a"]\')')
    return {
        "empty": (str(tmp_path / "empty"), "the directory is empty"),
        "no metadata": (str(tmp_path / "bare"), "no package with its metadata"),
        "missing": (str(tmp_path / "nowhere"), "no such directory or interpreter"),
        "no python": (str(tmp_path / "file.bin"), "no such directory or interpreter"),
        "other minor": (other, "is Python 3.9 and tunebench runs on"),
        "loose": (str(tmp_path / "loose.txt"), "'peft>=1' is not an exact pin"),
        "nothing": (str(tmp_path / "none.txt"), "names no package"),
        "half a pin": ("peft==0.1,transformers", "'transformers' is not an exact pin"),
        "an option": ("--index-url==x", "is not an exact pin"),
    }


@pytest.mark.parametrize(
    "kind",
    [
        "empty", "no metadata", "missing", "no python", "other minor", "loose", "nothing",
        "half a pin", "an option",
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(tmp_path: Path, kind: str) -> None:
    given, said = mistakes(tmp_path)[kind]
    with pytest.raises(UserError) as caught:
        overlay(given, silent)
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"--stack {given}: ")
    assert "\n" not in str(caught.value)


def test_an_interpreter_that_does_not_answer(tmp_path: Path) -> None:
    broken = interpreter(tmp_path, "import sys; sys.exit('no good')")
    with pytest.raises(UserError, match=r"does not|answers \(no good\)"):
        overlay(broken, silent)


class Pip:
    """Stands for `pip install --target`."""

    def __init__(self, fails: str = "") -> None:
        self.commands: list[list[str]] = []
        self.fails = fails

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        target = Path(command[command.index("--target") + 1])
        package(target, "peft", "0.13.2")
        return subprocess.CompletedProcess(command, 1 if self.fails else 0, "", self.fails)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNEBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_pins_are_installed_once(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = Pip()
    monkeypatch.setattr(overlays.subprocess, "run", pip)
    told: list[str] = []
    found = overlay("peft==0.13.2, accelerate==1.0.1", told.append)
    assert found.packages()["peft"].version == "0.13.2"
    assert found.directories[0].parent == cache / "stacks"
    assert told == [
        f"installing accelerate==1.0.1, peft==0.13.2 into {found.directories[0]}, once ..."
    ]
    (tmp_path / "pins.txt").write_text("accelerate==1.0.1\n\npeft==0.13.2  # as measured\n")
    assert overlay(str(tmp_path / "pins.txt"), told.append) == found, "the same pins in a file"
    assert len(pip.commands) == len(told) == 1
    [command] = pip.commands
    assert command[1:6] == ["-P", "-m", "pip", "install", "--no-deps"]
    assert command[-2:] == ["accelerate==1.0.1", "peft==0.13.2"]
    assert overlay("peft==0.13.1", silent) != found


def test_a_failed_installation_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "note: x\nERROR: No matching distribution found for peft==0.0.0\n"
    monkeypatch.setattr(overlays.subprocess, "run", Pip(said))
    with pytest.raises(UserError, match=r"could not install the stack: No matching distribution"):
        overlay("peft==0.0.0", silent)
    assert [path.suffix for path in (cache / "stacks").iterdir()] in ([], [".lock"])


def test_names_compare_as_pip_compares_them() -> None:
    assert normalized("Huggingface_Hub") == normalized("huggingface.hub") == "huggingface-hub"


def test_an_interpreter_prints_its_version_and_directories() -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-c", overlays.PATHS_PROGRAM],
        capture_output=True,
        text=True,
        check=True,
    )
    version, purelib, _ = json.loads(done.stdout)
    assert version == list(sys.version_info[:2])
    assert os.path.isdir(purelib)
