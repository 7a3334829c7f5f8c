"""Scores of whole documents: ours, our lm-eval class's, lm-eval's own class's and plain transformers'."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from tutelage.config.data_config import StoreConfig
from tutelage.config.load import validate
from tutelage.data.build import build_store
from tutelage.data.store import open_store
from tutelage.data.tokenizer import load_tokenizer
from tutelage.evals.token_scores import score_tokens
from tutelage.evals.windows import read_documents
from tutelage.models import hub
from tutelage.models.shapes import find_shape

huggingface = pytest.importorskip("lm_eval.models.huggingface")
lm_eval_model = pytest.importorskip("tutelage.evals.lm_eval_model")

CONTEXT = 64
TEXTS = [
    "the people of the land and the house of the lord",
    "and he said unto them, " * 3,
    "x" + " and the congress of the united states of america" * 12,
    " of the government, the treasury and the navy; " * 9,
]
DEFAULT = {"batch_size": 2, "device": "cpu", "max_length": CONTEXT}


@pytest.fixture(scope="module", params=["nothing", "begins"])
def opened(request, store, tmp_path_factory):
    """The speeches' tokenizer, alone or with a token in front of every text, on four short documents."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = Tokenizer.from_file(str(store / "tokenizer.json"))
    settings = {"eos_token": "<|endoftext|>"}
    if request.param == "begins":
        tokenizer.add_special_tokens(["<s>"])
        ids = [("<s>", tokenizer.token_to_id("<s>"))]
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=ids)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    fields = {
        "name": "texts",
        "sources": [{"kind": "files", "paths": [str(folder / "a.jsonl")]}],
        "tokenizer": {"path": str(folder)},
        "validation": 0.0,
        "test": 1.0,
    }
    return open_store(build_store(validate(StoreConfig, fields, "test"), folder))


@pytest.fixture(scope="module", params=[0, 60], ids=["", "padded"])
def exported(request, opened, tmp_path_factory):
    """A model far from uniform, whose head may have likely rows beyond the tokenizer's ids."""
    model = hub.build(find_shape("nano-50k"), opened.vocab_size + request.param, CONTEXT, seed=3).eval()
    for weight in model.parameters():
        weight.data *= 2
    directory = tmp_path_factory.mktemp("model") / "m"
    hub.save(model, directory, opened.path)
    return directory


def asked(*texts):
    return [SimpleNamespace(args=text) for text in texts]


def truth(exported, opened, text):
    """-log p of every scored token in float64, one window after another, each from nothing before it."""
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float64).eval()
    ids = AutoTokenizer.from_pretrained(exported)(text)["input_ids"]
    losses = []
    for start in range(0, len(ids) - 1, CONTEXT):
        piece = torch.tensor([ids[start : start + CONTEXT + 1]])
        with torch.inference_mode():
            logits = model(input_ids=piece[:, :-1]).logits[0, :, : opened.vocab_size]
        losses += (-logits.log_softmax(1).gather(1, piece[0, 1:, None])[:, 0]).tolist()
    return np.array(losses)


def test_scores_of_documents_are_those_of_plain_transformers(exported, opened):
    documents = read_documents(opened, "test", 9, 10**6)
    found = score_tokens(hub.load(exported), documents, opened.vocab_size, CONTEXT).losses(documents)
    for document, nll, tokens in zip(documents, found.nll_N, found.tokens_N, strict=True):
        expected = truth(exported, opened, TEXTS[document.index])
        assert tokens == len(expected)
        assert nll == pytest.approx(expected.sum(), rel=1e-5)


def test_texts_that_fill_their_windows_have_our_scores_in_our_class(exported, opened):
    """All but the last: lm-eval lets a last window reach back over what was scored before."""
    ours = lm_eval_model.ExportedModel(load_tokenizer(exported), pretrained=str(exported), **DEFAULT)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    ids = tokenizer(TEXTS[2], add_special_tokens=False)["input_ids"]
    begun = len(opened.begin_ids)
    fitting = tokenizer.decode(ids[: 2 * CONTEXT + 1 - begun])
    for text in (TEXTS[0], TEXTS[1], fitting):
        losses = truth(exported, opened, text)
        (rolling,) = ours.loglikelihood_rolling(asked((text,)), disable_tqdm=True)
        assert rolling == pytest.approx(-losses.sum(), rel=1e-5)
    (reaching,) = ours.loglikelihood_rolling(asked((TEXTS[2],)), disable_tqdm=True)
    plain = -truth(exported, opened, TEXTS[2]).sum()
    assert reaching != pytest.approx(plain, rel=1e-5)
    assert reaching == pytest.approx(plain, rel=0.05)


