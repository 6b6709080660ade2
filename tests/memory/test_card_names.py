"""Names of cards as people, shops and drivers write them."""

from __future__ import annotations

import pytest

from qlora.errors import HardwareError
from qlora.memory import card_names
from qlora.memory.card_names import GPUS
from qlora.units import GIB

MEANT = {
    # as people write them
    "4060ti 16": "RTX 4060 Ti 16GB",
    "a100 80": "A100 80GB",
    "rtx 30 80 12gb": "RTX 3080 12GB",
    "4070 ti super": "RTX 4070 Ti SUPER",
    "4070TiSuper": "RTX 4070 Ti SUPER",
    "4070 tis": "RTX 4070 Ti SUPER",
    "rtx4070ti": "RTX 4070 Ti",
    "5090": "RTX 5090",
    "RTX-5090 32GB": "RTX 5090",
    "RTX 3060 12GB": "RTX 3060 12GB",
    "3060 (12 GiB)": "RTX 3060 12GB",
    "rtx306012gb": "RTX 3060 12GB",
    "3060ti": "RTX 3060 Ti",
    "nvidia geforce rtx 3080 10 gb": "RTX 3080 10GB",
    "4060 ti/16gb": "RTX 4060 Ti 16GB",
    "RTX_4060_Ti_8G": "RTX 4060 Ti 8GB",
    "Geforce 4090": "RTX 4090",
    "gtx 4090": "RTX 4090",
    "ＲＴＸ\u00a0４０９０": "RTX 4090",
    "GeForce RTX™ 4080 SUPER": "RTX 4080 SUPER",
    "ASUS TUF Gaming RTX 5070 Ti OC Edition 16GB GDDR7": "RTX 5070 Ti",
    "4090 d": "RTX 4090 D",
    "desktop 3070": "RTX 3070",
    # laptops
    "laptop 4060": "RTX 4060 Laptop",
    "4060 mobile": "RTX 4060 Laptop",
    "RTX 4090 notebook": "RTX 4090 Laptop",
    "4090 16gb": "RTX 4090 Laptop",
    "rtx 4050": "RTX 4050 Laptop",
    "3070 max-q": "RTX 3070 Laptop",
    "3070m": "RTX 3070 Laptop",
    "rtx 3080 mobile 16gb": "RTX 3080 Laptop 16GB",
    "RX 6800M": "RX 6800M Laptop",
    # workstations
    "rtx a2000 12gb": "RTX A2000 12GB",
    "quadro rtx 5000": "Quadro RTX 5000",
    "RTX 6000 Ada": "RTX 6000 Ada",
    "A6000 Ada": "RTX 6000 Ada",
    "a6000": "RTX A6000",
    "6000 pro": "RTX PRO 6000 Blackwell",
    "RTX PRO 6000 Blackwell": "RTX PRO 6000 Blackwell",
    "rtx 4000 sff ada": "RTX 4000 SFF Ada",
    "titan rtx": "TITAN RTX",
    # data centres
    "T4": "Tesla T4",
    "a100 80gb": "A100 80GB",
    "A100-40G": "A100 40GB",
    "H100": "H100",
    "H100 PCI-e": "H100 PCIe",
    "h100nvl": "H100 NVL",
    "L4": "L4",
    "l40 s": "L40S",
    "mi300x": "MI300X",
    "v100 32gb": "Tesla V100 32GB",
    "b200 192gb": "B200",
    "dgx spark": "GB10",
    "orin nano 8gb": "Jetson Orin Nano 8GB",
    # AMD's
    "rx 7900 xtx": "RX 7900 XTX",
    "7900xt": "RX 7900 XT",
    "radeon 9070": "RX 9070",
    "W7900": "Radeon PRO W7900",
    "GTX 1080Ti": "GTX 1080 Ti",
    "1660s": "GTX 1660 SUPER",
    # drivers' own strings
    "NVIDIA GeForce RTX 4090 Laptop GPU": "RTX 4090 Laptop",
    "NVIDIA GeForce RTX 3060, 12288 MiB": "RTX 3060 12GB",
    "GeForce RTX 2080 Super with Max-Q Design": "RTX 2080 SUPER Laptop",
    "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition": "RTX PRO 6000 Blackwell",
    "NVIDIA RTX 2000 Ada Generation Laptop GPU": "RTX 2000 Ada Laptop",
    "Quadro RTX 4000 with Max-Q Design": "Quadro RTX 4000 Laptop",
    "Tesla V100-SXM2-16GB": "Tesla V100 16GB",
    "NVIDIA A100-SXM4-80GB": "A100 80GB",
    "NVIDIA A100-PCIE-40GB": "A100 PCIe 40GB",
    "NVIDIA A10G": "A10G",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA GH200 480GB": "GH200 96GB",
    "AMD Instinct MI250X 128GB": "MI250X",
    "AMD Radeon RX 7600 XT": "RX 7600 XT",
}


@pytest.mark.parametrize(("name", "meant"), MEANT.items())
def test_a_name_as_people_write_it_means_one_card(name: str, meant: str) -> None:
    first, *others = card_names.named(name)
    assert first.name == meant
    assert all((other.usable_bytes, other.capability) == (first.usable_bytes, first.capability) for other in others)


