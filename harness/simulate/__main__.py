"""`python -m harness.simulate [REQUEST.json]`: see `harness.records.prediction.Request`.

Without a file each line of standard input is a request, until the input ends. The stack is imported
once; each distinct simulation runs in a fork of this process, which it cannot disturb, and ends
with `os._exit`: threads of torch's engine do not survive an orderly shutdown.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

# Before torch: a GPU that is there must not be mistaken for the one that is simulated.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main(arguments: list[str]) -> int:
    if len(arguments) > 1:
        print("usage: python -m harness.simulate [REQUEST.json]", file=sys.stderr)
        return 2
    # Libraries print; what is read by the caller goes through a descriptor of its own.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    from harness.simulate.serve import serve

    serve([Path(arguments[0]).read_text()] if arguments else sys.stdin, answers)
    return 0


if __name__ == "__main__":
    code = 1
    try:
        code = main(sys.argv[1:])
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)
