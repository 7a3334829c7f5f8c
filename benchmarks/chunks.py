"""The trade between memory and time of the dense objective: CE + KL at several chunk sizes.

Each head is read from memory once per chunk and product, so small chunks save memory and cost time. Per size:
CPU time over that of the bare matrix products, taken whole and measured in turn with it.

    python benchmarks/chunks.py [--shape 2048x50304] [--tokens 96 128 192 256 384] [--repeats 2]
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import TYPE_CHECKING

from losses.methods import GROUP_BOTH, products
from losses.problem import ALPHA, make_problem
from tutelage.objective import Objective, chunked_objective
from tutelage.types import DenseTargets

if TYPE_CHECKING:
    from collections.abc import Callable


def cpu_seconds(step: Callable[[], None]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    step()
    return time.process_time() - start


def main() -> None:
    """Measure and print a markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="2048x50304", help="TOKENSxVOCABULARY")
    parser.add_argument("--tokens", type=int, nargs="+", default=[96, 128, 192, 256, 384])
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    tokens, vocab = map(int, arguments.shape.split("x"))
    problem = make_problem(tokens, vocab, {})
    targets = DenseTargets(problem.ht, problem.Wt)
    floor = products(problem, GROUP_BOTH)
    floor()
    print("| tokens per chunk | student + teacher logits, MiB | CE + KL, x products |\n|---|---|---|")
    for size in arguments.tokens:
        objective = Objective(chunk_tokens=size)

        def step(objective: Objective = objective) -> None:
            problem.hs.grad = problem.Ws.grad = None
            sums = chunked_objective(problem.hs, problem.Ws, problem.labels, targets, ALPHA, objective)
            (sums.loss / tokens).backward()

        ratios = [cpu_seconds(step) / cpu_seconds(floor) for _ in range(arguments.repeats)]
        shown = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {size} | {2 * 4 * size * vocab / 2**20:.0f} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
