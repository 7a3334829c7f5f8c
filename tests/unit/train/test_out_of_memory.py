"""A device that is too small is one line, with the plan's table and what to turn."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import pytest
import torch

from tutelage.errors import UserError
from tutelage.run import run, run_cohort
from tutelage.run_directory import RunDirectory, run_id

CPU = (
    "[enforce fail at alloc_cpu.cpp:126] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 123 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), MemoryError(), RuntimeError(CPU)],
)
def test_every_kind_is_one_line_with_the_plans_table_and_what_to_turn(make_config, monkeypatch, error):
    def fails(*_):
        raise error

    monkeypatch.setattr("tutelage.train.loop.train_step", fails)
    config = make_config(teacher={"kind": "unigram"}, objective={"alpha": 0.5})
    with pytest.raises(UserError) as caught:
        run(config)
    first, *table = str(caught.value).splitlines()
    assert ": step 1: out of memory on cpu: " in first
    assert re.search(r"[\d.]+ GB at most, of which weights 0\.00 GB; the rest is activations", first)
    assert "students" not in first
    parts = [line for line in table if not line.startswith("turn: ")]
    assert {line.split()[0] for line in parts} >= {"weights", "moments", "activations", "each"}
    assert any("micro_batch_tokens" in line for line in table if line.startswith("turn: "))
    assert RunDirectory(config.output / run_id(config)).state()["status"] == "failed"


def test_another_error_is_not_taken_for_one(make_config, monkeypatch):
    def fails(*_):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr("tutelage.train.loop.train_step", fails)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        run(make_config())


def test_a_cohort_is_told_that_it_is_large(make_config, monkeypatch):
    def fails(*_):
        raise MemoryError

    monkeypatch.setattr("tutelage.train.loop.train_step", fails)
    with pytest.raises(UserError, match="2 students train together, fewer take less"):
        run_cohort([make_config(name="a", seed=1), make_config(name="b", seed=2)])


def test_a_batch_that_does_not_fit_the_machine(make_config):
    """A real refusal of the system: this process may take 300 MB more, and the batch asks for more."""
    config = make_config(tokens=2**21, global_batch_tokens=2**20)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 300 * 2**20, limits[1]))
    try:
        with pytest.raises(UserError, match=r"step 1: out of memory on cpu: (.|\n)*turn: micro_batch_tokens"):
            run(config)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