def test_every_card_is_found_by_its_own_name() -> None:
    for gpu in GPUS:
        for name in (gpu.name, gpu.name.lower().replace(" ", ""), gpu.name.replace(" ", "-").upper(), gpu.label):
            assert gpu in card_names.named(name), name
        assert card_names.named(gpu.name)[0].usable_bytes == gpu.usable_bytes, gpu.name


@pytest.mark.parametrize(
    ("name", "variants"),
    [
        ("RTX 4060 Ti", ("RTX 4060 Ti 8GB", "RTX 4060 Ti 16GB")),
        ("3060", ("RTX 3060 12GB", "RTX 3060 8GB")),
        ("A100", ("A100 40GB", "A100 80GB")),
        ("rtx 6000", ("RTX 6000 Ada (48 GB)", "RTX PRO 6000 Blackwell (96 GB)", "Quadro RTX 6000 (24 GB)")),
        ("laptop 3080", ("RTX 3080 Laptop 8GB", "RTX 3080 Laptop 16GB")),
        ("jetson orin", ("Jetson AGX Orin 64GB", "Jetson Orin Nano 8GB")),
    ],
)
def test_an_ambiguous_name_lists_what_it_may_mean(name: str, variants: tuple[str, ...]) -> None:
    with pytest.raises(HardwareError, match="the name of several cards") as caught:
        card_names.find(name)
    for variant in variants:
        assert variant in caught.value.what
        assert card_names.named(variant.partition(" (")[0])


@pytest.mark.parametrize("name", ["K80", "M60", "Jetson Nano"])
def test_a_card_that_is_too_old_says_so(name: str) -> None:
    with pytest.raises(HardwareError, match="older than what bitsandbytes computes 4 bit on"):
        card_names.find(name)


@pytest.mark.parametrize(("name", "capability"), [("T4", 75), ("2080 Ti", 75), ("V100 16GB", 70), ("GTX 1070", 61)])
def test_a_card_without_bf16_trains(name: str, capability: int) -> None:
    found = card_names.find(name)
    assert found.trains and not found.computes_bf16 and found.capability == capability
    assert found.teraflops > 0 and found.gigabytes_per_second > 0


@pytest.mark.parametrize(
    "name", ["Arc A770", "intel arc b580", "B580", "RX 5700 XT", "Radeon RX 580", "M3 Max", "vega 64"]
)
def test_what_no_build_trains_on_is_refused_by_name(name: str) -> None:
    with pytest.raises(HardwareError, match="is not supported"):
        card_names.find(name)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("RTX 4065", "RTX 4060"),
        ("RTX 3080 Super", "RTX 3080 Ti"),
        ("rtx 40", "RTX 4060"),
        ("4090 48gb", "RTX 4090 (24 GB)"),
        ("rtx 3090 laptop", "RTX 3090 (24 GB)"),
        ("banana", "RTX 4060 Ti 16GB"),
        ("", "vram='12GiB'"),
        ("9" * 5000 + "GB", "vram='12GiB'"),
    ],
)
def test_an_unknown_name_is_told_the_nearest(name: str, near: str) -> None:
    with pytest.raises(HardwareError, match="not in the table") as caught:
        card_names.find(name)
    assert near in f"{caught.value.what} {caught.value.hint}" and len(caught.value.what) < 500


def test_the_table_is_plausible() -> None:
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)
    for gpu in GPUS:
        assert 0.89 * gpu.gigabytes * GIB < gpu.usable_bytes < gpu.gigabytes * GIB, gpu.name
        if gpu.computes_bf16:  # a desktop card of today and a small laptop's are 30 times apart
            assert 30 < gpu.gigabytes_per_second < 9000 and 2 < gpu.teraflops < 2600, gpu.name


@pytest.mark.parametrize(
    ("name", "total", "capability", "like"),
    [
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.6, 89, "RTX 4090 Laptop"),
        ("NVIDIA GeForce RTX 4090", 23.5, 89, "RTX 4090"),
        ("NVIDIA GeForce RTX 3060", 7.7, 86, "RTX 3060 8GB"),
        ("NVIDIA GeForce RTX 3060", 12.0, 86, "RTX 3060 12GB"),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", 39.2, 80, "A100 40GB"),
        ("AMD Radeon RX 7900 XTX", 23.98, 110, "RX 7900 XTX"),
        ("NVIDIA Something 9000", 31.4, 120, "RTX 5090"),
        ("AMD Something", 191.0, 94, "MI300X"),
    ],
)
def test_this_machines_card_keeps_its_name_and_size(name: str, total: float, capability: int, like: str) -> None:
    found = card_names.of_this_machine(name, int(total * GIB), capability)
    row = next(gpu for gpu in GPUS if gpu.name == like)
    assert (found.name, found.usable_bytes, found.capability) == (name, int(total * GIB), capability)
    assert (found.teraflops, found.gigabytes_per_second) == (row.teraflops, row.gigabytes_per_second)
