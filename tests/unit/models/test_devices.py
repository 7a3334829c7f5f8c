from __future__ import annotations

import pytest

from tutelage.models.devices import DEVICES, recognise_device


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4080", None),
        ("Tesla T4", None),
    ],
)
def test_a_device_is_recognised_by_the_name_its_driver_gives_it(name, key):
    assert recognise_device(name) is (None if key is None else DEVICES[key])
