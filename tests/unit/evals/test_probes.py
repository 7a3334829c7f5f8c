"""Probes against plain recomputations, and models whose score is known."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from told_progress import Told
from torch import nn

from tutelage.config.data_config import StoreConfig
from tutelage.config.load import validate
from tutelage.data.build import build_store
from tutelage.data.store import Store, open_store
from tutelage.errors import UserError
from tutelage.evals import probes
from tutelage.evals.evaluated_model import EvaluatedModel
from tutelage.evals.probes import acceptance, copying_accuracy, run_probes, used_ids
from tutelage.evals.score_files import read_scores
from tutelage.evals.windows import read_documents
from tutelage.models import hub
from tutelage.models.shapes import LADDER
from tutelage.progress import NullProgress

CONTEXT = 32
SEGMENT = 16


def tiny(vocab_size, seed):
    return hub.build(LADDER["nano-50k"], vocab_size, CONTEXT, seed=seed).eval()


@pytest.fixture(scope="module")
def models(store):
    student, teacher = (tiny(open_store(store).vocab_size, seed) for seed in (0, 1))
    for weight in itertools.chain(student.parameters(), teacher.parameters()):
        weight.data *= 2  # far from uniform, so that they differ
    return student, teacher


@pytest.fixture(scope="module")
def documents(store):
    return read_documents(open_store(store), "test", 3, 75)


@pytest.fixture(scope="module")
def evaluated_models(models, store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated_models")
    found = []
    for name, model in zip(("student", "teacher"), models, strict=True):
        hub.save(model, folder / name, store)
        found.append(EvaluatedModel(name, folder / name, CONTEXT, folder / f"out-{name}", 3, 100, store))
    return found


class Copier(nn.Module):
    """Says with certainty that the token `back` places before the next one comes again."""

    def __init__(self, vocab_size, back):
        super().__init__()
        self.head = nn.Linear(vocab_size, vocab_size, bias=False)
        nn.init.eye_(self.head.weight)
        self.back = back

    def get_output_embeddings(self):
        return self.head

    def get_decoder(self):
        def body(input_ids, use_cache):
            hidden = nn.functional.one_hot(input_ids.roll(self.back - 1, 1), self.head.in_features).float()
            return SimpleNamespace(last_hidden_state=hidden)

        return body


def test_a_model_that_copies_scores_one():
    ids = np.arange(5, 250)
    for begin in ([], [0], [3, 4]):
        assert copying_accuracy(Copier(300, SEGMENT), ids, begin, 300, SEGMENT).value == 1.0
        assert copying_accuracy(Copier(300, SEGMENT + 1), ids, begin, 300, SEGMENT).value < 0.05


@pytest.mark.parametrize("begin", [[], [5], [5, 6]])
def test_copying_is_what_plain_logits_say(models, begin):
    student, ids, n = models[0], np.arange(7, 300), 20
    found = copying_accuracy(student, ids, begin, 300, SEGMENT, sequences=n)
    picks = torch.randint(len(ids), (n, SEGMENT), generator=torch.Generator().manual_seed(0))
    copy = torch.from_numpy(ids)[picks]
    tokens = torch.cat([torch.tensor(begin, dtype=torch.int64).repeat(n, 1), copy, copy], 1)
    with torch.inference_mode():
        choices = student(input_ids=tokens[:, :-1]).logits.argmax(-1)
    right = (choices[:, len(begin) + SEGMENT :] == copy[:, 1:]).double().mean(1).numpy()
    assert choices[:, len(begin) + SEGMENT :].shape == (n, SEGMENT - 1)
    assert found.value == pytest.approx(right.mean())
    assert found.stderr == pytest.approx(right.std(ddof=1) / n**0.5)


def test_only_ids_in_use_are_drawn(store):
    opened = open_store(store)
    ids = used_ids(opened)
    assert set(ids) == set(np.unique(opened.split("train").tokens[:])) - {opened.eos_id}


def dense_rates(models, documents):
    """sum min(p, q) per document, with all logits in float64 at once; the first token is no label."""
    rates = []
    for document in documents:
        inputs = document.tokens_N[:-1]
        rows = []
        for window in (inputs[i : i + CONTEXT] for i in range(0, len(inputs), CONTEXT)):
            with torch.inference_mode():
                p, q = (
                    m(input_ids=torch.from_numpy(window[None])).logits[0].double().numpy() for m in models
                )
            p, q = (np.exp(x - x.max(1, keepdims=True)) for x in (p, q))
            p, q = (x / x.sum(1, keepdims=True) for x in (p, q))
            rows.append(np.minimum(p, q).sum(1))
        rates.append(np.concatenate(rows))
    return rates


@pytest.mark.parametrize("chunk", [7, 512])
def test_acceptance_is_the_dense_recomputation(models, documents, chunk, monkeypatch):
    monkeypatch.setattr(probes, "_LOGIT_TOKENS", chunk)
    rates = dense_rates(models, documents)
    found = acceptance(*models, documents, 300, CONTEXT, draft=3)
    flat = np.concatenate(rates)
    assert 0.05 < flat.mean() < 0.95
    assert found["acceptance_rate"].value == pytest.approx(flat.mean(), abs=1e-6)
    lengths = [a + a * b + a * b * c for x in rates for a, b, c in zip(x, x[1:], x[2:], strict=False)]
    assert found["accepted_length"].value == pytest.approx(np.mean(lengths), abs=1e-6)
    per_document = np.array([x.mean() for x in rates])
    assert found["acceptance_rate"].stderr == pytest.approx(per_document.std(ddof=1) / 3**0.5, abs=1e-6)


def test_a_model_accepts_all_of_its_own(models, documents):
    found = acceptance(models[0], models[0], documents, 300, CONTEXT)
    assert found["acceptance_rate"].value == pytest.approx(1, abs=1e-6)
    assert found["accepted_length"].value == pytest.approx(4, abs=1e-5)


def test_acceptance_does_not_depend_on_who_drafts(models, documents):
    ahead, back = (acceptance(*pair, documents, 300, CONTEXT) for pair in (models, models[::-1]))
    assert ahead["acceptance_rate"].value == pytest.approx(back["acceptance_rate"].value, abs=1e-7)


def padded(model, rows=20, scale=3.0):
    """The same model with more rows in its head than there are ids, some of them likely."""
    size = model.config.vocab_size
    wide = tiny(size + rows, 0)
    shared = {k: v for k, v in model.state_dict().items() if "embed" not in k and "head" not in k}
    wide.load_state_dict(wide.state_dict() | shared)
    for new, old in zip(
        (wide.get_input_embeddings(), wide.get_output_embeddings()),
        (model.get_input_embeddings(), model.get_output_embeddings()),
        strict=True,
    ):
        new.weight.data[:size] = old.weight.data
        new.weight.data[size:] = scale * old.weight.data[:rows]
    return wide.eval()


def test_padded_rows_of_a_head_change_nothing(models, documents):
    student, teacher = models
    ids = np.arange(7, 300)
    plain = copying_accuracy(student, ids, [], 300, SEGMENT), acceptance(*models, documents, 300, CONTEXT)
    for pair in ((padded(student), teacher), (student, padded(teacher)), (padded(student), padded(teacher))):
        found = acceptance(*pair, documents, 300, CONTEXT)
        for name, measured in plain[1].items():
            assert found[name].value == pytest.approx(measured.value, abs=1e-6)
    with torch.inference_mode():
        first = padded(student)(input_ids=torch.from_numpy(documents[0].tokens_N[None])).logits.argmax(-1)
    assert (first >= 300).any()  # or the test would show nothing
    assert copying_accuracy(padded(student), ids, [], 300, SEGMENT) == plain[0]


def test_short_documents_have_a_rate_but_no_length(models, documents):
    short = [
        dataclasses.replace(document, tokens_N=document.tokens_N[:3], scored_N=document.scored_N[:3])
        for document in documents
    ]
    assert set(acceptance(*models, short, 300, CONTEXT)) == {"acceptance_rate"}


def test_probes_are_rows_and_come_once(evaluated_models):
    student, teacher = evaluated_models
    told = Told()
    scores = run_probes(student, teacher=teacher, progress=told)
    assert list(told.stages) == [
        f"{student.id}: {what}" for what in ("samples", "copying", f"drafts for {teacher.id}")
    ]
    for wanted, unit, *done, outcome in told.stages.values():
        assert (done[-1], outcome) == (wanted, "done"), unit
        assert done == sorted(done)
    assert [(score.domain, score.metric) for score in scores] == [
        ("copying", "accuracy"),
        ("acceptance:teacher", "acceptance_rate"),
        ("acceptance:teacher", "accepted_length"),
    ]
    assert {score.role for score in scores} == {"probe"}
    assert all(score.low <= score.value <= score.high for score in scores)
    assert read_scores(student.scores) == scores
    kept = student.scores.read_bytes(), (student.output / "samples.json").stat().st_mtime_ns
    assert run_probes(student, teacher=teacher, progress=(again := Told())) == scores
    assert again.stages == {}
    assert kept == (student.scores.read_bytes(), (student.output / "samples.json").stat().st_mtime_ns)


def test_samples_go_on_from_held_out_text(evaluated_models, store, tmp_path):
    place = shutil.copytree(evaluated_models[1].model, tmp_path / "model")
    (place / "checksums.json").unlink()
    (place / "generation_config.json").write_text('{"repetition_penalty": 9.0}')  # of other users
    teacher = dataclasses.replace(evaluated_models[1], model=place, output=tmp_path / "out")
    state = torch.get_rng_state()
    run_probes(teacher)
    assert torch.equal(state, torch.get_rng_state())
    written = json.loads((teacher.output / "samples.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(store / "tokenizer.json"))
    model = hub.load(teacher.model)
    view = open_store(store).split("test")
    texts = tokenizer.decode(view.tokens[:].tolist(), skip_special_tokens=False)
    assert len(written["samples"]) == 4
    drawn = [text for sample in written["samples"] for text in sample["drawn"]]
    assert len({*drawn}) == len(drawn) == 8  # a model that hardly looks at its prompt draws from other seeds
    for sample in written["samples"]:
        assert sample["prompt"] + sample["text"] in texts
        assert len(set(sample["drawn"])) == 2
    prompt = tokenizer.encode(written["samples"][0]["prompt"]).ids
    greedy = list(prompt)
    while len(greedy) < CONTEXT and greedy[-1] != 0:
        with torch.inference_mode():
            greedy.append(int(model(input_ids=torch.tensor([greedy])).logits[0, -1].argmax()))
    assert written["samples"][0]["greedy"] == tokenizer.decode(
        greedy[len(prompt) :], skip_special_tokens=False
    )
    page = (teacher.output / "samples.md").read_text(encoding="utf-8")
    assert page.startswith("# Samples of teacher, step 3\n")
    assert page.count("Greedy:") == 4


def test_ids_that_begin_a_document_leave_less_room_for_prompt_and_continuation(
    models, evaluated_models, store, tmp_path, monkeypatch
):
    model, begin, asked = models[1], (5, 6, 7), []
    monkeypatch.setattr(Store, "begin_ids", property(lambda _: begin))
    plain = model.generate

    def generate(tokens_BT, **settings):
        asked.append((tokens_BT[0].tolist(), settings["max_new_tokens"]))
        return plain(tokens_BT, **settings)

    monkeypatch.setattr(model, "generate", generate)
    teacher = dataclasses.replace(evaluated_models[1], output=tmp_path)
    probes.write_samples(model, open_store(store), teacher, NullProgress())
    tokens = open_store(store).split("test").tokens[:].tolist()
    assert len(asked) == 12
    for given, new in asked:
        assert tuple(given[:3]) == begin
        assert len(given) + new == CONTEXT
        text = given[3:]
        assert len(text) == (CONTEXT - 3) // 2
        assert any(tokens[at : at + len(text)] == text for at in range(len(tokens)))


def test_a_store_with_another_tokenizer_is_refused(evaluated_models, store, tmp_path):
    shutil.copytree(evaluated_models[0].model, tmp_path / "model")
    strange = dataclasses.replace(evaluated_models[0], model=tmp_path / "model")
    tokenizer = json.loads((strange.model / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (strange.model / "checksums.json").unlink()
    (strange.model / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(
        UserError, match=r"has the ids of .*speeches.* but other normalizer, so .*; build the"
    ):
        run_probes(strange)


def test_a_model_without_a_store_needs_one(evaluated_models):
    with pytest.raises(UserError, match="student: probes need a token store"):
        run_probes(dataclasses.replace(evaluated_models[0], training_store=None))


def test_what_cannot_be_probed_is_said_before_anything_is_written(
    evaluated_models, store, other_store, tmp_path
):
    source = {"kind": "corpus", "name": "sotu"}
    settings = {"name": "all", "sources": [source], "tokenizer": {"path": str(store)}, "max_bytes": 50_000}
    no_test = build_store(validate(StoreConfig, settings | {"validation": 0, "test": 0}, "test"), tmp_path)
    student, teacher = (dataclasses.replace(one, output=tmp_path / one.id) for one in evaluated_models)
    for message, model, settings in (
        ("training split", student, {"store": other_store}),
        ("test split", student, {"store": no_test, "teacher": teacher}),
        ("context of 2 tokens is too short", dataclasses.replace(student, context=2), {}),
    ):
        with pytest.raises(UserError, match=message):
            run_probes(model, **settings)
        assert not model.output.exists()
    assert run_probes(dataclasses.replace(student, context=3), store=no_test)[0].metric == "accuracy"
