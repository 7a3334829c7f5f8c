"""Where documents begin, against a walk over every document of a store, and labels at their borders."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from tutelage.config.load import validate
from tutelage.config.run_config import RunConfig
from tutelage.config.teacher_config import TeachConfig
from tutelage.data.loader import Documents, Loader, positions_of
from tutelage.data.store import SplitView
from tutelage.types import IGNORE_INDEX

LENGTHS = [2, 2, 5, 3, 40, 2, 7, 19, 4, 2, 2, 33]


def split(mask=None):
    bounds = np.cumsum([0, *LENGTHS])
    index = np.stack([bounds, bounds * 3], axis=1).astype(np.uint64)
    return SplitView(np.arange(bounds[-1], dtype=np.uint16), index, mask)


def places():
    """The place of every token in its document, counted one by one."""
    return np.array(list(itertools.chain(*(range(length) for length in LENGTHS))))


@pytest.mark.parametrize("length", [1, 2, 3, 8, 16, 60])
def test_positions_restart_with_every_document_and_every_window(length):
    documents, whole = Documents(split()), places()
    starts = range(len(whole) - length + 1)
    begins = documents.begins(starts, length)
    found = positions_of(begins)
    assert found.dtype == np.int64
    for start in starts:
        window = whole[start : start + length]
        assert begins[start].tolist() == (window == 0).tolist()
        behind = np.maximum.accumulate(np.where(window == 0, np.arange(length), -1))
        expected = np.where(behind >= 0, window, window - whole[start])
        assert found[start].tolist() == expected.tolist()


def test_windows_may_reach_beyond_the_end():
    total = sum(LENGTHS)
    begins = Documents(split()).begins([total - 2, total, total + 5], 4)
    assert not begins.any()
    assert positions_of(begins).tolist() == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize("masked", [False, True])
def test_batches_have_positions_and_no_label_across_a_border(masked):
    mask = (np.arange(sum(LENGTHS)) % 5 > 0).astype(np.uint8) if masked else None
    view, whole = split(mask), places()
    plain = Loader(view, 16, 3, seed=1)
    apart = Loader(view, 16, 3, seed=1, documents=True)
    seen = 0
    for step in range(4):
        ours, theirs = apart.batch(step), plain.batch(step)
        assert theirs.positions_BT is None
        assert ours.starts == theirs.starts
        assert torch.equal(ours.tokens_BT, theirs.tokens_BT)
        for row, start in enumerate(ours.starts):
            crossing = torch.from_numpy(whole[start + 1 : start + 17] == 0)
            expected = theirs.labels_BT[row].masked_fill(crossing, IGNORE_INDEX)
            assert torch.equal(ours.labels_BT[row], expected)
            seen += int(crossing.sum())
            window = whole[start : start + 16]
            first = int(np.argmax(window == 0)) if (window == 0).any() else 16
            wanted = [*range(first), *window[first:].tolist()]
            assert ours.positions_BT[row].tolist() == wanted
    assert seen > 10


def test_ranks_and_rows_share_the_positions_of_one_process():
    alone = Loader(split(), 8, 4, seed=3, documents=True).batch(2)
    parts = [Loader(split(), 8, 4, 3, rank, 2, documents=True).batch(2) for rank in range(2)]
    assert torch.equal(torch.cat([part.positions_BT for part in parts]), alone.positions_BT)
    rows = alone.rows(slice(1, 3))
    assert torch.equal(rows.positions_BT, alone.positions_BT[1:3])
    assert rows.starts == alone.starts[1:3]
    assert torch.equal(alone.to("cpu").positions_BT, alone.positions_BT)


@pytest.mark.parametrize(("length", "expected"), [(128, False), (1023, False), (1024, True), (8192, True)])
def test_long_sequences_are_masked_unless_something_else_is_said(length, expected):
    def asked(**more):
        fields = {
            "model": {"shape": "nano-20k"},
            "data": {"store": "s", "sequence_length": length, **more},
            "tokens": 10**6,
            "global_batch_tokens": 4 * length,
        }
        return validate(RunConfig, fields, "test").data.document_mask

    def taught(**more):
        fields = {"store": "s", "teacher": {"kind": "unigram"}, "context_length": length, **more}
        return validate(TeachConfig, fields, "test").document_mask

    for setting in (asked, taught):
        assert setting() is expected
        assert setting(document_mask=not expected) is not expected
