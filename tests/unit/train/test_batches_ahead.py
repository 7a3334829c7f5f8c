"""Batches that a thread makes ahead: the ones of the loader, errors that surface, a clean end."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from tutelage.data.loader import Loader
from tutelage.data.store import open_store
from tutelage.errors import UserError
from tutelage.train.loop import BatchesAhead
from tutelage.types import Batch

CPU = torch.device("cpu")


class Slow:
    """A loader that takes its time, or fails at a step."""

    def __init__(self, seconds=0.0, fails_at=None):
        self.seconds, self.fails_at = seconds, fails_at
        self.made, self.threads = [], set()

    def batch(self, step):
        time.sleep(self.seconds)
        self.threads.add(threading.current_thread().name)
        if step == self.fails_at:
            raise UserError("the disk is gone")
        self.made.append(step)
        ids = torch.full((2, 3), step)
        return Batch(ids, ids, (0, 3))


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


@pytest.mark.parametrize("documents", [False, True])
def test_they_are_the_loaders_from_any_step_on(store, documents):
    split = open_store(store).split("train")
    loader = Loader(split, 32, 8, seed=5, documents=documents)
    for first in (0, 7):
        with BatchesAhead(loader, first, 3, CPU) as ahead:
            for step in range(first, first + 4):
                pieces, whole = ahead.next_step(), loader.batch(step)
                assert [len(piece.starts) for piece in pieces] == [3, 3, 2]
                assert torch.equal(torch.cat([piece.tokens_BT for piece in pieces]), whole.tokens_BT)
                assert torch.equal(torch.cat([piece.labels_BT for piece in pieces]), whole.labels_BT)
                assert sum((piece.starts for piece in pieces), ()) == whole.starts
                assert (whole.positions_BT is None) is not documents
                if documents:
                    found = torch.cat([piece.positions_BT for piece in pieces])
                    assert torch.equal(found, whole.positions_BT)


def test_the_next_one_is_made_while_the_step_is_computed():
    loader = Slow(seconds=0.2)
    with BatchesAhead(loader, 0, 2, CPU) as ahead:
        ahead.next_step()
        assert ahead.waited > 0.1
        time.sleep(0.4)  # the step
        assert loader.made == [0, 1]
        ahead.next_step()
        assert ahead.waited < 0.1
    assert all(name.startswith("batches") for name in loader.threads)
    assert not threads()


def test_an_error_of_the_thread_is_the_callers():
    with BatchesAhead(Slow(fails_at=1), 0, 2, CPU) as ahead:
        ahead.next_step()
        with pytest.raises(UserError, match="the disk is gone"):
            ahead.next_step()
    assert not threads()


def test_an_error_of_the_caller_ends_the_thread():
    def fail():
        raise RuntimeError("elsewhere")

    with pytest.raises(RuntimeError, match="elsewhere"), BatchesAhead(Slow(seconds=0.05), 0, 2, CPU):
        fail()
    assert not threads()


def test_cuda_gets_pinned_memory_and_does_not_wait(monkeypatch):
    """Stand-ins for what needs a device: a batch is pinned in the thread, then copied without blocking."""
    pinned, copies = [], []
    to = torch.Tensor.to

    def pin(tensor):
        pinned.append(threading.current_thread().name)
        return tensor

    def record(tensor, device, *, non_blocking=False):
        copies.append((str(device), non_blocking))
        return to(tensor, "cpu")

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda _tensor: True)
    monkeypatch.setattr(torch.Tensor, "to", record)
    with BatchesAhead(Slow(), 0, 2, torch.device("cuda", 1)) as ahead:
        ahead.next_step()
    assert copies == [("cuda:1", True)] * 2
    assert len(pinned) >= 2
    assert all(name.startswith("batches") for name in pinned)
