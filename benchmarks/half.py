"""bfloat16 inputs: how far each loss is from float64 of the same inputs, and what float32 products cost.

The student nearly agrees with its teacher: their most probable tokens are the same on the given share of
tokens. Methods are those of `benchmarks/objective.py` for KL alone; peers that are not installed are left out
(benchmarks/peers.txt says how to install them).

    python benchmarks/half.py [--tokens 256] [--vocab 32000] [--common 0] [--rounds 3]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import torch

from losses.methods import GROUP_KL, METHODS, Method
from losses.problem import STUDENT, Problem

OVERLAPS = (0.88, 0.95, 0.98)


def near_teacher(tokens: int, vocab: int, overlap: float, common: float) -> Problem:
    """A teacher whose hidden states are the student's with noise, and the student's head, in bfloat16."""
    random = torch.Generator().manual_seed(20)
    head = torch.randn(vocab, STUDENT, generator=random) + common * torch.randn(1, STUDENT, generator=random)
    head = (head / STUDENT**0.5).bfloat16()
    hidden = (4 * torch.randn(tokens, STUDENT, generator=random)).bfloat16()
    noise = 4 * torch.randn(tokens, STUDENT, generator=random)
    labels = torch.randint(vocab, (tokens,), generator=random)
    top, low, high = (hidden.float() @ head.float().T).argmax(1), 0.0, 1.0
    for _ in range(8):
        middle = (low + high) / 2
        taught = (hidden.float() + middle * noise).bfloat16()
        agree = ((taught.float() @ head.float().T).argmax(1) == top).float().mean()
        low, high = (middle, high) if agree > overlap else (low, middle)
    return Problem(hidden.requires_grad_(), head.requires_grad_(), taught, head.detach().clone(), labels, {})


def truth(problem: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The mean KL and its two gradients, in float64."""
    h, w = (x.detach().double().requires_grad_() for x in (problem.hs, problem.Ws))
    q = (h @ w.T).log_softmax(-1)
    p = (problem.ht.double() @ problem.Wt.double().T).log_softmax(-1)
    value = (p.exp() * (p - q)).sum(-1).mean()
    value.backward()  # type: ignore[no-untyped-call]
    assert h.grad is not None  # noqa: S101 - leaves
    assert w.grad is not None  # noqa: S101 - leaves
    return value.detach(), h.grad, w.grad


def errors(method: Method, problem: Problem, expected: tuple[torch.Tensor, ...]) -> tuple[float, float]:
    """Relative errors of the value and, in norm, of the worse gradient."""
    problem.hs.grad = problem.Ws.grad = None
    value = method.make(problem)()
    pairs = zip((value, problem.hs.grad, problem.Ws.grad), expected, strict=True)
    found = [float((mine.double() - true).norm() / true.norm()) for mine, true in pairs]  # type: ignore[union-attr]
    return found[0], max(found[1:])


def seconds(method: Method, problem: Problem) -> float:
    """CPU time of one step."""
    problem.hs.grad = problem.Ws.grad = None
    step, start = method.make(problem), time.process_time()
    step()
    return time.process_time() - start


def is_there(method: Method) -> bool:
    """Whether its package is installed."""
    try:
        return not method.package or bool(version(method.package))
    except PackageNotFoundError:
        return False


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument(
        "--common",
        type=float,
        default=0.0,
        help="size of what all rows of the head share, beside 1 that differs",
    )
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each method")
    arguments = parser.parse_args()
    methods = [method for method in METHODS if method.group == GROUP_KL and is_there(method)]
    problems = [
        near_teacher(arguments.tokens, arguments.vocab, overlap, arguments.common) for overlap in OVERLAPS
    ]
    expected = [truth(problem) for problem in problems]
    wide = Problem(
        *(x.detach().float() for x in (problems[0].hs, problems[0].Ws)),
        *(x.float() for x in (problems[0].ht, problems[0].Wt)),
        problems[0].labels,
        {},
    )
    for leaf in (wide.hs, wide.Ws):
        leaf.requires_grad_()
    ours = methods[-1]
    base = statistics.median(seconds(ours, wide) for _ in range(arguments.rounds + 1))
    when, load = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), os.getloadavg()[0]
    print(
        f"{when}, torch {torch.__version__}, load {load:.1f}, {arguments.tokens} x {arguments.vocab}, "
        f"common part {arguments.common:g}"
    )
    print(
        f"\n| method | {' | '.join(f'{x}: value, gradient' for x in OVERLAPS)} | CPU time, of our float32 |"
    )
    print("|---|---|---|---|---|")
    for method in methods:
        cells = []
        for problem, true in zip(problems, expected, strict=True):
            value, gradient = errors(method, problem, true)
            cells.append(f"{value:.2%}, {gradient:.2%}")
        cost = statistics.median(seconds(method, problems[0]) for _ in range(arguments.rounds)) / base
        print(f"| {method.name} | {' | '.join(cells)} | {cost:.2f} |", flush=True)


if __name__ == "__main__":
    main()
