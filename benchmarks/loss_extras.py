"""What label smoothing, the z-loss, weights of tokens and losses per token add to cross-entropy and KL.

One process, one thread, float32, T=1, alpha .4, student width 512, teacher width 1024. In every round each
variant takes one forward and backward pass in turn, and its CPU time is divided by that of the plain loss in
the same round, so that the machine's other load falls on all. The median of the rounds is printed.

    python benchmarks/loss_extras.py [TOKENSxVOCABULARY] [ROUNDS]
"""

from __future__ import annotations

import statistics
import sys
import time
from functools import partial
from typing import TYPE_CHECKING

import torch

from tutelage.config.objective_config import Objective
from tutelage.objective.chunked import chunked_objective
from tutelage.types import DenseTargets

if TYPE_CHECKING:
    from collections.abc import Callable

WIDTH, TEACHER_WIDTH, ALPHA = 512, 1024, 0.4


def variants(tokens: int, vocabulary: int) -> dict[str, Callable[[], None]]:
    """A forward and backward pass with each extra, by its name."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, WIDTH, requires_grad=True)
    head = (torch.randn(vocabulary, WIDTH) * WIDTH**-0.5).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,))
    targets = DenseTargets(
        torch.randn(tokens, TEACHER_WIDTH), torch.randn(vocabulary, TEACHER_WIDTH) * TEACHER_WIDTH**-0.5
    )
    weights = torch.rand(tokens)

    def step(
        objective: Objective, token_weights: torch.Tensor | None = None, *, per_token: bool = False
    ) -> None:
        hidden.grad = head.grad = None
        more = {"token_weights_N": token_weights, "per_token": per_token}
        chunked_objective(hidden, head, labels, targets, ALPHA, objective, **more).loss.backward()

    return {
        "plain": partial(step, Objective()),
        "label smoothing .1": partial(step, Objective(label_smoothing=0.1)),
        "z-loss 1e-4": partial(step, Objective(z_loss=1e-4)),
        "weights of tokens": partial(step, Objective(), weights),
        "losses per token": partial(step, Objective(), per_token=True),
        "all four": partial(step, Objective(label_smoothing=0.1, z_loss=1e-4), weights, per_token=True),
    }


def main() -> None:
    """Print a table in Markdown."""
    shape = sys.argv[1] if len(sys.argv) > 1 else "1024x50304"
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 7
    torch.set_num_threads(1)
    steps = variants(*map(int, shape.split("x")))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            began = time.process_time()
            step()
            seconds[name].append(time.process_time() - began)
    print(f"| {shape}, {rounds} rounds | CPU s | x plain |\n|---|---|---|")
    for name, spent in seconds.items():
        ratios = [one / plain for one, plain in zip(spent[1:], seconds["plain"][1:], strict=True)]
        print(f"| {name} | {statistics.median(spent[1:]):.3f} | {statistics.median(ratios):.3f} |")


if __name__ == "__main__":
    main()
