"""A real Ray cluster on this machine: a head without processors, and nodes that run cells.

As a program (`python ray_cluster.py MARK`) it takes commands from standard input, because Ray knows
one cluster for each process: `add`, and `kill PID`, which kills the node that a process descends
from. As a module it starts and stops that program.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from typing import Any

import psutil

MARK = "TUNEBENCH_TEST_CLUSTER"
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}


class RayCluster:
    """`with RayCluster() as cluster`: two nodes of one processor each, at `cluster.address`."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.mark = secrets.token_hex(8)
        self.environment = environment | {MARK: self.mark, "RAY_USAGE_STATS_ENABLED": "0"}

    def __enter__(self) -> RayCluster:
        self.popen = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self.environment,
            text=True,
        )
        self.address = self._said()
        return self

    def __exit__(self, *details: object) -> None:
        assert self.popen.stdin
        self.popen.stdin.close()
        try:
            self.popen.wait(60)
            self.wait_for_no("")
        finally:
            self.popen.kill()
            self.popen.wait()
            for process in self.left():
                process.kill()

    def _said(self) -> str:
        assert self.popen.stdout
        while line := self.popen.stdout.readline():
            if line.startswith("> "):
                return line[2:].strip()
        raise RuntimeError("the Ray cluster ended")

    def tell(self, command: str) -> None:
        assert self.popen.stdin
        self.popen.stdin.write(command + "\n")
        self.popen.stdin.flush()
        self._said()

    def left(self, command: str = "") -> list[psutil.Process]:
        """The processes of this cluster, and of what ran on it, whose command line has a word."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != "zombie":
                    found += [process] if command in " ".join(process.cmdline()) else []
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def wait_for_no(self, command: str, seconds: float = 60) -> None:
        """Until no process of the cluster has a word in its command line."""
        until = time.monotonic() + seconds
        while left := self.left(command):
            assert time.monotonic() < until, [" ".join(each.cmdline()) for each in left]
            time.sleep(0.2)


def _raylet(node: Any) -> int:
    pid: int = node.all_processes["raylet"][0].process.pid
    return pid


def main() -> None:
    from ray.cluster_utils import Cluster

    # Ray's own messages go where the tests' do.
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(**NODE) for _ in range(2)]
    answer = cluster.address
    while True:
        print(f"> {answer}", file=said, flush=True)
        words = sys.stdin.readline().split()
        if not words:
            break
        if words[0] == "add":
            nodes.append(cluster.add_node(**NODE))
        elif words[0] == "kill":
            above = {each.pid for each in psutil.Process(int(words[1])).parents()}
            [node] = [each for each in nodes if _raylet(each) in above]
            nodes.remove(node)
            cluster.remove_node(node, allow_graceful=False)
        answer = "done"
    cluster.shutdown()


if __name__ == "__main__":
    main()
