"""A real SLURM on this machine for the length of a test: slurmctld and one slurmd per made-up node.

Everything runs in the foreground of its own session and is stopped by its pid. No munge, no
accounting: `sacct` answers nothing here, as on many clusters.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

# auth/none and linuxproc so that it works in a container; the short cred_expire because SLURM
# holds a requeued job back until its old credentials have expired (120 s by default).
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CryptoType=crypto/none
AuthInfo=cred_expire=5
SlurmctldPort={ports[0]}
ReturnToService=2
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.%n.log
SlurmdTimeout=10
KillWait=10
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1
GresTypes=gpu
NodeName=n1 {place} Port={ports[1]} CPUs=2 RealMemory=4000 State=UNKNOWN
NodeName=n2 {place} Port={ports[2]} CPUs=2 RealMemory=4000 State=UNKNOWN
NodeName=n3 {place} Port={ports[3]} CPUs=2 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
PartitionName=cpu Nodes=n1,n2 Default=YES MaxTime=60 DefaultTime=10 State=UP
PartitionName=gpu Nodes=n3 MaxTime=INFINITE State=UP
"""
NODES = ("n1", "n2", "n3")
DEADLINE_SECONDS = 180.0


def missing() -> str | None:
    """Why no cluster can be started here; none when it can."""
    for program in ("slurmctld", "slurmd", "sbatch"):
        if shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin") is None:
            return f"{program} is not installed: apt-get install slurm-wlm"
    return None


class Cluster:
    """Two nodes without GPU (partition cpu) and one with two pretended ones (partition gpu)."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.configuration = directory / "slurm.conf"
        path = f"{os.environ.get('PATH', '')}:/usr/sbin"
        self.variables = {"SLURM_CONF": str(self.configuration), "PATH": path}
        self.environment = os.environ | self.variables
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        host = socket.gethostname()
        (directory / "spool").mkdir()
        (directory / "state").mkdir()
        text = CONFIGURATION.format(
            host=host.split(".")[0],
            user=getpass.getuser(),
            ports=free_ports(4),
            directory=directory,
            place=f"NodeHostname={host} NodeAddr=127.0.0.1",
        )
        self.configuration.write_text(text)
        for device in ("gpu0", "gpu1"):  # anything that is there passes for a GPU
            (directory / device).touch()
        (directory / "gres.conf").write_text(f"NodeName=n3 Name=gpu File={directory}/gpu[0-1]\n")

    def start(self) -> None:
        self._daemon("slurmctld", "slurmctld", "-D", "-f", str(self.configuration))
        for node in NODES:
            self.start_node(node)
        wait_for(lambda: set(self.run("sinfo", "-h", "-N", "-o", "%T").split()) == {"idle"})

    def start_node(self, node: str) -> None:
        self._daemon(node, "slurmd", "-D", "-N", node, "-f", str(self.configuration))

    def _daemon(self, name: str, *argv: str) -> None:
        with (self.directory / f"{name}.out").open("ab") as output:
            self.daemons[name] = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self.environment,
                start_new_session=True,
            )

    def run(self, *argv: str, check: bool = False) -> str:
        """Standard output of one of SLURM's commands."""
        done = subprocess.run(
            argv, env=self.environment, capture_output=True, text=True, timeout=30, check=False
        )
        assert not check or done.returncode == 0, f"{argv}: {done.stderr}"
        return done.stdout

    def states(self) -> dict[str, str]:
        """State by job id (12_0 for an array's) of every job SLURM still knows."""
        lines = self.run("squeue", "-h", "-r", "-t", "all", "-o", "%i %T").splitlines()
        return dict(line.split() for line in lines)

    def processes(self) -> list[psutil.Process]:
        """Processes of this cluster: jobs, job steps and daemons, by their environment."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                ours = process.environ().get("SLURM_CONF") == str(self.configuration)
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def leftovers(self) -> list[str]:
        """Command lines of what jobs have left running."""
        daemons = {daemon.pid for daemon in self.daemons.values()}
        left = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if process.pid not in daemons:
                    left.append(" ".join(process.cmdline()))
        return left

    def clear(self) -> None:
        """Cancel every job and wait until nothing of them is left, nodes usable again."""
        self.run("scancel", "-u", getpass.getuser())
        wait_for(lambda: not self.run("squeue", "-h"))
        wait_for(lambda: set(self.run("sinfo", "-h", "-N", "-o", "%T").split()) == {"idle"})

    def stop(self) -> None:
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            self.clear()
        for name in (*NODES, "slurmctld"):
            daemon = self.daemons.pop(name, None)
            if daemon is not None:
                daemon.send_signal(signal.SIGTERM)
                try:
                    daemon.wait(10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
        for process in self.processes():  # a slurmstepd outlives its slurmd
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def wait_for(true: object, seconds: float = DEADLINE_SECONDS, what: str = "that") -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():  # type: ignore[operator]
            return
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds:g} s: {what}")


@contextlib.contextmanager
def cluster(directory: Path) -> Iterator[Cluster]:
    """A running cluster with its files in an empty directory."""
    made = Cluster(directory)
    try:
        made.start()
        yield made
    finally:
        made.stop()
