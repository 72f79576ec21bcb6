"""What `tunebench report` costs by the number of records.

`python tests/benchmarks/report.py [N...] [--keep DIR]`

Makes results of N records (100, 300, 1,000 and 3,000 by default; tests/unit/reports/
synthetic_results.py says of what), writes the whole report of each in a process of its own, and
prints its CPU seconds and its largest resident set, and the CPU seconds of reading the records
alone. `--keep DIR` keeps results and reports there.

Not part of the tests: seconds depend on the machine.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/unit/reports")]

import synthetic_results  # noqa: E402

from reports.records.load import load_records  # noqa: E402
from reports.text import MIB  # noqa: E402

COUNTS = (100, 300, 1000, 3000)


def report(results: Path, output: Path) -> tuple[float, int]:
    """CPU seconds and largest resident set, in bytes, of one `tunebench report`."""
    argv = [sys.executable, "-m", "launch.entry", "report", str(results), "--output", str(output)]
    with subprocess.Popen(
        argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"report of {results} ended with {process.returncode}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def reading(results: Path) -> float:
    """CPU seconds of reading the records."""
    began = time.process_time()
    load_records(results)
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("counts", nargs="*", type=int, default=COUNTS)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = options.keep or Path(temporary)
        print("records  reading, CPU s  whole report, CPU s  peak MiB")
        for count in options.counts:
            results = root / str(count)
            if not results.exists():
                synthetic_results.build_large(results, count)
            seconds, peak = report(results, root / f"{count}-report")
            read = reading(results)
            print(f"{count:>7,}  {read:>14.2f}  {seconds:>19.2f}  {peak / MIB:>8,.0f}", flush=True)


if __name__ == "__main__":
    main()