def test_lm_evals_own_class_differs_in_beginnings_and_padding_alone(exported, opened):
    """With the beginning given by hand, and a head without padding, its numbers are ours."""
    ours = lm_eval_model.ExportedModel(load_tokenizer(exported), pretrained=str(exported), **DEFAULT)
    first = AutoTokenizer.from_pretrained(exported)(TEXTS[2])["input_ids"][0]
    theirs = huggingface.HFLM(pretrained=str(exported), prefix_token_id=first, **DEFAULT)
    padded = theirs.model.get_output_embeddings().weight.shape[0] > opened.vocab_size
    pairs = [("the people of the", " land"), ("x and the", " congress of the united")]
    pairs += [("", "the people"), ("", "x")]
    if not opened.begin_ids:  # an answer without a prompt begins behind a mark, a text at its beginning
        theirs.custom_prefix_token_id = None
    answers = [
        [value for value, _ in lm.loglikelihood(asked(*pairs), disable_tqdm=True)] for lm in (ours, theirs)
    ]
    theirs.custom_prefix_token_id = first
    assert padded == (max(abs(a - b) for a, b in zip(*answers, strict=True)) > 1e-3)
    if padded:
        return
    assert answers[0] == pytest.approx(answers[1], rel=1e-5)
    own = truth(exported, opened, TEXTS[0]).sum()
    ((whole, _),) = theirs.loglikelihood(asked(("", TEXTS[0])), disable_tqdm=True)
    (rolling,) = theirs.loglikelihood_rolling(asked((TEXTS[0],)), disable_tqdm=True)
    if opened.begin_ids:
        assert whole == pytest.approx(-own, rel=1e-5)
        assert rolling < -own - 1  # it puts the beginning there twice and scores the second
        bare = huggingface.HFLM(pretrained=str(exported), add_bos_token=False, **DEFAULT)
        (rolling,) = bare.loglikelihood_rolling(asked((TEXTS[0],)), disable_tqdm=True)
        assert rolling == pytest.approx(-own, rel=1e-5)
    else:  # it scores the first token from a mark
        assert rolling < -own - 1


def test_answers_without_a_prompt_are_scored_whole(exported, opened):
    """Of one token as of many: without its first token the longer answer had a head start of some nats."""
    ours = lm_eval_model.ExportedModel(load_tokenizer(exported), pretrained=str(exported), **DEFAULT)
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float64).eval()
    begin = opened.begin_ids[0] if opened.begin_ids else opened.eos_id
    texts = ("x", "the people of the land")
    for text, (value, _) in zip(
        texts, ours.loglikelihood(asked(*[("", text) for text in texts]), disable_tqdm=True), strict=True
    ):
        ids = AutoTokenizer.from_pretrained(exported)(text, add_special_tokens=False)["input_ids"]
        assert (len(ids) == 1) == (text == "x")
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([[begin, *ids[:-1]]])).logits[0, :, : opened.vocab_size]
        each = logits.log_softmax(1).gather(1, torch.tensor(ids)[:, None])
        assert value == pytest.approx(float(each.sum()), rel=1e-5)
        (rolling,) = ours.loglikelihood_rolling(asked((text,)), disable_tqdm=True)
        assert (rolling == pytest.approx(value, rel=1e-5)) == bool(opened.begin_ids or text == "x")


def test_a_tokenizer_that_closes_texts_closes_no_prompt(exported, opened, tmp_path):
    closing = tmp_path / "closing"
    shutil.copytree(exported, closing)
    tokenizer = Tokenizer.from_file(str(closing / "tokenizer.json"))
    names = [tokenizer.id_to_token(index) for index in (*opened.begin_ids, opened.eos_id)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*names[:-1], "$A", names[-1]],
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in names],
    )
    tokenizer.save(str(closing / "tokenizer.json"))
    (closing / "checksums.json").unlink()  # as of a directory that others have written
    pairs = [("the people of the", " land"), ("x and the", " congress of the united")]
    models = [
        lm_eval_model.ExportedModel(load_tokenizer(path), pretrained=str(path), **DEFAULT)
        for path in (exported, closing)
    ]
    answers = [
        [value for value, _ in model.loglikelihood(asked(*pairs), disable_tqdm=True)] for model in models
    ]
    assert answers[0] == answers[1]
    prompts = [model.tok_batch_encode(["the people of the"])[0].tolist() for model in models]
    assert prompts[0] == prompts[1]


def test_padded_ids_are_never_generated(exported, opened):
    ours = lm_eval_model.ExportedModel(load_tokenizer(exported), pretrained=str(exported), **DEFAULT)
    torch.manual_seed(0)
    context, mask = ours.tok_batch_encode(["the people"] * 16)
    written = ours._model_generate(
        context=context, attention_mask=mask, max_length=CONTEXT, stop=["\0"], do_sample=True, temperature=3.0
    )
    assert int(written.max()) < opened.vocab_size


@pytest.mark.parametrize("known", [None, 5, [5, 7]])
def test_what_is_written_ends_at_the_tokenizers_end_whatever_the_model_says(
    exported, opened, tmp_path, known
):
    """Else a row of a batch would go on behind its end until the last row is finished."""
    shutil.copytree(exported, tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps({"eos_token_id": known}))
    (tmp_path / "m" / "checksums.json").unlink()
    ours = lm_eval_model.ExportedModel(load_tokenizer(exported), pretrained=str(tmp_path / "m"), **DEFAULT)
    others = known if isinstance(known, list) else [known] * (known is not None)
    assert ours.model.generation_config.eos_token_id == [*others, opened.eos_id]
