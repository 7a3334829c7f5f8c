"""Pieces of a document whose tokenizer joins the end of one and the beginning of the next."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from tutelage.data.pieces import Piece, PieceEncoder, in_order, puts_space_in_front
from tutelage.data.tokenizer import load_tokenizer


@pytest.fixture
def joining(tmp_path):
    """`a` and `b` are one token where they stand together; a space is put in front of every text."""
    entries = ["</s>", "▁", "a", "b", "c", "▁a", "▁ab", "▁b"]
    vocabulary = {entry: number for number, entry in enumerate(entries)}
    merges = [("▁", "a"), ("▁a", "b"), ("▁", "b")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return load_tokenizer(tmp_path)


def entries(tokenizer, texts):
    document = in_order([Piece(text) for text in texts])
    (found,) = PieceEncoder(tokenizer).encode([document])
    name = Tokenizer.from_str(tokenizer.json).id_to_token
    return [[name(int(number)) for number in np.frombuffer(ids, tokenizer.dtype)] for ids in found]


def test_a_piece_is_encoded_alone_only_where_it_shares_a_token_with_what_stands_before(joining):
    assert puts_space_in_front(joining)
    assert entries(joining, ["a", "cb"]) == [["▁a"], ["c", "b"]]
    assert entries(joining, ["a", "b"]) == [["▁a"], ["▁b"]]  # `▁ab` reaches over the border
    assert entries(joining, ["a", "b", "c"]) == [["▁a"], ["▁b"], ["c"]]
