"""Cores that a container's or a job's control groups leave; their memory is tested where it is used."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from tutelage import processes
from tutelage.models.hub import pick_device

GROUPS = {1: "9:cpu,cpuacct:/{}\n0::/other\n", 2: "0::/{}\n"}


@pytest.fixture(params=GROUPS)
def limited(request, tmp_path, monkeypatch):
    """A function that puts this process into a group and gives groups a quota of cores, None for no limit."""
    monkeypatch.setattr(processes, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(processes, "_MOUNT", tmp_path / "mount")

    def limit(path, quotas):
        (tmp_path / "groups").write_text(GROUPS[request.param].format(path))
        for name, cores in quotas.items():
            folder = tmp_path / "mount" / ("cpu" if request.param == 1 else "") / name
            folder.mkdir(parents=True, exist_ok=True)
            if request.param == 1:
                (folder / "cpu.cfs_quota_us").write_text(f"{-1 if cores is None else int(cores * 50_000)}\n")
                (folder / "cpu.cfs_period_us").write_text("50000\n")
            else:
                quota = "max" if cores is None else int(cores * 100_000)
                (folder / "cpu.max").write_text(f"{quota} 100000\n")

    return limit


def test_the_smallest_quota_of_a_group_and_those_above_it_counts(limited):
    limited("job_7/step_0", {})
    assert processes._quota() == float("inf")  # no group says anything
    limited("job_7/step_0", {"job_7/step_0": None, "job_7": 6, "": None})
    assert processes._quota() == 6
    limited("job_7/step_0", {"job_7/step_0": 2.5, "job_8": 1})
    assert processes._quota() == 2.5


def test_a_container_has_its_quota_at_the_root_that_it_sees(limited):
    limited("docker/0123abcd", {"": 1.5})
    assert processes._quota() == 1.5


def test_a_group_of_a_pod_may_have_colons_in_its_name(limited):
    limited("kubepods.slice:cri:0123abcd", {"": 3, "kubepods.slice:cri:0123abcd": 2})
    assert processes._quota() == 2


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
@pytest.mark.parametrize(("quota", "cores"), [(0.2, 1), (1, 1), (1.5, 2), (1000, None)])
def test_a_process_has_no_more_threads_than_its_quota_of_cores(limited, quota, cores):
    """Torch counts the cores of the machine, and its threads would wait for each other's turn."""
    limited("", {"": quota})
    here = len(os.sched_getaffinity(0))
    assert processes.cores() == min(here, cores or here)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(here)
        pick_device("cpu")
        assert torch.get_num_threads() == processes.cores()
    finally:
        torch.set_num_threads(before)
