"""Two hosts on one machine: network namespaces with a cable between them, each with its own name.

They share the file system and the processors, as hosts of a cluster share a results directory.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Host:
    name: str
    interface: str
    address: str

    def start(
        self, argv: Sequence[str], environment: Mapping[str, str], log: Path, cwd: Path
    ) -> subprocess.Popen[bytes]:
        """Start a command on this host, leader of its own session."""
        inside = [
            *("ip", "netns", "exec", self.name),
            *("unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', self.name),
            *argv,
        ]
        with log.open("wb") as file:
            return subprocess.Popen(
                inside,
                env={**os.environ, **environment, "GLOO_SOCKET_IFNAME": self.interface},
                stdout=file,
                stderr=file,
                cwd=cwd,
                start_new_session=True,
            )

    def pids(self) -> list[int]:
        return [int(pid) for pid in _ip("netns", "pids", self.name).split()]


def missing() -> str:
    """What this machine lacks for it; empty when nothing."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    lacking = [name for name in ("ip", "unshare", "hostname") if shutil.which(name) is None]
    return f"{', '.join(lacking)} not installed" if lacking else ""


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """The hosts; on leaving, whatever still runs there is killed and they are taken down."""
    tag = f"{os.getpid() % 0xFFFF:x}"
    hosts = (
        Host(f"one{tag}", f"v1{tag}", "10.77.0.1"),
        Host(f"two{tag}", f"v2{tag}", "10.77.0.2"),
    )
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
        first, second = hosts
        _ip("link", "add", first.interface, "netns", first.name, "type", "veth", *("peer", "name"),
            second.interface, "netns", second.name)  # fmt: skip
        for host in hosts:
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.interface)
            _ip("-n", host.name, "link", "set", "lo", "up")
            _ip("-n", host.name, "link", "set", host.interface, "up")
        yield hosts
    finally:
        for host in hosts:
            with contextlib.suppress(subprocess.CalledProcessError):
                for pid in host.pids():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, 9)
                _ip("netns", "del", host.name)


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
    return done.stdout
