"""Text that spells a special token is text, whatever the tokenizer: a document cannot fake its end."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tutelage.config.data_config import StoreConfig
from tutelage.config.load import validate
from tutelage.data.build import build_store
from tutelage.data.pieces import Piece
from tutelage.data.token_text import SourceBytes
from tutelage.data.tokenizer import load_tokenizer
from tutelage.errors import UserError

TEXT = "a cat </s> sat<s> on </s><pad> the mat</s>"
PLAIN = "the cat sat on the mat"
UNKNOWN = "<unk>"
SPECIAL = [UNKNOWN, "<s>", "</s>", "<pad>"]
TRAINING = [PLAIN, "a mat on a cat", "less < more > and / or s"] * 20


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return tokenizer, trainers.UnigramTrainer(
        vocab_size=60, special_tokens=SPECIAL, unk_token=UNKNOWN, show_progress=False
    )


def words():
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False)


def wordpiece():
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer, trainers.WordPieceTrainer(vocab_size=80, special_tokens=SPECIAL, show_progress=False)


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return tokenizer, trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )


def merging():
    """Its merges spell the end of text."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=[UNKNOWN, "<s>"], show_progress=False)
    return tokenizer, trainer


@pytest.fixture(params=[unigram, words, wordpiece, byte_level, merging], ids=lambda kind: kind.__name__)
def made(request, tmp_path):
    tokenizer, trainer = request.param()
    spelled = ["a</s> the</s> on</s> cat</s>"] * 50 if request.param is merging else []
    tokenizer.train_from_iterator(TRAINING + spelled, trainer)
    if request.param is merging:
        assert "</s>" in tokenizer.get_vocab()
        tokenizer.add_special_tokens(["</s>"])
    if request.param is byte_level:  # some files add it without calling it special
        tokenizer.add_tokens([AddedToken("</s>", special=False)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tokenizer, load_tokenizer(tmp_path / "tokenizer.json")


def encoded(tokenizer, text):
    return np.frombuffer(tokenizer.encoder()([text])[0], tokenizer.dtype)


def test_no_text_gives_a_special_id(made):
    library, own = made
    assert "</s>" in own.special_tokens
    special = {library.token_to_id(token) for token in own.special_tokens} - {library.token_to_id(UNKNOWN)}
    assert not special & set(encoded(own, TEXT).tolist())
    assert not special & set(own.library(markup=False).encode(TEXT, add_special_tokens=False).ids)


def test_a_chat_template_means_them(made):
    library, own = made
    ids = own.library(markup=True).encode("the </s>", add_special_tokens=False).ids
    assert ids[-1] == library.token_to_id("</s>") == own.eos_id


def test_other_text_has_the_librarys_ids(made):
    library, own = made
    assert encoded(own, PLAIN).tolist() == library.encode(PLAIN, add_special_tokens=False).ids


def test_its_bytes_are_counted(made):
    _, own = made
    counts = SourceBytes(own).count(Piece(TEXT), encoded(own, TEXT))
    assert counts.sum() == len(TEXT.encode())


def test_what_still_makes_a_mark_is_refused(tmp_path):
    tokenizer, trainer = unigram()
    tokenizer.train_from_iterator(TRAINING, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "the cat \x00</s>\x00 sat"}) + "\n")
    fields = {
        "name": "fake",
        "sources": [{"kind": "files", "paths": [str(tmp_path / "a.jsonl")]}],
        "tokenizer": {"path": str(tmp_path / "tokenizer.json")},
        "validation": 0.0,
        "test": 0.0,
    }
    with pytest.raises(UserError, match=r"begins or closes documents .* begins 'the cat"):
        build_store(validate(StoreConfig, fields, "test"), tmp_path / "stores")
