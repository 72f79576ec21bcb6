"""The generated reference, and what the package promises about itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import matrices
from matrices.cell import SECTIONS
from matrices.language.settings import COMPUTED
from matrices.reference import reference, table

HERE = Path(matrices.__file__).parent


def test_the_reference_is_current() -> None:
    current = (HERE / "REFERENCE.md").read_text()
    assert current == reference(), "run: python -m matrices.reference > matrices/REFERENCE.md"


def test_every_setting_has_a_line_and_a_meaning() -> None:
    lines = reference().splitlines()
    for section, model in SECTIONS.items():
        for leaf in model.model_fields:
            name = f"{section}.{leaf}"
            found = [line for line in lines if line.startswith(f"| `{name}` |")]
            if name in COMPUTED:
                assert not found
            else:
                settings = [line for line in found if line.count("|") == 6]
                assert settings, name
                assert settings[0].split("|")[5].strip(), name


def test_pipes_are_escaped() -> None:
    assert table(("a", "b"), [("x|y", "z")]) == "| a | b |\n| --- | --- |\n| x\\|y | z |\n"


def test_reading_a_matrix_imports_nothing_heavy() -> None:
    code = (
        "import sys; from matrices.load import load; from matrices.expand import expand;"
        "from matrices.rules.verdicts import Machine, refusals; expand(load('quickstart'));"
        "print(sorted({'torch', 'pandas', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
