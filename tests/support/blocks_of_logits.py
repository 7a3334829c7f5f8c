"""Print how many blocks as large as the logits of its tokens each objective holds at its peak.

python blocks_of_logits.py, with MALLOC_MMAP_THRESHOLD_ set to 65536. Each is measured in a process
of its own, forked when all libraries are loaded. A line per case, as
JSON: its settings, its targets, the blocks.
"""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import torch
from peak_memory import high_water_mark

from tutelage.config.objective_config import ObjectiveConfig
from tutelage.objective import chunked_objective, make_gate
from tutelage.objective.divergences import DIVERGENCES
from tutelage.objective.gates import GATES
from tutelage.types import DenseTargets, MeanTargets, SparseTargets

TOKENS, WIDTH, VOCABULARY, KEPT = 256, 8, 32768, 8
DIVERGING = [{"divergence": name} for name in (*DIVERGENCES, "hard_labels")]
GATED = [{"gate": {"kind": name}} for name in GATES]
TRUNCATED = [{"truncation": {"kind": "top_k", "k": 50}} | one for one in ({}, {"divergence": "jsd"})]


def dense(tokens, vocabulary):
    return DenseTargets(torch.randn(tokens, WIDTH), torch.randn(vocabulary, WIDTH))


def targets_of(kind, tokens, vocabulary):
    if kind == "dense":
        return dense(tokens, vocabulary)
    if kind == "mean":
        return MeanTargets(tuple(dense(tokens, vocabulary) for _ in range(3)))
    ids = torch.arange(KEPT).repeat(tokens, 1)
    probs = torch.full((tokens, KEPT), 0.9 / KEPT)
    return SparseTargets(ids, probs, torch.full((tokens,), 0.1), torch.zeros(tokens))


def call(settings, kind, tokens, vocabulary):
    config = ObjectiveConfig(alpha=0.5, chunk_tokens=tokens, **settings)
    gate = None if config.gate is None else make_gate(config.gate)
    if gate is not None:
        gate.begin(lambda: torch.rand(tokens))
    hidden = torch.randn(tokens, WIDTH, requires_grad=True)
    head = torch.randn(vocabulary, WIDTH, requires_grad=True)
    given = torch.randint(0, vocabulary, (tokens,)), targets_of(kind, tokens, vocabulary)
    chunked_objective(hidden, head, *given, 0.5, config, gate).loss.backward()


def measured(settings, kind):
    call(settings, kind, KEPT, 4 * KEPT)
    Path("/proc/self/clear_refs").write_text("5")  # the mark starts anew
    before = high_water_mark()
    call(settings, kind, TOKENS, VOCABULARY)
    return (high_water_mark() - before) * 2**20 / (4 * TOKENS * VOCABULARY)


def main():
    torch.set_num_threads(1)
    cases = itertools.product([*DIVERGING, *GATED], ("dense", "sparse"))
    means = itertools.product([{}, {"divergence": "jsd"}], ("mean",))
    for settings, kind in itertools.chain(cases, means, itertools.product(TRUNCATED, ("dense",))):
        if (process := os.fork()) == 0:
            print(json.dumps([settings, kind, measured(settings, kind)]), flush=True)
            os._exit(0)
        os.waitpid(process, 0)


if __name__ == "__main__":
    main()
