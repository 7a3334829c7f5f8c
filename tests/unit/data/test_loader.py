"""The order of the windows and the batches made of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.data.hashing import permuted
from tutelage.data.loader import Loader
from tutelage.data.store import SplitView, open_store
from tutelage.errors import UserError

T = 5


def split_of(tokens: int) -> SplitView:
    """A split whose tokens are their own positions."""
    return SplitView(np.arange(tokens, dtype="<u2"), np.array([[0, 0], [tokens, tokens]], np.uint64))


def starts(*loaders: Loader, steps: int) -> list[int]:
    """First tokens of every sequence, in order."""
    return [
        int(row[0]) for step in range(steps) for loader in loaders for row in loader.batch(step).tokens_BT
    ]


# -------------------------------------------------------------------------------------- permutation


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**70), st.integers(0, 2**40))
def test_permutation_is_a_bijection(n, seed, epoch):
    found = permuted(np.arange(n), n, seed, epoch)
    assert np.array_equal(np.sort(found), np.arange(n))


def test_permutation_of_a_huge_range_needs_no_memory():
    n = 10**12 + 39
    places = np.array([0, 1, 2, n - 1])
    found = permuted(places, n, seed=1, epoch=0)
    assert len(set(found.tolist())) == 4
    assert found.min() >= 0
    assert found.max() < n


def test_permutation_never_changes_between_versions():
    assert permuted(np.arange(10), 10, seed=42, epoch=0).tolist() == [3, 2, 1, 7, 5, 4, 0, 6, 9, 8]
    assert permuted(np.arange(3), 10**9, seed=42, epoch=7).tolist() == [196192239, 21940376, 861953698]


def test_permutation_looks_random():
    n = 10_007
    a, b = permuted(np.arange(n), n, 42, 0), permuted(np.arange(n), n, 42, 1)
    for order in (a, b, np.argsort(a)[b]):
        assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.05
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
        assert (np.abs(np.diff(order)) == 1).mean() < 0.002
        assert (order == np.arange(n)).sum() < 10


# ------------------------------------------------------------------------------------------ batches


def test_labels_are_the_next_tokens():
    batch = Loader(split_of(101), T, 4, seed=1).batch(0)
    assert batch.tokens_BT.shape == batch.labels_BT.shape == (4, T)
    assert batch.tokens_BT.dtype == batch.labels_BT.dtype == torch.int64
    assert torch.equal(batch.tokens_BT + 1, batch.labels_BT)
    assert torch.equal(batch.tokens_BT[:, 0] % T, torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("per_step", [1, 3, 4, 7, 64])
def test_every_window_once_per_epoch(per_step):
    loader = Loader(split_of(20 * T + 1), T, per_step, seed=3)
    assert loader.n_windows == 20
    assert loader.steps_per_epoch == 20 / per_step
    seen = starts(loader, steps=-(-60 // per_step))
    epochs = [sorted(seen[first : first + 20]) for first in (0, 20, 40)]
    assert epochs == [[window * T for window in range(20)]] * 3
    assert seen[:20] != seen[20:40]


@pytest.mark.parametrize(("tokens", "windows"), [(T + 1, 1), (2 * T, 1), (2 * T + 1, 2)])
def test_a_window_needs_the_token_after_it(tokens, windows):
    assert Loader(split_of(tokens), T, 1, seed=1).n_windows == windows


def test_a_batch_does_not_depend_on_history():
    fresh, used = (Loader(split_of(501), T, 6, seed=1) for _ in range(2))
    for step in (3, 0, 17, 3):
        used.batch(step)
    assert torch.equal(fresh.batch(9).tokens_BT, used.batch(9).tokens_BT)


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ranks_together_are_one_rank(world_size):
    split = split_of(16 * T + 1)  # epochs of 16 end in the middle of steps of 6
    alone = Loader(split, T, 6, seed=1)
    ranks = [Loader(split, T, 6, seed=1, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in range(8):
        whole = alone.batch(step)
        parts = [loader.batch(step) for loader in ranks]
        assert torch.equal(torch.cat([part.tokens_BT for part in parts]), whole.tokens_BT)
        assert torch.equal(torch.cat([part.labels_BT for part in parts]), whole.labels_BT)


def test_seeds_differ():
    orders = {tuple(starts(Loader(split_of(501), T, 10, seed=seed), steps=10)) for seed in range(20)}
    assert len(orders) == 20


def test_a_real_store(store):
    split = open_store(store).split("train")
    loader = Loader(split, 64, 8, seed=42)
    batch = loader.batch(5)
    for row, label, window in zip(batch.tokens_BT, batch.labels_BT, loader.windows(5), strict=True):
        assert row.tolist() == split.tokens[window * 64 : window * 64 + 64].tolist()
        assert label.tolist() == split.tokens[window * 64 + 1 : window * 64 + 65].tolist()


def test_refusals():
    with pytest.raises(UserError, match=r"has 5 tokens, one sequence needs 6"):
        Loader(split_of(T), T, 1, seed=1)
    with pytest.raises(UserError, match=r"has 0 tokens"):
        Loader(split_of(0), T, 1, seed=1)
    with pytest.raises(UserError, match="6 sequences per step do not divide by 4 ranks"):
        Loader(split_of(500), T, 6, seed=1, world_size=4)


def test_a_batch_of_one_sequence_is_the_row_of_a_larger_one(store):
    """Labels are left out in memory of their own, not in what the model reads."""
    view = open_store(store).split("train")
    length = (len(view.tokens) - 1) // 2  # all of it, so that a document ends in each
    masked = SplitView(view.tokens, view.offsets, np.arange(len(view.tokens), dtype=np.uint8) % 2)
    for split, documents in ((view, True), (masked, False)):
        whole = Loader(split, length, 2, seed=1, documents=documents).batch(0)
        for rank in range(2):
            one = Loader(split, length, 2, seed=1, rank=rank, world_size=2, documents=documents).batch(0)
            assert torch.equal(one.tokens_BT[0], whole.tokens_BT[rank])
            assert torch.equal(one.labels_BT[0], whole.labels_BT[rank])
            assert one.tokens_BT.min() >= 0 > one.labels_BT.min()
