"""What tests of training share: rows of a log, weights of a run, a stop after some step."""

from __future__ import annotations

import json
import signal

import torch
from safetensors.torch import load_file

from tutelage.train.loop import Nobody


def rows(directory):
    return [json.loads(line) for line in (directory.path / "metrics.jsonl").read_text().splitlines()]


def losses(directory):
    timing = {"seconds", "tokens_per_second"}
    return [{key: value for key, value in row.items() if key not in timing} for row in rows(directory)]


def weights(directory):
    return load_file(directory.model / "model.safetensors")


def assert_same_weights(a, b, **tolerance):
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], **(tolerance or {"rtol": 0, "atol": 0}))


class StopAt(Nobody):
    """Sends the signal of a Ctrl-C after some step."""

    def __init__(self, step):
        self.step = step

    def advance(self, step):
        if step == self.step:
            signal.raise_signal(signal.SIGINT)
