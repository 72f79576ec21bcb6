"""Who gets which device of this machine, and what else uses it."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.meters import gpu_processes
from harness.meters.gpu_processes import Occupant
from harness.records import provenance
from harness.records.provenance import Nvml, NvmlGpu
from launch.cells import devices
from launch.cells.devices import DevicePool, ForeignProcesses, Grant, granted_devices, local_devices
from matrices.errors import UserError

GPUS = ("GPU-aaaa", "GPU-bbbb", "GPU-cccc")
CPUS = ("cpu:0", "cpu:1")


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> list[Occupant]:
    """What NVML would tell, to be filled by a test."""
    found: list[Occupant] = []
    monkeypatch.setattr(devices, "RELEASE_SECONDS", 0.0)
    monkeypatch.setattr(devices, "process_name", lambda pid: "" if pid > 10**9 else "python")
    monkeypatch.setattr(devices, "occupants", lambda gpus: [o for o in found if o.uuid in gpus])
    return found


def user(uuid: str, pid: int = 77) -> Occupant:
    return Occupant(uuid, "NVIDIA A100", pid, "python", 3 * 2**30)


def side_by_side(directory: Path, **options: bool) -> DevicePool:
    return DevicePool(exclusive=False, devices=GPUS, directory=directory, **options)


def test_one_cell_on_a_machine_of_several_gpus_sees_one(
    tmp_path: Path, busy: list[Occupant]
) -> None:
    machine = DevicePool(devices=GPUS, directory=tmp_path)
    lease = machine.acquire(1)
    assert lease is not None
    assert lease.grant == Grant(("GPU-aaaa",), {"CUDA_VISIBLE_DEVICES": "GPU-aaaa"}, True, None)
    # And has the machine to itself.
    assert DevicePool(devices=GPUS, directory=tmp_path).acquire(1) is None
    assert side_by_side(tmp_path).acquire(1) is None
    lease.release()
    both = DevicePool(devices=GPUS, directory=tmp_path).acquire(3)
    assert both is not None
    assert both.grant.environment == {}, "nothing is hidden, so nothing is set"


def test_side_by_side_cells_have_disjoint_devices_and_share_out_the_cores(
    tmp_path: Path, busy: list[Occupant], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "12")
    first, second = side_by_side(tmp_path).acquire(2), side_by_side(tmp_path).acquire(1)
    assert first is not None
    assert second is not None
    assert set(first.grant.devices).isdisjoint(second.grant.devices)
    assert first.grant.environment == {"CUDA_VISIBLE_DEVICES": "GPU-aaaa,GPU-bbbb"}
    assert (first.grant.cores, second.grant.cores) == (8, 4)
    assert side_by_side(tmp_path).acquire(1) is None
    second.release()
    assert side_by_side(tmp_path).acquire(1) is not None


def test_processors_are_devices_where_there_is_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    lease = DevicePool(exclusive=False, devices=CPUS, directory=tmp_path).acquire(1)
    assert lease is not None
    assert lease.grant == Grant(("cpu:0",), {}, False, 1)
    monkeypatch.setattr(provenance, "uses_gpu", lambda stack, hardware: False)
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda pid: {6, 2}, raising=False)
    assert local_devices() == ("cpu:2", "cpu:6")


def test_who_waits_for_many_devices_is_not_overtaken_for_ever(
    tmp_path: Path, busy: list[Occupant]
) -> None:
    small, large = side_by_side(tmp_path), side_by_side(tmp_path)
    running = small.acquire(1)
    assert running is not None
    assert large.acquire(3) is None
    assert small.acquire(1) is None, "two are free, but somebody was waiting first"
    running.release()
    assert large.acquire(3) is not None
    large.close()


def test_more_devices_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs 3 devices and this machine has 2"):
        DevicePool(devices=CPUS, directory=tmp_path).acquire(3)


def test_a_gpu_in_use_is_passed_over_or_refused_in_one_line(
    tmp_path: Path, busy: list[Occupant]
) -> None:
    busy.append(user("GPU-aaaa"))
    lease = side_by_side(tmp_path).acquire(2)
    assert lease is not None
    assert lease.grant.devices == ("GPU-bbbb", "GPU-cccc")
    lease.release()
    with pytest.raises(UserError) as refused:
        side_by_side(tmp_path).acquire(3)
    assert str(refused.value) == (
        "GPU-aaaa (NVIDIA A100) is in use: pid 77 (python) holds 3.00 GiB; wait for it, or run "
        "with --allow-busy"
    )
    # Nothing is held after a refusal.
    allowed = side_by_side(tmp_path, allow_busy=True).acquire(3)
    assert allowed is not None
    assert len(allowed.grant.devices) == 3


def test_an_intruder_is_noted_and_the_cells_own_processes_are_not(
    busy: list[Occupant],
) -> None:
    guard = ForeignProcesses(["GPU-aaaa"])
    busy += [user("GPU-aaaa", 5), user("GPU-bbbb", 6), user("GPU-aaaa", 10**9 + 1)]
    guard.look(lambda: {5})
    assert guard.found == {}, "its own, another GPU's, and one of another pid namespace"
    busy.append(user("GPU-aaaa", 8))
    guard.look(lambda: {5})
    assert guard.found == {}, "looked a moment ago"
    guard._looked = float("-inf")
    guard.look(lambda: {5})
    assert guard.found == {
        8: "GPU-aaaa (NVIDIA A100) is in use: pid 8 (python) holds 3.00 GiB",
    }


def test_what_an_engine_gave_is_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "uses_gpu", lambda stack, hardware: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert granted_devices(cores=3).environment == {"CUDA_VISIBLE_DEVICES": "1"}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert granted_devices(cores=3).environment == {}
    assert granted_devices(cores=3).cores == 3


class FakeNvml:
    """nvidia-ml-py with two processes on one GPU, one of which it may not measure."""

    NVMLError = OSError

    class Running:
        def __init__(self, pid: int, used: int | None) -> None:
            self.pid, self.usedGpuMemory = pid, used

    def nvmlInit(self) -> None: ...
    def nvmlShutdown(self) -> None: ...

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != "GPU-aaaa":
            raise OSError("not found")
        return uuid

    def nvmlDeviceGetName(self, handle: str) -> str:
        return "NVIDIA A100"

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Running]:
        return [self.Running(1, 2**30), self.Running(2**31 - 1, None)]


def test_occupants_as_nvml_tells_them(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = NvmlGpu("NVIDIA A100", "GPU-aaaa", 2**36, (8, 0), "550")
    monkeypatch.setattr(provenance, "nvml", lambda: Nvml((gpu,), None))
    monkeypatch.setitem(__import__("sys").modules, "pynvml", FakeNvml())
    found = gpu_processes.occupants(["GPU-aaaa", "GPU-gone"])
    assert [(each.pid, each.bytes, bool(each.name)) for each in found] == [
        (1, 2**30, True),
        (2**31 - 1, None, False),
    ]
    monkeypatch.setattr(provenance, "nvml", lambda: Nvml((), "no driver"))
    assert gpu_processes.occupants(["GPU-aaaa"]) == []
