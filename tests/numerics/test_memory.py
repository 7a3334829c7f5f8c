"""The chunked objective never holds [tokens, vocabulary]: measured by the process's own high-water mark."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import re, torch
from tutelage.objective import Objective, chunked_objective, reference_objective
from tutelage.types import DenseTargets, SparseTargets
torch.set_num_threads(1)
def high(): return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
def case(n, d, v, k):
    h = torch.randn(n, d, requires_grad=True); w = torch.randn(v, d, requires_grad=True)
    dense = DenseTargets(torch.randn(n, 2 * d), torch.randn(v, 2 * d))
    ids = torch.randint(0, v // k, (n, k)) + torch.arange(k) * (v // k)
    sparse = SparseTargets(ids, torch.full((n, k), 0.9 / k), torch.full((n,), 0.1), torch.zeros(n))
    return h, w, torch.randint(0, v, (n,)), {targets}
objective = Objective("{divergence}")
{function}(*case(8, 8, 16, 2), 0.5, objective).loss.backward()  # load every library first
arguments = case(2048, 64, 50304, 64)
open("/proc/self/clear_refs", "w").write("5")
before = high()
{function}(*arguments, 0.5, objective).loss.backward()
print(high() - before)
"""


def peak_mib(function: str, targets: str, divergence: str = "forward_kl") -> float:
    script = SCRIPT.format(function=function, targets=targets, divergence=divergence)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("targets", "divergence"), [("dense", "forward_kl"), ("sparse", "forward_kl"), ("dense", "jsd")]
)
def test_peak_memory_is_a_few_chunks(targets, divergence):
    assert peak_mib("chunked_objective", targets, divergence) < 150


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_measurement_sees_whole_logits():
    one_logit_buffer = 2048 * 50304 * 4 / 2**20  # 393 MiB
    assert peak_mib("reference_objective", "dense") > 2 * one_logit_buffer
