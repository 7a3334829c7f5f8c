"""What begins a document, whatever the tokenizer's template, and bytes that are those of the source.

The judges: transformers' own tokenizer on the exported files, and the source text itself, cut at the places
that the plain tokenizer reports; nothing is decoded.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from tutelage.cli.main import main
from tutelage.config.data_config import StoreConfig
from tutelage.config.load import validate
from tutelage.config.run_config import RunConfig
from tutelage.data.build import build_store
from tutelage.data.store import open_store, verify_store
from tutelage.data.store_manifest import SPLITS
from tutelage.data.tokenizer import load_tokenizer
from tutelage.errors import UserError
from tutelage.evals.windows import read_documents
from tutelage.models import hub
from tutelage.models.shapes import find_shape
from tutelage.run import run

WORDS = "some plain words say hello to the world and then they go away"
TEXTS = [f"{WORDS} {number} né 🙂🙃🙂 naïve ﬁne {'🙃' * (number % 5)} end" for number in range(60)]
BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
LETTERS = "▁abcdefghijklmnopqrstuvwxyz"


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[END, BEGIN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def byte_fallback():
    """Like Llama 2: letters, and bytes for what is no letter."""
    names = [END, BEGIN, UNKNOWN, *(f"<0x{byte:02X}>" for byte in range(256)), *LETTERS]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=UNKNOWN, byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens([END, BEGIN])
    return tokenizer


def unknown():
    """Letters, and one token for any run of what is no letter."""
    names = [END, BEGIN, UNKNOWN, *LETTERS]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=UNKNOWN, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens([END, BEGIN])
    return tokenizer


def unigram():
    names = [
        (UNKNOWN, 0.0),
        (END, 0.0),
        (BEGIN, 0.0),
        *((letter, -2.0) for letter in LETTERS),
    ]
    tokenizer = Tokenizer(models.Unigram(names, 0))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens([END, BEGIN])
    return tokenizer


def normalised_bytes():
    """Like Qwen 2: bytes, after composing characters."""
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


KINDS = {
    "bytes": byte_level,
    "fallback": byte_fallback,
    "unknown": unknown,
    "unigram": unigram,
    "composed": normalised_bytes,
}
TEMPLATES = {
    "nothing": (None, ()),
    "begins": (f"{BEGIN} $A", (BEGIN,)),
    "ends": (f"$A {END}", ()),
    "begins and ends": (f"{BEGIN} $A {END}", (BEGIN,)),
    "begins twice": (f"{BEGIN} {BEGIN} $A", (BEGIN, BEGIN)),
}


def written(tokenizer, directory, template=None, **settings):
    if template is not None:
        ids = [(token, tokenizer.token_to_id(token)) for token in (BEGIN, END)]
        added = processors.TemplateProcessing(single=template, special_tokens=ids)
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), added])
    directory.mkdir(parents=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, **settings}))
    return directory


def built(path, tokenizer, texts=TEXTS, **changes):
    (path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    fields = {
        "name": "texts",
        "sources": [{"kind": "files", "paths": [str(path / "a.jsonl")]}],
        "tokenizer": {"path": str(tokenizer)},
        "validation": 0.5,
        "test": 0.5,
    }
    return open_store(build_store(validate(StoreConfig, fields | changes, "test"), path / "stores"))


def documents_of(store, split):
    view = store.split(split)
    bounds = view.offsets[:, 0].astype(int)
    return [view.tokens[a:b].tolist() for a, b in itertools.pairwise(bounds)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_text_encoded_with_the_stores_tokenizer_is_its_document_without_the_mark(tmp_path, kind, template):
    text, begin = TEMPLATES[template]
    store = built(tmp_path, written(KINDS[kind](), tmp_path / "tokenizer", text))
    theirs = AutoTokenizer.from_pretrained(store.path)
    assert store.begin_ids == tuple(theirs.convert_tokens_to_ids(list(begin)))
    assert theirs.bos_token == (BEGIN if len(begin) == 1 else None)
    wanted = sorted([*theirs(text)["input_ids"], store.eos_id] for text in TEXTS)
    assert sorted(documents_of(store, "validation") + documents_of(store, "test")) == wanted
    assert load_tokenizer(store.path).sha256 == store.manifest.tokenizer_sha256
    verify_store(store.path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", ["nothing", "begins"])
def test_bytes_are_those_of_the_source_wherever_a_document_is_cut(tmp_path, kind, template):
    path = written(KINDS[kind](), tmp_path / "tokenizer", TEMPLATES[template][0])
    store = built(tmp_path, path, validation=0.0, test=1.0)
    plain = Tokenizer.from_file(str(path / "tokenizer.json"))
    plain.post_processor = None
    begun, whole_characters = len(store.begin_ids), 0
    for limit in (2, 7, 20, 45, 70, 1000):
        for document in read_documents(store, "test", 20, limit):
            text = TEXTS[document.index]
            encoding = plain.encode(text)
            last = len(document.tokens_N) - begun - 1
            given = 0 if begun else encoding.offsets[0][1]
            source = text[given : encoding.offsets[last][1]].encode()
            after = [start for start, _ in encoding.offsets[last + 1 : last + 2]]
            shared = any(start < encoding.offsets[last][1] for start in after)
            first_is_shared = not begun and encoding.offsets[1][0] < encoding.offsets[0][1]
            if shared or first_is_shared:
                assert abs(document.size - len(source)) <= 3, "less than a character"
            else:
                assert document.size == len(source)
                whole_characters += 1
    assert whole_characters > 10 or (template == "nothing" and kind in ("fallback", "unknown", "unigram"))
    view = store.split("test")
    sums = np.add.reduceat(view.bytes[:], view.offsets[:-1, 0].astype(int))
    assert sums.tolist() == [len(text.encode()) for text in TEXTS]


@pytest.mark.parametrize(
    ("kind", "limit", "expected"),
    [("bytes", 7, 7), ("fallback", 8, 7), ("unknown", 2, 16), ("unigram", 2, 16), ("composed", 7, 7)],
)
def test_emoji_that_are_cut(tmp_path, kind, limit, expected):
    """Four emoji of four bytes each; a token made of bytes counts as many of them."""
    if kind in ("bytes", "composed"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=258,
            special_tokens=[END, BEGIN],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(["a"], trainer)
        tokenizer.normalizer = normalizers.NFC() if kind == "composed" else None
    else:
        tokenizer = KINDS[kind]()
    path = written(tokenizer, tmp_path / "tokenizer", f"{BEGIN} $A")
    store = built(tmp_path, path, ["🙂🙃🙂🙃"], validation=0.0, test=1.0)
    (document,) = read_documents(store, "test", 1, limit)
    assert document.size == expected
    (whole,) = read_documents(store, "test", 1, 1000)
    assert whole.size == 16


def test_a_first_token_that_nothing_begins_is_no_label_and_has_no_bytes(tmp_path):
    path = written(byte_level(), tmp_path / "tokenizer")
    store = built(tmp_path, path, ["hello world"], validation=0.0, test=1.0)
    (document,) = read_documents(store, "test", 1, 100)
    first = Tokenizer.from_file(str(path / "tokenizer.json")).encode("hello world").tokens[0]
    assert document.scored_N.tolist() == [False] + [True] * (len(document.tokens_N) - 1)
    assert document.size == len("hello world") - len(first)
    assert store.eos_id not in document.tokens_N


def test_a_document_of_one_token_has_nothing_to_score(tmp_path):
    path = written(byte_level(), tmp_path / "tokenizer")
    store = built(tmp_path, path, ["h", "hello world"], validation=0.0, test=1.0)
    assert [document.index for document in read_documents(store, "test", 9, 100)] == [1]
    path = written(byte_level(), tmp_path / "begins", f"{BEGIN} $A")
    store = built(tmp_path, path, ["h", "hello world"], validation=0.0, test=1.0)
    assert [document.index for document in read_documents(store, "test", 9, 100)] == [0, 1]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_run_that_goes_on_from_a_model_exports_a_tokenizer_that_agrees_with_its_store(tmp_path, template):
    path = written(byte_level(), tmp_path / "start", TEMPLATES[template][0])
    store = built(tmp_path, path, validation=0.2, test=0.2)
    hub.save(hub.build(find_shape("nano-20k"), store.vocab_size, 32, seed=0), tmp_path / "model", path)
    fields = {
        "name": "more",
        "model": {"path": str(tmp_path / "model")},
        "data": {"store": str(store.path), "sequence_length": 32},
        "tokens": 128,
        "global_batch_tokens": 128,
        "runtime": {"device": "cpu", "threads": 1},
        "output": str(tmp_path / "runs"),
    }
    theirs = AutoTokenizer.from_pretrained(run(validate(RunConfig, fields, "test")).model)
    documents = sorted(itertools.chain(*(documents_of(store, split) for split in SPLITS)))
    assert documents == sorted([*theirs(text)["input_ids"], store.eos_id] for text in TEXTS)


CHATML = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


@pytest.mark.parametrize("wrote", ["", "{{ bos_token }}"])
def test_prompts_begin_once_whether_or_not_the_chat_template_writes_it(tmp_path, wrote):
    settings = {"bos_token": BEGIN, "chat_template": wrote + CHATML}
    path = written(byte_level(), tmp_path / "tokenizer", f"{BEGIN} $A {END}", **settings)
    rows = [{"prompt": "hello", "completion": "go away"}, {"prompt": "some", "completion": "words"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for template in ("chat", "plain"):
        source = {"kind": "pairs", "paths": [str(tmp_path / "p.jsonl")], "template": template}
        store = built(tmp_path, path, sources=[source], validation=0.0, test=1.0, name=template)
        view = store.split("test")
        for document, a, b in zip(
            documents_of(store, "test"), view.offsets[:-1, 0], view.offsets[1:, 0], strict=True
        ):
            marks = [document.count(store.begin_ids[0]), document.count(store.eos_id)]
            assert (document[0], document[-1], marks) == (store.begin_ids[0], store.eos_id, [1, 1])
            assert view.mask[:][int(a)] == 0
            assert view.mask[:][int(b) - 1] == 1


def test_completions_alone_are_scored_with_what_closes_them(tmp_path):
    path = written(byte_level(), tmp_path / "tokenizer")
    rows = [{"prompt": "hello 🙂 to", "completion": "the wörld"}]
    (tmp_path / "p.jsonl").write_text(json.dumps(rows[0]) + "\n")
    source = {"kind": "pairs", "paths": [str(tmp_path / "p.jsonl")]}
    store = built(tmp_path, path, sources=[source], validation=0.0, test=1.0)
    (document,) = read_documents(store, "test", 1, 1000)
    plain = Tokenizer.from_file(str(path / "tokenizer.json"))
    prompt, completion = (plain.encode(text).ids for text in ("hello 🙂 to\n", "the wörld"))
    assert document.tokens_N.tolist() == [*prompt, *completion, store.eos_id]
    assert document.tokens_N[document.scored_N].tolist() == [*completion, store.eos_id]
    assert document.size == len("the wörld".encode())
    assert read_documents(store, "test", 1, len(prompt)) == []


def test_text_that_spells_a_special_token_is_text_and_is_counted(tmp_path, monkeypatch, capsys):
    path = written(byte_level(), tmp_path / "tokenizer", f"{BEGIN} $A")
    texts = ["hello world", f"say {END} twice {END}", f"say {BEGIN}"]
    store = built(tmp_path, path, texts, validation=0.0, test=1.0)
    assert store.manifest.splits["test"].special_tokens_in_text == 2
    assert [document.count(store.eos_id) for document in documents_of(store, "test")] == [1, 1, 1]
    assert [document.count(store.begin_ids[0]) for document in documents_of(store, "test")] == [1, 1, 1]
    assert sum(document.size for document in read_documents(store, "test", 9, 100)) == sum(map(len, texts))
    monkeypatch.setattr("sys.argv", ["tutelage", "data", "show", str(store.path)])
    with pytest.raises(SystemExit):
        main()
    assert "2 documents spell a special token of the tokenizer: text here" in capsys.readouterr().out
    refusing = {"special_tokens_in_text": "refuse", "validation": 0.0, "test": 1.0}
    with pytest.raises(UserError, match=r"begins 'say </s> twice </s>' spells the special token '</s>'"):
        built(tmp_path, path, texts, **refusing)
    clean = built(tmp_path, path, texts[:1], **refusing)
    assert clean.manifest.splits["test"].special_tokens_in_text == 0


def test_a_store_of_the_version_before_is_refused_in_one_line(tmp_path):
    store = built(tmp_path, written(byte_level(), tmp_path / "tokenizer"))
    manifest = json.loads((store.path / "manifest.json").read_text())
    del manifest["begin_ids"]
    (Path(store.path) / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 1}))
    with pytest.raises(UserError, match="store of schema version 1, this version reads 3; build it again"):
        open_store(store.path)
