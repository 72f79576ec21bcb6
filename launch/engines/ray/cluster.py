"""A Ray cluster: its nodes, their resources, and the resources that a cell requests."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.records import provenance
from harness.records.store import Store, disk_errors
from launch.engines.ray.task import NodeSoftware, inspect_node
from launch.processes.stop_signals import stop_signals
from matrices.cell import Cell
from matrices.errors import UserError

CONNECT_SECONDS = 5.0
INSPECT_SECONDS = 120.0
# Only orders and reports pass through Ray, which accepts no less than 75 MiB.
OBJECT_STORE_BYTES = 100 * 2**20
START_ONE = "start a cluster with `ray start --head`, or one for this run with --address local"


@dataclass(frozen=True)
class RayNode:
    """A live node, and its amount of each of Ray's resources."""

    node_id: str
    host: str
    resources: Mapping[str, float]

    def __str__(self) -> str:
        shown = {name: n for name, n in self.resources.items() if _is_shown(name)}
        return f"{self.host} with {_amounts(shown) or 'nothing'}"


@dataclass(frozen=True)
class TaskRequest:
    """What one cell requests of one node: Ray's resources by name. `device` is the resource that
    counts devices."""

    resources: Mapping[str, float]
    device: str

    def fits(self, node: RayNode) -> bool:
        return all(node.resources.get(name, 0) >= n for name, n in self.resources.items())

    def options(self) -> dict[str, Any]:
        """Ray's options of a task, with zero CPUs and GPUs unless they are named."""
        rest = dict(self.resources)
        options = {
            "num_cpus": rest.pop("CPU", 0),
            "num_gpus": rest.pop("GPU", 0),
            "memory": rest.pop("memory", None),
            "resources": rest or None,
        }
        return {name: value for name, value in options.items() if value is not None}


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Connect to a cluster, or start one for this run (`local`).

    Raises UserError within seconds when it cannot connect.
    """
    # Ray reads this when it is imported.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise UserError(
            "--on ray needs the package ray: pip install 'tunebench[ray]' here and on the nodes"
        ) from error
    # Ray prints a dead node's output to standard output, which is for results.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            own = address == "local"
            ray.init(
                address="local" if own else _reachable(address),
                include_dashboard=False if own else None,
                object_store_memory=OBJECT_STORE_BYTES if own else None,
                log_to_driver=False,
                configure_logging=False,
            )
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            line = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(f"no connection to Ray: {line}", where="--address") from error
        try:
            yield
        finally:
            # A signal must not stop the shutdown, which ends a cluster of this run.
            with stop_signals() as signals:
                signals.raising = False
                ray.shutdown()


def _reachable(address: str | None) -> str:
    """HOST:PORT of a head node that answers. Raises UserError.

    If none answers, ray.init would retry for many minutes and ignore Ctrl-C.
    """
    from ray._private import services

    if address is not None and "://" in address:
        raise UserError(
            f"{address} is no address of a head node: give HOST:PORT, as `ray start` prints it",
            where="--address",
        )
    try:
        found: str = services.canonicalize_bootstrap_address_or_die(address or "auto")
    except ConnectionError as error:
        raise UserError(f"no Ray cluster runs on this machine: {START_ONE}") from error
    except (ValueError, OSError) as error:
        raise UserError(
            f"{address} is no HOST:PORT of a head node ({error})", where="--address"
        ) from error
    host, _, port = found.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS):
            return found
    except (OSError, ValueError) as error:
        raise UserError(f"nothing answers at {found} ({error}): {START_ONE}") from error


def living_nodes() -> list[RayNode]:
    """The live nodes, by host name."""
    import ray

    found = [
        RayNode(each["NodeID"], each["NodeManagerHostname"], dict(each["Resources"]))
        for each in ray.nodes()
        if each["Alive"]
    ]
    return sorted(found, key=lambda node: (node.host, node.node_id))


def has_gpus(nodes: Sequence[RayNode]) -> bool:
    return any(node.resources.get("GPU", 0) >= 1 for node in nodes)


def parse_resources(options: Sequence[str]) -> dict[str, float]:
    """`--resource NAME=PER_DEVICE` as amounts by name. Raises UserError."""
    amounts: dict[str, float] = {}
    for option in options:
        name, equals, amount = option.partition("=")
        try:
            amounts[name.strip()] = float(amount)
        except ValueError:
            amounts[name.strip()] = -1.0
        if not name.strip() or not equals or not amounts[name.strip()] > 0:
            raise UserError(
                f"{option!r} is not NAME=PER_DEVICE with an amount above 0, as in accelerator=1",
                where="--resource",
            )
    return amounts


def task_request(
    cell: Cell, nodes: Sequence[RayNode], per_device: Mapping[str, float]
) -> TaskRequest:
    """The request of a cell: `per_device`, or a GPU for each device. On a cluster without GPUs it
    is all processors of a node, as in a local run.

    Raises UserError when it fits on no node, or the cell needs several machines.
    """
    if cell.nodes > 1:
        raise UserError(
            f"the cell runs on {cell.nodes} machines and a task of Ray's on one; use --on slurm, "
            "or set nodes to 1",
            key="nodes",
        )
    count = cell.devices_per_node
    if per_device:
        amounts = {name: amount * count for name, amount in per_device.items()}
        device = next((name for name in amounts if name not in ("CPU", "memory")), "CPU")
        wanted = TaskRequest(amounts, device)
    elif has_gpus(nodes):
        wanted = TaskRequest({"GPU": count, "CPU": 1}, "GPU")
    else:
        enough = [n.resources["CPU"] for n in nodes if n.resources.get("CPU", 0) >= count]
        wanted = TaskRequest({"CPU": min(enough, default=count)}, "CPU")
    for name, amount in wanted.resources.items():
        if amount > 1 and amount != int(amount):
            raise UserError(
                f"{name} comes to {amount:g} for {count} devices, and Ray takes whole numbers "
                "above 1",
                where="--resource",
            )
    if not any(wanted.fits(node) for node in nodes):
        largest = max(nodes, key=lambda node: _size(node, wanted))
        raise UserError(
            f"no node of the cluster could ever hold a cell on {count} devices: it asks for "
            f"{_amounts(wanted.resources)}, and the largest is {largest}",
            key="devices",
        )
    return wanted


def _size(node: RayNode, wanted: TaskRequest) -> tuple[float, float]:
    return node.resources.get(wanted.device, 0), node.resources.get("CPU", 0)


def _is_shown(name: str) -> bool:
    return not name.startswith("node:") and name not in ("memory", "object_store_memory")


def _amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {amount:g}" for name, amount in sorted(resources.items()))


def check_nodes(nodes: Sequence[RayNode], store: Store) -> None:
    """Raise UserError unless every node sees the results directory and has this software."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    token = secrets.token_hex(16)
    path = store.root / ".ray" / token
    with disk_errors(store.root):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(token)
    try:
        task = ray.remote(num_cpus=0, max_retries=0)(inspect_node)
        inspections = [
            task.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False)
            ).remote(str(path))
            for node in nodes
        ]
        for node, reference in zip(nodes, inspections, strict=True):
            _check(node, _software(node, reference), token, store)
    finally:
        path.unlink()


def _software(node: RayNode, reference: Any) -> NodeSoftware:
    import ray

    try:
        found: NodeSoftware = ray.get(reference, timeout=INSPECT_SECONDS)
    except (ray.exceptions.RayError, ImportError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"node {node.host} cannot run tunebench: {lines[-1]} (install it there as it is here)"
        ) from error
    return found


def _check(node: RayNode, found: NodeSoftware, token: str, store: Store) -> None:
    if found.token != token:
        raise UserError(
            f"node {node.host} does not see the results directory {store.root}: name one that all "
            "nodes share with --results"
        )
    here = provenance.stack()
    names = provenance.MEASURED_PACKAGES
    other = [name for name in names if found.packages.get(name) != here.packages.get(name)]
    if found.python.split(".")[:2] != here.python.split(".")[:2]:
        raise UserError(f"node {node.host} runs python {found.python}, and this is {here.python}")
    if other:
        name = other[0]
        raise UserError(
            f"node {node.host} has {name} {found.packages.get(name, 'not installed')} and this "
            f"machine {here.packages.get(name, 'not installed')}: install the same versions"
        )
