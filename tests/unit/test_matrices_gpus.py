"""The GPU catalogue: its figures against published ones, names, and a user's own file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from matrices.catalogue.gpus import Gpu, by_device_name, gpu, gpus
from matrices.errors import UserError

GIB = 2**30


def write(directory: Path, text: str) -> Path:
    path = directory / "gpus.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("name", "total_gib"),
    [
        # "GPU 0 has a total capacity of ..." in people's reports.
        ("t4", 14.57),
        ("a100-40gb", 39.39),
        ("a100-80gb", 79.15),
        ("h100-80gb", 79.18),
        ("rtx-3090", 23.67),
        ("rtx-4090", 23.52),
        ("h200", 139.80),
    ],
)
def test_memory_is_what_out_of_memory_messages_say(name: str, total_gib: float) -> None:
    assert round(gpu(name).memory_bytes / GIB, 2) == total_gib


@pytest.mark.parametrize(
    ("name", "bits", "gbps"),
    [
        # Bus width times data rate per pin, as in the datasheets.
        ("rtx-3060-12gb", 192, 15.0),
        ("rtx-3090", 384, 19.5),
        ("rtx-4060-ti-16gb", 128, 18.0),
        ("rtx-4090", 384, 21.0),
        ("rtx-5090", 512, 28.0),
        ("t4", 256, 10.0),
        ("l4", 192, 12.5),
        ("l40s", 384, 18.0),
        ("a10", 384, 12.5),
        ("a40", 384, 14.5),
        ("a6000", 384, 16.0),
        ("rtx-6000-ada", 384, 20.0),
        ("a100-40gb", 5120, 2.43),
        ("a100-80gb", 5120, 3.186),
        ("h100-80gb", 5120, 5.234),
        ("h200", 6144, 6.25),
        ("b200", 8192, 7.8125),
    ],
)
def test_bandwidth_follows_from_the_bus(name: str, bits: int, gbps: float) -> None:
    expected = bits / 8 * gbps * 1e9
    assert gpu(name).bandwidth_bytes_per_second == pytest.approx(expected, rel=0.005)


def test_every_gpu_has_its_source_and_every_price_its_date() -> None:
    for name, found in gpus().items():
        assert found.name == name
        assert found.source, name
        assert (found.price_usd_per_hour is None) == (found.price_date is None), name
        if found.price_date is not None:
            assert re.fullmatch(r"20\d\d-\d\d-\d\d", found.price_date), name
            assert "price:" in found.source, name
        assert 0 < found.context_bytes < GIB < found.memory_bytes, name
        assert found.capacity_bytes == found.memory_bytes - found.context_bytes


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("rtx-4090", "rtx-4090"),
        ("RTX 4090", "rtx-4090"),
        ("4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("A100", "a100-80gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("Tesla V100-SXM2-32GB", "v100-32gb"),
        ("Tesla_T4", "t4"),
    ],
)
def test_names_people_and_drivers_use(asked: str, name: str) -> None:
    assert gpu(asked).name == name
    found = by_device_name(asked)
    assert found is not None
    assert found.name == name


def test_an_unknown_gpu_names_the_nearest() -> None:
    with pytest.raises(UserError, match="no GPU is called 'rtx-4080'; did you mean 'rtx-4090'"):
        gpu("rtx-4080")
    assert by_device_name("NVIDIA Something New") is None


def test_no_alias_hides_another_gpu() -> None:
    for name in gpus():
        assert gpu(name).name == name


def test_a_users_file_changes_single_values(tmp_path: Path) -> None:
    extra = write(tmp_path, "rtx-4090: {price_usd_per_hour: 0.5, price_date: 2026-11-01}\n")
    changed = gpu("rtx-4090", extra)
    assert (changed.price_usd_per_hour, changed.price_date) == (0.5, "2026-11-01")
    assert changed.memory_bytes == gpu("rtx-4090").memory_bytes
    assert gpu("a100-80gb", extra) == gpu("a100-80gb")
    # The catalogue itself is as before.
    assert gpu("rtx-4090").price_usd_per_hour != 0.5


def test_a_users_file_adds_a_gpu(tmp_path: Path) -> None:
    extra = write(
        tmp_path,
        "My-Card:\n  aliases: [mine]\n  memory_bytes: 1000\n  context_bytes: 1\n"
        "  bandwidth_bytes_per_second: 9e11\n  bf16_flops_per_second: 9.0e13\n"
        "  compute_capability: [8, 9]\n  multiprocessors: 80\n",
    )
    expected = Gpu(
        name="My-Card",
        memory_bytes=1000,
        context_bytes=1,
        bandwidth_bytes_per_second=9e11,
        bf16_flops_per_second=9e13,
        compute_capability=(8, 9),
        multiprocessors=80,
    )
    assert gpu("my card", extra) == gpu("mine", extra) == gpus(extra)["My-Card"] == expected
    assert expected.capacity_bytes == 999


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n", "1: GPUs are a mapping of names"),
        ("\nrtx-4090: 3\n", "2: rtx-4090: is a mapping of figures"),
        ("rtx-4090:\n  memry_bytes: 5\n", "2: rtx-4090.memry_bytes: unknown figure; did you mean"),
        ("rtx-4090: {zzz: 5}\n", "1: rtx-4090.zzz: unknown figure; known are aliases, bandwidth"),
        ("rtx-4090:\n  memory_bytes: 24 GB\n", "2: rtx-4090.memory_bytes: '24 GB' is not a whole"),
        ("rtx-4090:\n  memory_bytes: 5\n", "rtx-4090.memory_bytes: 5 is not a whole number above"),
        ("rtx-4090: {multiprocessors: 0}\n", "multiprocessors: 0 is not a whole number above 0"),
        ("rtx-4090: {compute_capability: 8.9}\n", "8.9 is not a pair of whole numbers"),
        ("rtx-4090: {price_usd_per_hour: free}\n", "'free' is not a number"),
        ("rtx-4090: {price_date: 2026}\n", "2026 is not text"),
        ("rtx-4090: {aliases: x}\n", "rtx-4090.aliases: is a list of names"),
        ("\nmine: {}\n", "2: mine.memory_bytes: is missing"),
        ("mine: {memory_bytes: 5}\n", "mine.context_bytes: is missing"),
    ],
)
def test_mistakes_name_file_line_and_key(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        gpu("a100-80gb", path)
    assert str(caught.value).startswith(str(path))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        gpus(tmp_path / "nowhere.yaml")
