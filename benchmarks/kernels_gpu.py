"""The objective on a CUDA device: forward and backward with each row kernel, and what others offer.

Cross-entropy and KL at alpha 0.5, T = 1, in bfloat16, from hidden states to the gradients of the student's
hidden states and head. Each method runs in a process of its own, so that its peak memory (above the
inputs and gradients it must hold) is its own. Liger is measured if `liger-kernel` is installed: its chunked
loss computes the same sum; its fused JSD kernel has no cross-entropy, so it does less.

    python benchmarks/kernels_gpu.py [--tokens 8192] [--vocab 128256] [--width 2048] [--teacher-width 4096]
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional as F

from tutelage.objective import Objective, chunked_objective
from tutelage.types import DenseTargets, SparseTargets

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

ALPHA = 0.5
SLOTS = 64
ROUNDS = 10


class Problem(NamedTuple):
    """The inputs of one call, on the device."""

    hidden_ND: Tensor
    weight_VD: Tensor
    labels_N: Tensor
    teacher_hidden_NE: Tensor
    teacher_head_VE: Tensor


def make_problem(sizes: argparse.Namespace) -> Problem:
    """Random inputs whose logits have a standard deviation of 2."""
    torch.manual_seed(0)
    n, v, d, e = sizes.tokens, sizes.vocab, sizes.width, sizes.teacher_width

    def normal(rows: int, columns: int, scale: float) -> Tensor:
        return (scale * torch.randn(rows, columns, device="cuda")).bfloat16()

    return Problem(
        normal(n, d, 1.0).requires_grad_(),
        normal(v, d, 2.0 * d**-0.5).requires_grad_(),
        torch.randint(0, v, (n,), device="cuda"),
        normal(n, e, 1.0),
        normal(v, e, 2.0 * e**-0.5),
    )


def dense(problem: Problem) -> Callable[[], Tensor]:
    """Ours with the teacher's hidden states."""
    targets = DenseTargets(problem.teacher_hidden_NE, problem.teacher_head_VE)
    return lambda: chunked_objective(*problem[:3], targets, ALPHA, Objective()).loss


def sparse(problem: Problem) -> Callable[[], Tensor]:
    """Ours with top-64 targets and the other bucket."""
    n, v = problem.hidden_ND.shape[0], problem.weight_VD.shape[0]
    ids_NK = torch.rand(n, v // SLOTS, device="cuda").topk(SLOTS).indices * SLOTS
    probs_NK = 0.9 * torch.rand(n, SLOTS, device="cuda").softmax(-1)
    gold_logp_N = torch.zeros(n, device="cuda")
    targets = SparseTargets(ids_NK, probs_NK, torch.full((n,), 0.1, device="cuda"), gold_logp_N)
    return lambda: chunked_objective(*problem[:3], targets, ALPHA, Objective()).loss


def ce_only(problem: Problem) -> Callable[[], Tensor]:
    """Ours without a teacher."""
    return lambda: chunked_objective(*problem[:3], None, 0.0, Objective()).loss


def compiled(problem: Problem) -> Callable[[], Tensor]:
    """The formula over whole logits, given to torch.compile."""

    @torch.compile
    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
        student_NV, teacher_NV = (hidden @ weight.T).float(), (teacher @ head.T).float()
        logq_NV, logp_NV = student_NV.log_softmax(-1), teacher_NV.log_softmax(-1)
        ce = F.nll_loss(logq_NV, labels, reduction="sum")
        return (1 - ALPHA) * ce + ALPHA * F.kl_div(logq_NV, logp_NV, log_target=True, reduction="sum")

    return lambda: loss(*problem)


def liger_chunked(problem: Problem) -> Callable[[], Tensor]:
    """Liger's chunked loss, CE + KL (beta 0)."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # noqa: PLC0415 - measured if installed

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=1 - ALPHA, weight_soft_loss=ALPHA, beta=0.0)
    hidden, weight, labels, teacher, head = problem
    return lambda: loss(hidden, weight, teacher, head, labels)


def liger_fused(problem: Problem) -> Callable[[], Tensor]:
    """Liger's fused JSD kernel, KL only (beta 0)."""
    from liger_kernel.transformers import LigerFusedLinearJSD  # noqa: PLC0415 - measured if installed

    loss = LigerFusedLinearJSD(jsd_beta=0.0)
    hidden, weight, labels, teacher, head = problem
    return lambda: loss(hidden, weight, teacher, head, labels)


METHODS = {
    "CE only, torch rows": (ce_only, "torch"),
    "CE only, triton rows": (ce_only, "triton"),
    "CE + KL, torch rows": (dense, "torch"),
    "CE + KL, triton rows": (dense, "triton"),
    "CE + top-64, torch rows": (sparse, "torch"),
    "CE + top-64, triton rows": (sparse, "triton"),
    "CE + KL, torch.compile": (compiled, "torch"),
    "CE + KL, Liger chunked": (liger_chunked, "torch"),
    "KL only, Liger fused": (liger_fused, "torch"),
}
"""Name -> (what makes the loss function, which row kernels its process uses)."""


def measure(problem: Problem, loss: Callable[[], Tensor]) -> tuple[float, float]:
    """Median milliseconds of forward and backward, and peak MiB above the inputs and their gradients."""
    times = []
    for round_ in range(ROUNDS + 3):  # the first three compile, tune and warm up
        problem.hidden_ND.grad = problem.weight_VD.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        loss().backward()
        end.record()
        torch.cuda.synchronize()
        if round_ >= 3:
            times.append(start.elapsed_time(end))
    gradients = sum(x.numel() * x.element_size() for x in (problem.hidden_ND, problem.weight_VD))
    peak = torch.cuda.max_memory_allocated() - held - gradients
    return statistics.median(times), peak / 2**20


def run_alone(name: str, arguments: list[str]) -> str:
    """One table row, measured in a process of its own."""
    environment = os.environ | {"TUTELAGE_KERNELS": METHODS[name][1]}
    command = [sys.executable, __file__, "--method", name, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return done.stdout.strip()
    return f"{name:<26}  failed: {(done.stderr.strip() or 'no message').splitlines()[-1][:120]}"


def main() -> None:
    """Measure and print a table, or one row of it with --method."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=128256, help="at least 4096, for 64 ids a token")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--teacher-width", type=int, default=4096)
    parser.add_argument("--method", choices=METHODS, help="measure only this, in this process")
    sizes = parser.parse_args()
    if not torch.cuda.is_available():
        print("kernels_gpu: this machine has no CUDA device, so there is nothing to measure")
        return
    if sizes.method:
        problem = make_problem(sizes)
        milliseconds, mebibytes = measure(problem, METHODS[sizes.method][0](problem))
        print(f"{sizes.method:<26}{milliseconds:10.1f} ms {mebibytes:12,.0f} MiB")
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16, {sizes.tokens} tokens,")
    print(f"vocabulary {sizes.vocab}, student width {sizes.width}, teacher width {sizes.teacher_width}")
    for name in METHODS:
        if "Liger" in name and importlib.util.find_spec("liger_kernel") is None:
            print(f"{name:<26}  not measured: liger-kernel is not installed")
        else:
            print(run_alone(name, sys.argv[1:]), flush=True)


if __name__ == "__main__":
    main()
