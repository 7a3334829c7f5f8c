"""Break one training step on purpose, and recompute what must come of a run by plain torch."""

from __future__ import annotations

import contextlib

import torch
from torch.nn import functional
from torch.nn.modules.module import register_module_forward_hook

from tutelage.train.optim import adamw, learning_rate


@contextlib.contextmanager
def poisoned(*steps, what="loss"):
    """Make the student's embeddings of some steps (from 1, one forward pass each) useless.

    Args:
        steps: which; those of all students are counted together.
        what: "loss": they are no numbers; "gradient": only what comes back to them is infinite.
    """
    taken = 0

    def hook(module, _, output):
        nonlocal taken
        if not isinstance(module, torch.nn.Embedding) or not module.training:
            return None
        taken += 1
        if taken not in steps:
            return None
        if what == "loss":
            return output * float("nan")
        output.register_hook(lambda gradient: gradient * float("inf"))
        return None

    handle = register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def trained_plainly(student, skipped=()):
    """Train an opened student by torch alone, without a teacher and without the updates of some steps."""
    config, model = student.config, student.model
    optimizer = adamw(model, config.optim, student.lr)
    for step in range(student.steps):
        batch = student.loader.batch(step)
        logits = model(input_ids=batch.tokens_BT, use_cache=False).logits
        functional.cross_entropy(logits.flatten(0, 1), batch.labels_BT.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        lr = learning_rate(
            config.optim, student.lr, step, student.steps, batch_tokens=config.global_batch_tokens
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        if step + 1 not in skipped:
            optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}
