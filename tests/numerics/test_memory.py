"""The chunked objective never holds [tokens, vocabulary]: measured by the process's own high-water mark."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "support" / "peak_memory.py"


def peak_mib(function: str, targets: str, divergence: str = "forward_kl", *more: str) -> float:
    command = [sys.executable, str(SCRIPT), function, targets, divergence, *more]
    # Freed memory goes back at once: what the allocator keeps would be in some marks and not in others.
    settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("targets", "divergence"), [("dense", "forward_kl"), ("sparse", "forward_kl"), ("dense", "jsd")]
)
def test_peak_memory_is_a_few_chunks(targets, divergence):
    assert peak_mib("chunked_objective", targets, divergence) < 150


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_smoothing_z_loss_weights_and_losses_per_token_hold_no_logits_either():
    assert peak_mib("chunked_objective", "dense", "forward_kl", "smooth") < 150


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_measurement_sees_whole_logits():
    one_logit_buffer = 2048 * 50304 * 4 / 2**20  # 393 MiB
    assert peak_mib("reference_objective", "dense") > 2 * one_logit_buffer
