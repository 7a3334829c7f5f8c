"""What models write after a prompt, beside plain forward passes and transformers' own tokenizers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tutelage.config.data_config import StoreConfig
from tutelage.config.load import validate
from tutelage.data.build import build_store
from tutelage.data.store import open_store
from tutelage.errors import UserError
from tutelage.evals import samples
from tutelage.evals.evaluated_model import find_model
from tutelage.evals.samples import Sampling, sample
from tutelage.models import hub
from tutelage.models.shapes import LADDER

CONTEXT = 24
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
PROMPT = "a bad cab"


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """A model as Llama 2's: a space in front of texts, a token that begins them, a chat template."""
    words = ["<s>", "</s>", "[user]", "[assistant]", "▁", *LETTERS, "▁a", "ba", "ca"]
    tokenizer = Tokenizer(
        models.BPE({word: number for number, word in enumerate(words)}, [("▁", "a"), ("b", "a"), ("c", "a")])
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>", "[user]", "[assistant]"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    config = LlamaConfig(
        vocab_size=len(words) + 5,  # a padded head
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("chatty") / "llama"
    LlamaForCausalLM(config).save_pretrained(place)
    tokenizer.save(str(place / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (place / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    return place


@pytest.fixture
def model(chatty, tmp_path):
    return find_model(str(chatty), tmp_path)


def with_settings(place, copy, changes):
    """A copy of a model with other settings of its tokenizer."""
    file = shutil.copytree(place, copy) / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return copy


def greedily(place, ids, ends=(1,)):
    """Go on by whole forward passes, without padded ids, to an end or to the model's context."""
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(place), AutoTokenizer.from_pretrained(place)
    given = len(ids)
    while len(ids) < CONTEXT and (len(ids) == given or ids[-1] not in ends):
        with torch.inference_mode():
            ids = [*ids, int(plain(torch.tensor([ids])).logits[0, -1, : len(tokenizer)].argmax())]
    return tokenizer.decode(ids)[len(tokenizer.decode(ids[:given])) :]


@pytest.mark.parametrize("prompt", [PROMPT, "zebra", ""])
def test_the_most_probable_is_what_plain_forward_passes_say(model, chatty, prompt):
    ids = AutoTokenizer.from_pretrained(chatty)(prompt)["input_ids"]
    (found,) = sample([model], [prompt], Sampling(tokens=100, temperature=0))
    assert found.text == greedily(chatty, ids)
    assert found.seed is None
    assert found.at_context


@pytest.mark.parametrize("template", [TEMPLATE, TEMPLATE.removeprefix("{{ bos_token }}")])
def test_a_turn_begins_as_it_does_in_a_store_of_conversations(chatty, tmp_path, template):
    place = with_settings(chatty, tmp_path / "turns", {"chat_template": template})
    (found,) = sample(
        [find_model(str(place), tmp_path)], [PROMPT], Sampling(tokens=100, temperature=0, chat=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    ids = tokenizer(f"<s>[user]{PROMPT}[assistant]", add_special_tokens=False)["input_ids"]
    assert ids.count(0) == 1
    assert found.text == greedily(chatty, ids)
    turns = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": "cab"}]
    (tmp_path / "turns.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    source = {
        "kind": "pairs",
        "paths": [str(tmp_path / "turns.jsonl")],
        "messages": "messages",
        "template": "chat",
    }
    fields = {"name": "turns", "sources": [source], "validation": 0.0, "test": 0.0}
    built = build_store(validate(StoreConfig, fields | {"tokenizer": {"path": str(place)}}, "test"), tmp_path)
    assert open_store(built).split("train").tokens[: len(ids)].tolist() == ids


def test_draws_have_seeds_of_their_own_and_come_again(model):
    before = torch.get_rng_state()
    found = sample([model, model], [PROMPT, "zebra"], Sampling(tokens=8, draws=3, seed=5))
    assert torch.equal(before, torch.get_rng_state())
    assert [one.seed for one in found] == [*range(5, 11)] * 2
    texts = [one.text for one in found]
    assert texts[:6] == texts[6:]
    assert len({*texts}) == 6
    assert texts[2] == sample([model], [PROMPT], Sampling(tokens=8, seed=7))[0].text


@pytest.mark.parametrize("narrow", [{"temperature": 1e-4}, {"top_p": 1e-6}], ids=str)
def test_without_room_for_chance_draws_are_the_most_probable(model, narrow):
    (greedy,) = sample([model], [PROMPT], Sampling(temperature=0))
    (drawn,) = sample([model], [PROMPT], Sampling(**narrow))
    assert drawn.seed == 0
    assert drawn.text == greedy.text


def test_draws_follow_the_models_probabilities(model, chatty):
    """The first token of many draws at a temperature, beside the softmax of plain logits."""
    n, temperature = 250, 3.0
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(chatty), AutoTokenizer.from_pretrained(chatty)
    with torch.inference_mode():
        logits_V = plain(**tokenizer(PROMPT, return_tensors="pt")).logits[0, -1, : len(tokenizer)]
    likely, best = (logits_V / temperature).softmax(0).max(0)
    share, word = likely.item(), tokenizer.decode(best)
    noise = (share * (1 - share) / n) ** 0.5
    assert abs(logits_V.softmax(0)[best].item() - share) > 6 * noise  # at temperature 1
    found = sample([model], [PROMPT], Sampling(tokens=1, draws=n, temperature=temperature))
    assert sum(one.text == word for one in found) / n == pytest.approx(share, abs=4 * noise)


def test_a_text_ends_at_every_end_that_the_model_knows(chatty, tmp_path):
    place = shutil.copytree(chatty, tmp_path / "ends")
    ids = AutoTokenizer.from_pretrained(chatty)(PROMPT)["input_ids"]
    plain = AutoModelForCausalLM.from_pretrained(chatty)
    first = int(plain(torch.tensor([ids])).logits[0, -1, :34].argmax())
    settings = {"eos_token_id": [1, first], "repetition_penalty": 9.0}
    (place / "generation_config.json").write_text(json.dumps(settings))
    (found,) = sample([find_model(str(place), tmp_path)], [PROMPT], Sampling(temperature=0))
    assert found.text == greedily(place, ids, (1, first))
    assert not found.at_context


@pytest.fixture
def plain(store, tmp_path):
    """A model whose tokenizer puts nothing in front of texts and has no chat template."""
    text = open_store(store)
    hub.save(hub.build(LADDER["nano-20k"], text.vocab_size, CONTEXT, seed=0), tmp_path / "plain", store)
    return find_model(str(tmp_path / "plain"), tmp_path)


@pytest.mark.parametrize(
    ("prompt", "settings", "line"),
    [
        ("", {}, "--prompt '': no tokens"),
        ("a " * 30, {}, "so there is no room to go on; shorten it"),
        (PROMPT, {"draws": 2, "temperature": 0}, "--draws 2: at --temperature 0 all are the same"),
        (PROMPT, {"chat": True}, "no chat template .*; ask without one"),
    ],
)
def test_what_cannot_be_sampled_is_said_before_a_model_is_loaded(plain, monkeypatch, prompt, settings, line):
    monkeypatch.setattr(samples, "load_evaluated", None)
    with pytest.raises(UserError, match=line):
        sample([plain], [PROMPT, prompt], Sampling(**settings))


def test_a_template_that_refuses_is_one_line(chatty, tmp_path):
    template = "{{ raise_exception('a system turn comes first') }}"
    place = with_settings(chatty, tmp_path / "refusing", {"chat_template": template})
    with pytest.raises(UserError, match="its chat template refuses a prompt"):
        sample([find_model(str(place), tmp_path)], [PROMPT], Sampling(chat=True))


def test_the_command_shows_models_side_by_side_below_each_prompt(command, chatty, plain):
    code, shown, told = command(
        *("eval", "sample", chatty, plain.model, "--prompt", PROMPT, "--prompt", "cab", "--tokens", "40")
    )
    assert code == 0, told
    heads = [line.split(maxsplit=1) for line in shown.splitlines() if line.startswith("model ")]
    assert [head[1].strip() for head in heads] == [PROMPT, "cab"]
    assert [line.split()[0] for line in shown.splitlines() if line.startswith(("llama-", "plain-"))] == [
        *(find_model(str(chatty), plain.output).id, plain.id) * 2
    ]
    assert "ended where the sequences end" in shown
    assert not (Path.cwd() / "evals").exists()
