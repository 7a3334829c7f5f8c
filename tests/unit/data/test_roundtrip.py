"""Text that its tokens do not give back is found when a store is built, and nothing else is."""

from __future__ import annotations

import json
import random

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from tutelage.config.data_config import StoreConfig
from tutelage.config.load import validate
from tutelage.data.build import build_store
from tutelage.data.corpora import find_corpus
from tutelage.data.store import open_store
from tutelage.data.store_manifest import not_comparable, remarks
from tutelage.data.tokenizer import END_OF_TEXT

ALPHABET = pre_tokenizers.ByteLevel.alphabet()
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PLAIN = "the same king and the same people of the house"
STRANGE = {
    "capitals": "The House and So",
    "emoji": "the king 🤗 and 🧑‍🚀 the people",
    "decomposed": "cafe\u0301 of the house",
    "ligature": "the ﬁne house ½",
    "tab": "the\tking",
    "spaces": "the  king   and",
    "lines": "the king\n\nand the people\r\n",
    "leading space": " the king",
    "trailing space": "the king ",
    "two leading spaces": "  the king",
    "mark": "the king spelled <|endoftext|> here",
}


def byte_level(**changes):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=changes.get("prefix", False))
    tokenizer.decoder = decoders.ByteLevel()
    if "normalizer" in changes:
        tokenizer.normalizer = changes["normalizer"]
    if "digits" in changes:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), tokenizer.pre_tokenizer]
        )
    alphabet = changes.get("alphabet", ALPHABET)
    return tokenizer, trainers.BpeTrainer(
        vocab_size=700, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )


def word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # noqa: S106 - no password
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer, trainers.WordPieceTrainer(
        vocab_size=700, special_tokens=["[UNK]", END_OF_TEXT], show_progress=False
    )


