"""The chunked objective never holds [tokens, vocabulary]: measured by the process's own high-water mark."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import re, torch
from tutelage.objective import Objective, chunked_objective, reference_objective
from tutelage.types import DenseTargets
torch.set_num_threads(1)
def high(): return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
def case(n, d, v):
    h = torch.randn(n, d, requires_grad=True); w = torch.randn(v, d, requires_grad=True)
    return h, w, torch.randint(0, v, (n,)), DenseTargets(torch.randn(n, 2 * d), torch.randn(v, 2 * d))
{function}(*case(8, 8, 16), 0.5, Objective()).loss.backward()  # load every library first
arguments = case(2048, 64, 50304)
open("/proc/self/clear_refs", "w").write("5")
before = high()
{function}(*arguments, 0.5, Objective()).loss.backward()
print(high() - before)
"""


def peak_mib(function: str) -> float:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(function=function)], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_a_few_chunks():
    one_logit_buffer = 2048 * 50304 * 4 / 2**20  # 393 MiB
    assert peak_mib("chunked_objective") < 150
    assert peak_mib("reference_objective") > 2 * one_logit_buffer  # so the measurement sees such buffers
