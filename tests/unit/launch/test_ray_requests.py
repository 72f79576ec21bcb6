"""What a cell asks of a Ray cluster, worked out by hand for clusters that need not be there."""

from __future__ import annotations

import pytest

from launch.engines.ray.cluster import RayNode, has_gpus, parse_resources, task_request
from matrices.cell import Cell
from matrices.errors import UserError

SMALL = RayNode("a", "small", {"CPU": 4.0, "memory": 8e9, "node:10.0.0.1": 1.0})
LARGE = RayNode("b", "large", {"CPU": 16.0, "memory": 6e10})
GPUS = RayNode("c", "gpus", {"CPU": 32.0, "GPU": 4.0, "object_store_memory": 1e9})


def spread(devices: int, nodes: int = 1) -> Cell:
    return Cell(parallelism="single" if devices == 1 else "ddp", devices=devices, nodes=nodes)


def test_a_gpu_for_each_device() -> None:
    wanted = task_request(spread(2), [SMALL, GPUS], {})
    assert wanted.options() == {"num_cpus": 1, "num_gpus": 2}
    assert wanted.device == "GPU"
    assert [wanted.fits(node) for node in (SMALL, LARGE, GPUS)] == [False, False, True]


@pytest.mark.parametrize(("devices", "cpus"), [(1, 4), (4, 4), (5, 16)])
def test_without_gpus_all_processors_of_the_smallest_node_that_has_enough(
    devices: int, cpus: int
) -> None:
    assert not has_gpus([SMALL, LARGE])
    wanted = task_request(spread(devices), [SMALL, LARGE], {})
    assert wanted.options() == {"num_cpus": cpus, "num_gpus": 0}


def test_named_resources_take_the_place_of_gpus() -> None:
    node = RayNode("d", "tpus", {"CPU": 8.0, "accelerator": 4.0, "memory": 64e9})
    wanted = task_request(spread(2), [node], {"accelerator": 1, "CPU": 2, "memory": 1e9})
    assert wanted.device == "accelerator"
    assert wanted.options() == {
        "num_cpus": 4,
        "num_gpus": 0,
        "memory": 2e9,
        "resources": {"accelerator": 2},
    }


@pytest.mark.parametrize(
    ("cell", "nodes", "resources", "told"),
    [
        (spread(8), [SMALL, GPUS], {}, "GPU 8, and the largest is gpus with CPU 32, GPU 4"),
        (spread(17), [SMALL, LARGE], {}, "CPU 17, and the largest is large with CPU 16"),
        (spread(1), [LARGE], {"accelerator": 1}, "accelerator 1, and the largest is large"),
        (spread(2, nodes=2), [GPUS], {}, "on 2 machines and a task of Ray's on one"),
        (spread(3), [GPUS], {"GPU": 0.5}, "comes to 1.5 for 3 devices"),
    ],
)
def test_what_can_never_be_granted(
    cell: Cell, nodes: list[RayNode], resources: dict[str, float], told: str
) -> None:
    with pytest.raises(UserError) as refused:
        task_request(cell, nodes, resources)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


def test_resources_as_options() -> None:
    assert parse_resources(["accelerator=1", "CPU=0.5"]) == {"accelerator": 1.0, "CPU": 0.5}
    assert parse_resources([]) == {}


@pytest.mark.parametrize("option", ["accelerator", "=1", "a=", "a=x", "a=0", "a=-1", "a=nan"])
def test_no_resource_without_a_name_and_an_amount(option: str) -> None:
    with pytest.raises(UserError, match="NAME=PER_DEVICE"):
        parse_resources([option])
