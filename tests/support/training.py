"""What tests of training share: rows of a log, weights of a run, a stop after some step."""

from __future__ import annotations

import json
import signal

import torch
from safetensors.torch import load_file

from tutelage.progress import NullProgress
from tutelage.run_directory import RunDirectory
from tutelage.train import distributed
from tutelage.train.metrics import MEASURED
from tutelage.train.setup import open_student, open_teacher


def rows(directory):
    return [json.loads(line) for line in (directory.path / "metrics.jsonl").read_text().splitlines()]


def losses(directory):
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in rows(directory)]


def weights(directory):
    return load_file(directory.model / "model.safetensors")


def assert_same_weights(a, b, **tolerance):
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], **(tolerance or {"rtol": 0, "atol": 0}))


def opened(config):
    """The student of a run, opened with its teacher, before its first step."""
    world = distributed.start(config.runtime, config.parallel)
    student = open_student(config, RunDirectory(config.output / config.name), world)
    if config.teacher is not None:
        student.learn_from(open_teacher(config, world))
    return student


class StopAt(NullProgress):
    """Sends the signal of a Ctrl-C after some step."""

    def __init__(self, step):
        self.step = step

    def advance(self, stage, step):
        if step == self.step:
            signal.raise_signal(signal.SIGINT)


class Notes(NullProgress):
    """Remembers what the user is told."""

    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)

    @property
    def warnings(self):
        return [text for text in self.notes if text.startswith("warning: ")]
