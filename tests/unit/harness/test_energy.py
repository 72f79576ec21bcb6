"""Energy from a fake powercap tree, as the Linux kernel lays it out."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness import device
from harness.meters.energy import Energy, EnergyMeter

NO_COUNTER = Energy(None, "no NVML energy counter and no readable RAPL counter")


@pytest.fixture(autouse=True)
def _no_gpu_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "energy_joules", lambda: None)


def domain(root: Path, name: str, microjoules: int, most: int = 262143328850) -> Path:
    place = root / name
    place.mkdir(parents=True, exist_ok=True)
    (place / "energy_uj").write_text(f"{microjoules}\n")
    (place / "max_energy_range_uj").write_text(f"{most}\n")
    return place / "energy_uj"


def test_difference_in_joules(tmp_path: Path) -> None:
    counter = domain(tmp_path, "intel-rapl:0", 5_000_000)
    meter = EnergyMeter(tmp_path)
    meter.start()
    counter.write_text("47500000\n")
    assert meter.stop() == Energy(42.5, None)


def test_several_packages_are_summed_and_their_parts_ignored(tmp_path: Path) -> None:
    """Core and memory domains (intel-rapl:0:0) are within their package; intel-rapl itself is the
    control type and has no counter."""
    (tmp_path / "intel-rapl").mkdir()
    counters = [domain(tmp_path, f"intel-rapl:{n}", 1_000_000) for n in (0, 1)]
    part = domain(tmp_path, "intel-rapl:0:0", 0)
    meter = EnergyMeter(tmp_path)
    meter.start()
    for counter in counters:
        counter.write_text("3000000")
    part.write_text("2000000")
    assert meter.stop() == Energy(4.0, None)


def test_a_counter_that_wrapped_around(tmp_path: Path) -> None:
    counter = domain(tmp_path, "intel-rapl:0", 9_000_000, most=10_000_000)
    meter = EnergyMeter(tmp_path)
    meter.start()
    counter.write_text("2000000")
    assert meter.stop() == Energy(3.0, None)


def test_backwards_without_a_range_is_a_reason(tmp_path: Path) -> None:
    counter = domain(tmp_path, "intel-rapl:0", 9_000_000)
    (tmp_path / "intel-rapl:0" / "max_energy_range_uj").unlink()
    meter = EnergyMeter(tmp_path)
    meter.start()
    counter.write_text("2000000")
    assert meter.stop() == Energy(None, "the counter intel-rapl:0 went backwards")


def test_no_tree_no_permission_no_start(tmp_path: Path) -> None:
    meter = EnergyMeter(tmp_path / "none")
    meter.start()
    assert meter.stop() == NO_COUNTER
    # Since 2020 the counter is readable by root only; a directory in its place cannot be read by
    # root either.
    counter = domain(tmp_path, "intel-rapl:0", 1)
    counter.unlink()
    counter.mkdir()
    meter = EnergyMeter(tmp_path)
    meter.start()
    assert meter.stop() == NO_COUNTER


def test_a_counter_that_vanished_gives_no_number(tmp_path: Path) -> None:
    domain(tmp_path, "intel-rapl:0", 1)
    second = domain(tmp_path, "intel-rapl:1", 1)
    meter = EnergyMeter(tmp_path)
    meter.start()
    second.unlink()
    assert meter.stop().joules is None


def test_starting_again_measures_from_there(tmp_path: Path) -> None:
    counter = domain(tmp_path, "intel-rapl:0", 0)
    meter = EnergyMeter(tmp_path)
    meter.start()
    counter.write_text("5000000")
    meter.start()
    counter.write_text("6000000")
    assert meter.stop() == Energy(1.0, None)


def test_a_gpus_own_counter_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    domain(tmp_path, "intel-rapl:0", 0)
    readings = iter([100.0, 103.5])
    monkeypatch.setattr(device, "energy_joules", lambda: next(readings))
    meter = EnergyMeter(tmp_path)
    meter.start()
    assert meter.stop() == Energy(3.5, None)
