"""Repair state that a fork breaks, in every child before it does anything else.

Importing this module is enough: it registers `reset_child` for every later fork of this process.

* torch. The fork marks torch's thread pool as broken, and its first use replaces it. Weights are
  loaded in several threads at once, and two that replace it at the same time fail ("pool INTERNAL
  ASSERT FAILED ... Invalid thread pool", pthreadpool-cpp.cc and ParallelOpenMP.cpp). Setting the
  number of threads is such a use.
* Random generators. Children of one process would draw the same numbers, where processes started
  by hand draw different ones: torch's, numpy's, and the one that `datasets` names cache files by
  when it cannot hash a function (a cell would read the rows that another one prepared). `random`
  and `tempfile` reset themselves.

Not repaired: OpenMP. libgomp's threads do not survive, and a child waits for them forever if the
thread that forks has computed in parallel before. The forks of this project are safe: servers only
import, and `harness.ranks.process_group.run_in_child` comes before any tensor.
"""

from __future__ import annotations

import os
import sys


def reset_child() -> None:
    """Reset torch's threads and the random generators of a forked process."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(torch.get_num_threads())
        torch.default_generator.seed()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()
    fingerprint = sys.modules.get("datasets.fingerprint")
    if fingerprint is not None:
        fingerprint.fingerprint_rng.seed()


os.register_at_fork(after_in_child=reset_child)