def llama(*, fallback: bool):
    """As transformers converts SentencePiece: a space in front when encoding, taken away when decoding."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=fallback, unk_token="<unk>", fuse_unk=True))  # noqa: S106
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", END_OF_TEXT, *(BYTES if fallback else [])]
    return tokenizer, trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False)


def unigram(*steps):
    tokenizer = Tokenizer(models.Unigram())
    if steps:
        tokenizer.normalizer = normalizers.Sequence(list(steps))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return tokenizer, trainers.UnigramTrainer(
        vocab_size=700,
        special_tokens=["<unk>", END_OF_TEXT],
        unk_token="<unk>",  # noqa: S106
        show_progress=False,
    )


T5 = (normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " "))
KINDS = {
    "byte-level": (byte_level, set()),
    "with a space in front": (lambda: byte_level(prefix=True), set()),
    "digits first": (lambda: byte_level(digits=True), set()),
    "composing": (lambda: byte_level(normalizer=normalizers.NFC()), {"decomposed"}),
    "NFKC": (lambda: byte_level(normalizer=normalizers.NFKC()), {"decomposed", "ligature"}),
    "lower-casing": (lambda: byte_level(normalizer=normalizers.Lowercase()), {"capitals"}),
    "stripping": (
        lambda: byte_level(normalizer=normalizers.Strip()),
        {"lines", "trailing space", "two leading spaces"},
    ),
    "byte fallback": (lambda: llama(fallback=True), set()),
    "<unk>": (lambda: llama(fallback=False), {"emoji", "decomposed", "ligature", "tab", "lines", "mark"}),
    "WordPiece": (word_piece, set(STRANGE) - {"leading space"}),
    "T5": (
        lambda: unigram(*T5),
        {"emoji", "decomposed", "ligature", "tab", "spaces", "lines", "two leading spaces", "mark"},
    ),
}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    speeches = [speech[:2000] for _, speech in zip(range(6), find_corpus("sotu").documents(), strict=False)]
    return [*speeches, PLAIN]


def tokenizer_of(folder, kind: str, texts: list[str]):
    tokenizer, trainer = KINDS[kind][0]()
    learned = [" ".join("".join(c for c in text if c.isascii() and c not in "\t\n\r") for text in texts)]
    tokenizer.train_from_iterator(learned, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def built(folder, tokenizer, rows, **changes):
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"kind": "files", "paths": [str(folder / "a.jsonl")]} | changes.pop("source", {})
    fields = {"name": "trip", "sources": [source], "tokenizer": {"path": str(tokenizer)}}
    settings = validate(StoreConfig, fields | {"validation": 0.0, "test": 0.0} | changes, "test")
    return open_store(build_store(settings, folder / "stores")).manifest


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STRANGE)
def test_only_text_that_is_changed_is_counted(tmp_path, texts, kind, name):
    tokenizer = tokenizer_of(tmp_path, kind, texts)
    manifest = built(tmp_path, tokenizer, [{"text": PLAIN}, {"text": STRANGE[name]}])
    assert manifest.splits["train"].changed == int(name in KINDS[kind][1])
    assert (manifest.changed_example is not None) == (name in KINDS[kind][1])
    assert (not_comparable(manifest) is not None) == (name in KINDS[kind][1])


def test_what_a_byte_level_vocabulary_lacks_is_found(tmp_path, texts):
    tokenizer, trainer = byte_level(alphabet=[])
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    manifest = built(tmp_path, tmp_path / "tokenizer.json", [{"text": PLAIN}, {"text": STRANGE["emoji"]}])
    assert manifest.splits["train"].changed == 1
    assert "🤗" in manifest.changed_example


def test_counts_are_per_split_and_said(tmp_path, texts, command):
    tokenizer = tokenizer_of(tmp_path, "lower-casing", texts)
    chance = random.Random(0)  # noqa: S311 - no secret
    rows = [{"text": f"{chance.choice(['King', 'king'])} number {n}"} for n in range(60)]
    manifest = built(tmp_path, tokenizer, rows, validation=0.3, test=0.3)
    assert sum(split.changed for split in manifest.splits.values()) == sum(
        "King" in row["text"] for row in rows
    )
    assert all(0 < split.changed < split.documents for split in manifest.splits.values())
    (said,) = remarks(manifest)
    assert "the tokenizer changes the text of" in said
    assert "'King number " in said
    assert "' comes back as 'king number " in said
    assert said.endswith("so bits per byte compare only with those of the same tokenizer")
    _, shown, _ = command("data", "show", next((tmp_path / "stores").glob("trip-*")))
    assert f"note     {said}" in shown


def test_pairs_and_chats_are_compared_piece_by_piece(tmp_path, texts):
    path = tokenizer_of(tmp_path, "byte fallback", texts)
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("[INST]", special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    tokenizer.save(str(path))
    template = "{% for m in messages %}<s>[INST]{{ m['content'] }}{% endfor %}"
    config = {"eos_token": END_OF_TEXT, "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    rows = [{"prompt": "the  King\n", "completion": " and ½ 🤗"}, {"prompt": "x", "completion": "y "}]
    plain = built(tmp_path, tmp_path, rows, source={"kind": "pairs"})
    chat = built(tmp_path, tmp_path, rows, source={"kind": "pairs", "template": "chat"})
    assert [manifest.splits["train"].changed for manifest in (plain, chat)] == [0, 0]
    lower = tokenizer_of(tmp_path, "lower-casing", texts)
    assert built(tmp_path, lower, rows, source={"kind": "pairs"}).splits["train"].changed == 1


@pytest.mark.parametrize("place", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_tokenizer_files_of_editors_that_write_a_mark(tmp_path, texts, place):
    tokenizer_of(tmp_path, "byte-level", texts)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": END_OF_TEXT}))
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    rows = [{"prompt": "x", "completion": "y"}]
    clean = built(tmp_path, tmp_path, rows, source={"kind": "pairs", "template": "chat"})
    data = (tmp_path / place).read_bytes()
    (tmp_path / place).write_bytes(b"\xef\xbb\xbf" + data)
    marked = built(tmp_path, tmp_path, rows, source={"kind": "pairs", "template": "chat"})
    assert marked.fingerprint == clean.fingerprint
