"""`tunebench matrices`: the matrices that come with tunebench."""

from __future__ import annotations

from launch.commands.console import print_json
from launch.commands.options import JsonOption


def matrices(as_json: JsonOption = False) -> None:
    """List the matrices that come with tunebench.

    \b
    tunebench matrices
    tunebench plan method-comparison
    """
    from matrices.load import load, shipped
    from reports.text import text_table

    found = [load(name) for name in shipped()]
    if as_json:
        print_json([{"name": m.name, "question": m.question, "path": str(m.path)} for m in found])
    else:
        rows = [("matrix", "question"), *((m.name, m.question) for m in found)]
        print("\n".join(text_table(rows)))
