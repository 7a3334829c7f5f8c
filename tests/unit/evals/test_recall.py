"""Recall against plain searches of the text, models whose score is known, and a plain recomputation."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter, defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from tutelage.config.data_config import StoreConfig, TokenizerConfig
from tutelage.data.build import build_store
from tutelage.data.loader import Loader
from tutelage.data.store import open_store
from tutelage.errors import UserError
from tutelage.evals import windows
from tutelage.evals.evaluated_model import find_model
from tutelage.evals.facts import Reading, count_read, find_facts
from tutelage.evals.recall import CHOICES, TextRead, left_out, questions, recall, run_recall
from tutelage.evals.score_files import read_scores
from tutelage.models import hub
from tutelage.progress import NullProgress
from tutelage.run import run
from tutelage.types import RECALL_BINS

READING = Reading(seed=43, sequence_length=32, sequences_per_step=8, steps=150)


@pytest.fixture(scope="module")
def text(store):
    return open_store(store)


@pytest.fixture(scope="module")
def facts(text):
    return find_facts(text)


@pytest.fixture(scope="module")
def asked(text, tmp_path_factory):
    readings = tuple(READING._replace(seed=seed, steps=300) for seed in (43, 44))
    return questions(TextRead(text, readings), 32, tmp_path_factory.mktemp("cache"))


def documents(text, split):
    """Every document as text, decoded by itself."""
    tokenizer = Tokenizer.from_file(str(text.path / "tokenizer.json"))
    view = text.split(split)
    return [
        tokenizer.decode(view.tokens[a : b - 1].tolist())
        for a, b in itertools.pairwise(view.offsets[:, 0].astype(int).tolist())
    ]


def occurrences(texts, one):
    """How often the words stand in the text, and how often with the answer after them."""
    words = rf"(?:(?<=[ \n])|^){re.escape(one.context)} "
    found = sum(len(re.findall(words, text, re.MULTILINE)) for text in texts)
    answered = sum(
        len(re.findall(rf"{words}{re.escape(one.answer)}(?![\w])", text, re.MULTILINE)) for text in texts
    )
    return found, answered


def test_every_fact_is_in_the_text_as_often_as_said_and_with_no_other_answer(text, facts):
    split = {name: documents(text, name) for name in ("train", "test")}
    assert {one.kind for one in facts} == {"name", "date", "number"}
    assert len(facts) > 1000
    some = [*facts[::25], *sorted(facts, key=lambda one: -one.times)[:25]]
    for one in some:
        assert len(one.context.split(" ")) == 4
        where = "test" if one.held_out else "train"
        assert occurrences(split[where], one) == (one.times, one.times)
        assert f"{one.context} {one.answer}" in split[where][one.document]
        if one.held_out:
            assert occurrences(split["train"], one) == (0, 0)


def test_a_text_without_a_training_split_has_facts_that_are_held_out(other_store):
    facts = find_facts(open_store(other_store))
    assert len(facts) > 10
    assert all(one.held_out for one in facts)


def test_what_was_read_is_counted_in_the_batches_of_the_run(text, facts):
    loader = Loader(text.split("train"), 32, 8, READING.seed)
    tokenizer = Tokenizer.from_file(str(text.path / "tokenizer.json"))
    rows = []
    for step in range(READING.steps):
        batch = loader.batch(step)
        rows += torch.cat([batch.tokens_BT, batch.labels_BT[:, -1:]], 1).tolist()
    read = "\n".join("|" + row + "|" for row in tokenizer.decode_batch(rows, skip_special_tokens=False))
    read = read.replace("<|endoftext|>", "\n")
    seen, untouched = count_read(text, facts, READING)
    train = [one for one in facts if not one.held_out]
    assert 100 < len(untouched) < len(train)
    assert max(seen.values()) > 2
    for one in [*train[::7], *(one for one in train if seen[one.context] > 1)]:
        plain = len(re.findall(rf"(?<=\s){re.escape(f'{one.context} {one.answer}')}(?!\w)[^\s|]*\s", read))
        assert seen[one.context] == plain
    for one in (one for one in train if one.context in untouched):
        assert f"{one.context} {one.answer}" not in read
        assert not seen[one.context]


def test_words_that_begin_a_window_count_where_a_decoder_takes_their_space_away(text, tmp_path):
    texts = documents(text, "train")
    spaces = pre_tokenizers.Metaspace()
    words = {piece for one in texts for piece, _ in spaces.pre_tokenize_str(one)}
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(["</s>", *sorted(words)])}))
    tokenizer.pre_tokenizer, tokenizer.decoder = spaces, decoders.Metaspace()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
    config = StoreConfig(
        name="words",
        sources=({"kind": "files", "paths": (str(tmp_path / "a.jsonl"),)},),
        tokenizer=TokenizerConfig(path=tmp_path),
        validation=0.0,
        test=0.0,
    )
    built = open_store(build_store(config, tmp_path))
    reading = READING._replace(sequence_length=8, steps=500)
    seen, _ = count_read(built, facts := find_facts(built), reading)
    loader, view = Loader(built.split("train"), 8, 8, READING.seed), built.split("train")
    starts = np.concatenate([loader.windows(step) for step in range(reading.steps)]) * 8
    read = "|".join("".join(map(tokenizer.id_to_token, view.tokens[a : a + 9])) for a in starts)
    read = read.replace("</s>", "\n").replace("▁", " ")
    assert len(seen) > 20
    for one in facts:
        phrase = re.escape(f"{one.context} {one.answer}")
        assert seen[one.context] == len(re.findall(rf"[ \n]{phrase}(?![\w]|[.,]\d)[^\s|]*\s", read))
    reading = reading._replace(steps=100)
    _, untouched = count_read(built, facts, reading)
    starts = np.concatenate([loader.windows(step) for step in range(reading.steps)]) * 8
    was_read = np.zeros(len(view.tokens), bool)
    was_read[(starts[:, None] + np.arange(9)).ravel()] = True  # the last is a label alone
    lines = "".join(map(tokenizer.id_to_token, view.tokens[:])).replace("</s>", "\n" * 4).replace("▁", " ")
    which = np.repeat(np.arange(len(was_read)), [len(tokenizer.id_to_token(n)) for n in view.tokens[:]])
    assert 20 < len(untouched) < len(facts)
    for one in (one for one in facts if one.context in untouched):
        for found in re.finditer(re.escape(f" {one.context} {one.answer}"), lines):
            if re.match(r"\W", lines[found.end() :][:1]):
                assert not was_read[which[found.start() + 1] : which[found.end() - 1] + 1].any(), one


class Fixed(nn.Module):
    """Gives the logits that a function of the tokens so far names."""

    config = SimpleNamespace(to_dict=dict)

    def __init__(self, vocab_size, logits):
        super().__init__()
        self.head = nn.Linear(vocab_size, vocab_size, bias=False)
        nn.init.eye_(self.head.weight)
        self.logits = logits

    def get_output_embeddings(self):
        return self.head

    def get_decoder(self):
        def body(input_ids, use_cache):
            return SimpleNamespace(last_hidden_state=self.logits(input_ids))

        return body


def accuracies(found):
    return {name.removeprefix("accuracy_"): one.value for name, (one, _) in found.items() if "accu" in name}


def test_models_that_ignore_the_words_are_at_chance_in_every_bin(text, asked):
    V = text.vocab_size
    by_bin = {name: [one for one in asked if one.bin == name] for name, _ in RECALL_BINS}
    assert [name for name, some in by_bin.items() if some] == ["held_out", "0", "1", "2-3"]
    for some in by_bin.values():
        for block in zip(*[iter(some)] * CHOICES, strict=True):
            assert [one.gold for one in block] == [0, 1, 2, 3]
            assert len({tuple(one.choices) for one in block}) == 1
            assert len(set(block[0].choices)) == CHOICES
    generator = torch.Generator().manual_seed(0)
    frequencies_V = torch.randn(V, generator=generator)
    for logits_V in (torch.zeros(V), frequencies_V, 5 * frequencies_V):
        model = Fixed(V, lambda ids, logits_V=logits_V: logits_V.expand(*ids.shape, V))
        assert set(accuracies(recall(model, asked, text, 32)).values()) == {0.25}


def test_a_table_of_the_training_text_knows_what_it_has_read(text, asked):
    V, orders = text.vocab_size, (8, 6, 4, 2)
    tokens = text.split("train").tokens[:].tolist()
    table = defaultdict(Counter)
    for n in orders:
        for i in range(n, len(tokens)):
            table[tuple(tokens[i - n : i])][tokens[i]] += 1

    def logits(ids_BT):
        found_BTV = np.zeros((*ids_BT.shape, V), np.float32)
        for b, row in enumerate(ids_BT.tolist()):
            for t in range(1, len(row)):
                keys = (tuple(row[max(0, t + 1 - n) : t + 1]) for n in orders)
                for token, count in next((table[key] for key in keys if key in table), {}).items():
                    found_BTV[b, t, token] = 8 + np.log(count)
        return torch.from_numpy(found_BTV)

    some = [one for name, _ in RECALL_BINS for one in [one for one in asked if one.bin == name][:60]]
    known = accuracies(recall(Fixed(V, logits), some, text, 32))
    assert known["1"] > 0.97
    assert known["2-3"] > 0.97
    assert known["held_out"] < 0.6


def test_the_scores_of_a_run_are_those_of_its_files_asked_plainly(make_config, text, tmp_path):
    config = make_config(eval={"recall": True, "every": 6 * 256})
    trained = run(config)
    rows = [row for row in read_scores(trained.scores) if row.domain == "recall"]
    assert {row.step for row in rows} == {6, 12}
    assert {row.split for row in rows} == {"test"}
    values = {row.metric: row for row in rows if row.step == 12}
    (kept,) = [
        found
        for path in (tmp_path / "overlap").glob("recall-*.json")
        if (found := json.loads(path.read_text()))["version"] == values["rank_0"].version
    ]
    assert kept["store"] == text.fingerprint
    model = AutoModelForCausalLM.from_pretrained(trained.model)
    tokenizer = AutoTokenizer.from_pretrained(trained.model)
    right, nats = [], []
    assert {row[3] for row in kept["found"]} == {"held_out", "0"}  # of 3,072 tokens
    for prompt, choices, gold, *_ in (row for row in kept["found"] if row[3] == "0"):
        given = len(tokenizer(prompt).input_ids)
        sums, lengths = [], []
        for choice in choices:
            ids = torch.tensor(tokenizer(f"{prompt} {choice}").input_ids)
            with torch.no_grad():
                logp = model(ids[None]).logits[0].log_softmax(-1)
            own = logp[:-1].gather(1, ids[1:, None])[given - 1 :, 0]
            sums.append(float(own.sum()))
            lengths.append(len(own))
        right.append(int(np.argmax(sums)) == gold)
        nats.append((-sums[gold], lengths[gold]))
    assert values["accuracy_0"].value == pytest.approx(np.mean(right))
    assert values["accuracy_0"].n == len(right) == 200
    total, tokens = np.sum(nats, axis=0)
    assert values["nats_per_token_0"].value == pytest.approx(total / tokens, rel=1e-5)
    before = trained.scores.read_bytes()
    run(config)  # finished
    scored = run_recall(find_model(str(trained.path), tmp_path), tmp_path / "overlap", NullProgress())
    assert trained.scores.read_bytes() == before
    assert {row.metric: row for row in scored} == values


def test_batches_and_padding_change_nothing(text, asked, tiny_run, monkeypatch):
    model = hub.load(tiny_run.model)
    together = recall(model, asked[::12], text, 32)
    monkeypatch.setattr(windows, "FORWARD_TOKENS", 1)
    alone = recall(model, asked[::12], text, 32)
    for metric, (estimate, n) in together.items():
        assert alone[metric][1] == n
        assert alone[metric][0].value == pytest.approx(estimate.value, rel=1e-5)


def test_what_cannot_be_asked_is_said(make_config, tmp_path, text, tiny_run):
    lines = [{"text": f"there is nothing to know in line {'abcdefgh'[i % 8] * i} " * 9} for i in range(60)]
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = StoreConfig(
        name="plain",
        sources=({"kind": "files", "paths": (str(tmp_path / "plain.jsonl"),)},),
        tokenizer=TokenizerConfig(path=text.path),
        validation=0.2,
        test=0.2,
    )
    plain = build_store(config, tmp_path / "stores")
    with pytest.raises(UserError, match=r"too few facts .* recall needs longer or other text"):
        run(make_config(data={"store": str(plain), "sequence_length": 32}, eval={"recall": True}))
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [tiny_run.id]
    elsewhere = (tiny_run.path / "config.yaml").read_text().replace(str(text.path), str(tmp_path / "gone"))
    tiny_run.write_config(elsewhere, {})
    with pytest.raises(UserError, match=r"gone: not a token store"):
        run_recall(find_model(str(tiny_run.path), tmp_path), tmp_path, NullProgress())
    with pytest.raises(UserError, match=r"needs the text that the model was trained on \(--store\)"):
        run_recall(find_model(str(tiny_run.model), tmp_path), tmp_path, NullProgress())
    few = TextRead(text, (READING._replace(steps=1),))
    sentence = left_out(few, questions(few, 32, tmp_path))
    assert sentence is not None
    assert "read 2 or 3 times, read 4 to 9 times, read 10 times or more; left out" in sentence
