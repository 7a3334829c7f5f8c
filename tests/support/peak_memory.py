"""Print how many MiB an objective needs at its peak, by the process's own high-water mark.

python peak_memory.py chunked_objective|reference_objective dense|sparse DIVERGENCE [smooth]
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

from tutelage.objective import Objective, chunked_objective, reference_objective
from tutelage.types import DenseTargets, SparseTargets

FUNCTIONS = {function.__name__: function for function in (chunked_objective, reference_objective)}


def high_water_mark() -> float:
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def arguments(kind, n, d, v, k):
    hidden, head = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
    targets = DenseTargets(torch.randn(n, 2 * d), torch.randn(v, 2 * d))
    if kind == "sparse":
        ids = torch.randint(0, v // k, (n, k)) + torch.arange(k) * (v // k)
        targets = SparseTargets(ids, torch.full((n, k), 0.9 / k), torch.full((n,), 0.1), torch.zeros(n))
    return hidden, head, torch.randint(0, v, (n,)), targets


def main(function, kind, divergence, smooth=""):
    torch.set_num_threads(1)
    loss, objective, more = FUNCTIONS[function], Objective(divergence=divergence), {}
    if smooth:
        objective = Objective(divergence=divergence, label_smoothing=0.1, z_loss=1e-4)
        more = {"per_token": True}
    loss(*arguments(kind, 8, 8, 16, 2), 0.5, objective, **more).loss.backward()  # load every library first
    large = arguments(kind, 2048, 64, 50304, 64)
    Path("/proc/self/clear_refs").write_text("5")  # the mark starts anew
    before = high_water_mark()
    if smooth:
        more["token_weights_N"] = torch.ones(len(large[0]))
    loss(*large, 0.5, objective, **more).loss.backward()
    print(high_water_mark() - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
