"""Exported directories hold what older readers, generation, chat and people need; nothing else changes."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from safetensors.torch import load_file
from tokenizers import Tokenizer, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo3Config,
    Phi3Config,
)

from tutelage.config.data_config import StoreConfig, TokenizerConfig
from tutelage.data.build import build_store
from tutelage.errors import UserError
from tutelage.models import hub
from tutelage.models.directory import weights_fingerprint
from tutelage.models.export import Base, card, for_older_readers, with_scores
from tutelage.models.shapes import find_shape
from tutelage.run import run

VOCAB, CONTEXT = 300, 64
TOKENS_BT = (torch.arange(2 * 48).reshape(2, 48) * 7) % VOCAB
OLDER = "TUTELAGE_TRANSFORMERS_4"
"""Environment variable with a directory that holds transformers 4.57 and what it needs, for PYTHONPATH."""

READ = """
import sys, torch, transformers
tokens_BT = (torch.arange(2 * 48).reshape(2, 48) * 7) % 300
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
print(transformers.__version__)
print(model(input_ids=tokens_BT).logits.flatten().tolist())
"""


def rope(**parameters):
    small = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
    }
    return LlamaConfig(**small, num_key_value_heads=2, rope_parameters=parameters)


SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
MODELS = {
    "nano": find_shape("nano-50k").config(VOCAB, CONTEXT),
    "qwen3": find_shape("qwen3-0.15b").config(VOCAB, CONTEXT),
    "linear": rope(rope_type="linear", rope_theta=5e5, factor=4.0),
    "llama3": rope(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=32),
    "yarn": rope(rope_type="yarn", rope_theta=5e5, factor=4.0, original_max_position_embeddings=64),
    "gemma3": Gemma3TextConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                               sliding_window=16, bos_token_id=0, eos_token_id=0, pad_token_id=None),
    "olmo3": Olmo3Config(**SMALL, num_attention_heads=4, sliding_window=16, bos_token_id=0, eos_token_id=0,
                         layer_types=["sliding_attention", "full_attention"], rope_parameters={
        "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
        "full_attention": {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0,
                           "original_max_position_embeddings": 64}}),
    "phi3": Phi3Config(**SMALL, num_attention_heads=4, bos_token_id=0, eos_token_id=0, pad_token_id=None,
                       max_position_embeddings=64, original_max_position_embeddings=32, rope_parameters={
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 2.3, 2.6, 2.9], "original_max_position_embeddings": 32}),
    "neox": GPTNeoXConfig(**SMALL, num_attention_heads=4, rope_parameters={
        "rope_type": "default", "rope_theta": 50000.0, "partial_rotary_factor": 0.5}),
}  # fmt: skip


@pytest.fixture(params=MODELS)
def exported(request, store, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[request.param], dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3.0)  # so that positions matter
    assert hub.save(model, tmp_path / "model", store) == 0.0
    return request.param, model, tmp_path / "model"


def test_older_readers_find_rotary_positions_where_they_look(exported):
    name, model, directory = exported
    config = json.loads((directory / "config.json").read_text())
    ours = model.config.rope_parameters
    whole = ours.get("full_attention", ours)
    assert config["torch_dtype"] == config["dtype"] == "float32"
    if name == "neox":
        assert (config["rotary_emb_base"], config["rotary_pct"]) == (50000.0, 0.5)
        return
    assert config["rope_theta"] == whole["rope_theta"]
    if name == "gemma3":
        assert config["rope_local_base_freq"] == ours["sliding_attention"]["rope_theta"]
    if whole["rope_type"] == "default":
        assert config["rope_scaling"] is None
    elif name == "phi3":  # whose version 4 refuses a dictionary of any other fields
        kept = {"short_factor": whole["short_factor"], "long_factor": whole["long_factor"]}
        assert config["rope_scaling"] == {"type": "longrope"} | kept
        assert config["original_max_position_embeddings"] == 32
    else:
        scaling = dict(config["rope_scaling"])
        assert scaling == {field: value for field, value in whole.items() if field != "rope_theta"}


@torch.no_grad()
def test_an_older_reader_computes_the_same_logits(exported):
    _, model, directory = exported
    older = os.environ.get(OLDER)
    if older is None:
        pytest.skip(f"{OLDER} names no directory with transformers 4.57")
    done = subprocess.run(
        [sys.executable, "-c", READ, str(directory)],
        env=os.environ | {"PYTHONPATH": older},
        capture_output=True,
        text=True,
        check=True,
    )
    version, logits = done.stdout.strip().splitlines()[-2:]
    assert version.startswith("4.57")
    expected = model(input_ids=TOKENS_BT).logits.flatten()
    torch.testing.assert_close(torch.tensor(json.loads(logits)), expected, rtol=1e-5, atol=1e-5)


def by_definition(directory, tokens_BT):
    """Logits of a Llama in float64, from its definition, with the fields that transformers 4 reads."""
    config = json.loads((directory / "config.json").read_text())
    w = {name: tensor.double() for name, tensor in load_file(directory / "model.safetensors").items()}
    heads, kv, width = (config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    time = tokens_BT.shape[1]
    frequency = config["rope_theta"] ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(time, dtype=torch.float64)[:, None] * frequency[None]
    cos, sin = torch.cat([angle, angle], 1).cos(), torch.cat([angle, angle], 1).sin()

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * weight

    def rotated(x):
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    x = w["model.embed_tokens.weight"][tokens_BT]
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        h = norm(x, w[p + "input_layernorm.weight"])
        q, k, v = (
            (h @ w[f"{p}self_attn.{n}_proj.weight"].T).unflatten(-1, (count, width)).transpose(1, 2)
            for n, count in (("q", heads), ("k", kv), ("v", kv))
        )
        k, v = (part.repeat_interleave(heads // kv, 1) for part in (rotated(k), v))
        scores = rotated(q) @ k.transpose(-1, -2) / math.sqrt(width)
        scores = scores.masked_fill(torch.ones(time, time).triu(1).bool(), -math.inf).softmax(-1)
        x = x + (scores @ v).transpose(1, 2).flatten(2) @ w[p + "self_attn.o_proj.weight"].T
        h = norm(x, w[p + "post_attention_layernorm.weight"])
        gate = torch.nn.functional.silu(h @ w[p + "mlp.gate_proj.weight"].T)
        x = x + (gate * (h @ w[p + "mlp.up_proj.weight"].T)) @ w[p + "mlp.down_proj.weight"].T
    return norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


@torch.no_grad()
def test_logits_by_definition_with_the_theta_of_older_readers(store, tmp_path):
    model = hub.build(find_shape("nano-50k"), VOCAB, CONTEXT, seed=3).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3.0)
    hub.save(model, tmp_path / "model", store)
    expected = by_definition(tmp_path / "model", TOKENS_BT)
    torch.testing.assert_close(model(input_ids=TOKENS_BT).logits.double(), expected, rtol=1e-4, atol=1e-4)
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_theta": 10000.0}))
    assert (
        by_definition(tmp_path / "model", TOKENS_BT) - expected
    ).abs().max() > 0.1  # what went wrong before


def test_neither_old_fields_nor_special_ids_change_the_fingerprint(exported, tmp_path):
    name, model, directory = exported
    plain = tmp_path / "plain"
    model.save_pretrained(plain)  # as transformers alone writes it
    assert weights_fingerprint(plain) == weights_fingerprint(directory)
    if name == "nano":
        (directory / "checksums.json").unlink()
        path = directory / "config.json"
        path.write_text(
            json.dumps(
                json.loads(path.read_text())
                | {"rope_parameters": {"rope_theta": 1.0, "rope_type": "default"}}
            )
        )
        assert weights_fingerprint(plain) != weights_fingerprint(directory)


def test_special_ids_are_the_tokenizers(exported):
    _, _, directory = exported
    config = json.loads((directory / "config.json").read_text())
    generation = json.loads((directory / "generation_config.json").read_text())
    assert config["eos_token_id"] == generation["eos_token_id"] == generation["pad_token_id"] == 0
    assert config["pad_token_id"] is None  # or whoever trains further would freeze the end of text
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0
    assert len(tokenizer) == VOCAB
    assert tokenizer.model_max_length == config["max_position_embeddings"]


def test_a_model_of_pictures_and_text_keeps_its_logits_and_both_spellings(store, tmp_path):
    text = SMALL | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14},
                          image_token_index=299, boi_token_index=298, eoi_token_index=297)  # fmt: skip
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "plain")
    assert hub.save(hub.load(tmp_path / "plain"), tmp_path / "model", store) == 0.0
    written = json.loads((tmp_path / "model" / "config.json").read_text())["text_config"]
    assert written["rope_theta"] == written["rope_parameters"]["full_attention"]["rope_theta"]
    hub.load(tmp_path / "plain").save_pretrained(tmp_path / "again")
    assert weights_fingerprint(tmp_path / "again") == weights_fingerprint(tmp_path / "model")


class _Doubling(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


def test_a_directory_that_computes_something_else_is_refused(store, tmp_path):
    config = find_shape("nano-50k").config(VOCAB, CONTEXT)
    with pytest.raises(UserError, match=r"model: what was written computes other logits .* in neither"):
        hub.save(_Doubling(config), tmp_path / "model", store)
    lying = LlamaForCausalLM(config)
    lying.config.rms_norm_eps = 0.5  # its layers have kept the one they were made with
    with pytest.raises(UserError, match=r"model: what was written computes other logits"):
        hub.save(lying, tmp_path / "model", store)
    broken = LlamaForCausalLM(config)
    with torch.no_grad():
        broken.model.norm.weight[3] = math.inf
    with pytest.raises(
        UserError, match=r"model \(as it would be written\): model\.norm\.weight holds numbers"
    ):
        hub.save(broken, tmp_path / "model", store)
    assert not list(tmp_path.iterdir())


def test_the_cause_of_a_difference_is_named():
    model, again = (
        hub.build(find_shape("nano-50k"), VOCAB, CONTEXT, 1),
        hub.build(find_shape("nano-50k"), VOCAB, CONTEXT, 1),
    )
    assert hub._cause(model, again).startswith("weights and config are equal")
    again.config.hidden_act = "gelu"
    assert hub._cause(model, again) == "hidden_act is 'silu' in the model and 'gelu' in config.json"


def test_a_weight_that_is_another_is_named_though_the_logits_are_nearly_the_same(
    store, tmp_path, monkeypatch
):
    model = hub.build(find_shape("nano-50k"), VOCAB, CONTEXT, 1)
    save = LlamaForCausalLM.save_pretrained

    def save_another(self, *arguments, **keywords):
        other = copy.deepcopy(self)
        with torch.no_grad():
            other.model.norm.weight[3] = other.model.norm.weight[3].nextafter(torch.tensor(2.0))
        save(other, *arguments, **keywords)

    monkeypatch.setattr(type(model), "save_pretrained", save_another)
    with pytest.raises(UserError, match=r"not the model in memory: model\.norm\.weight has changed"):
        hub.save(model, tmp_path / "model", store)
    assert not list(tmp_path.iterdir())


def test_a_trained_run_generates_to_the_end_of_a_document_and_stops(make_config, tmp_path):
    words = ("one", "two", "three", "four", "five", "six")
    lines = [json.dumps({"text": f"{a} {b} {c}."}) for a in words for b in words for c in words]
    (tmp_path / "short.jsonl").write_text("\n".join(lines))
    config = StoreConfig(
        name="short",
        sources=({"kind": "files", "paths": (str(tmp_path / "short.jsonl"),)},),
        tokenizer=TokenizerConfig(vocab_size=280),
        validation=0.1,
        test=0.1,
    )
    short = build_store(config, tmp_path)
    done = run(make_config(data={"store": str(short), "sequence_length": 64}, tokens=150 * 512,
                           global_batch_tokens=512))  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(done.model)
    tokenizer = AutoTokenizer.from_pretrained(done.model)
    ids = tokenizer("one", return_tensors="pt")
    written = model.generate(**ids, do_sample=False, max_new_tokens=60)[0].tolist()
    assert written[-1] == tokenizer.eos_token_id
    assert len(written) < 30
    batch = tokenizer(["one", "two three four"], padding=True, return_tensors="pt")
    assert batch["attention_mask"].sum() < batch["attention_mask"].numel()
    assert done.state()["export"] == {"largest_logit_difference": 0.0}


@pytest.fixture
def chatting(store, tmp_path):
    """A model that chats: the store's tokenizer with added tokens, a template, and a generation config."""
    model = hub.build(find_shape("nano-50k"), 320, CONTEXT, seed=1)
    directory = tmp_path / "chatting"
    hub.save(model, directory, store)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens({"bos_token": "<bos>", "pad_token": "<pad>"})
    tokenizer.add_tokens(["<|user|>", "<|assistant|>"], special_tokens=True)
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(directory)
    generation = {"eos_token_id": [0, 303], "temperature": 0.6, "top_p": 0.9, "do_sample": False}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    (directory / "checksums.json").unlink()
    return directory


def test_a_start_models_tokenizer_template_and_generation_are_kept(chatting, make_config, tmp_path):
    first = run(make_config(model={"path": str(chatting)}, optim={"lr": 1e-3}))
    second = run(make_config(model={"run": first.id}, optim={"lr": 1e-3}, seed=44))
    words = [{"role": "user", "content": "hello"}]
    expected = AutoTokenizer.from_pretrained(chatting)
    for done in (first, second):
        found = AutoTokenizer.from_pretrained(done.model)
        assert found.get_vocab() == expected.get_vocab()
        assert found.chat_template == expected.chat_template
        assert found.apply_chat_template(words, tokenize=False) == "<|user|>hello"
        assert (found.bos_token, found.pad_token, found.eos_token) == ("<bos>", "<pad>", "<|endoftext|>")
        generation = json.loads((done.model / "generation_config.json").read_text())
        assert generation["eos_token_id"] == [0, 303]
        assert (generation["temperature"], generation["top_p"]) == (0.6, 0.9)
        assert (generation["bos_token_id"], generation["pad_token_id"]) == (300, 301)
        assert generation["suppress_tokens"] == [*range(304, 320)]  # no tokens, so nobody trained them
        notes = json.loads((done.path / "provenance.json").read_text())["notes"]
        (note,) = (note for note in notes if "its tokenizer has 304 ids" in note)
        assert " 300: the others" in note
        assert "no gradient but weight decay" in note
        config = json.loads((done.model / "config.json").read_text())
        assert (config["eos_token_id"], config["bos_token_id"], config["pad_token_id"]) == (0, 300, 301)
        assert (found.bos_token_id, found.pad_token_id) == (300, 301)


def test_a_store_keeps_what_its_tokenizer_begins_and_pads_with(chatting, make_config, tmp_path):
    (tmp_path / "text.txt").write_text("The state of the union is strong. " * 400)
    config = StoreConfig(
        name="text",
        sources=({"kind": "files", "paths": (str(tmp_path / "text.txt"),)},),
        tokenizer=TokenizerConfig(path=chatting),
        validation=0.0,
        test=0.0,
    )
    built = build_store(config, tmp_path)
    done = run(make_config(data={"store": str(built), "sequence_length": 32}, tokens=512))
    found = AutoTokenizer.from_pretrained(done.model)
    assert (found.bos_token_id, found.pad_token_id, found.eos_token_id) == (300, 301, 0)
    assert json.loads((done.model / "config.json").read_text())["bos_token_id"] == 300


def test_a_tokenizer_that_cuts_otherwise_is_not_taken_over(chatting, make_config):
    path = chatting / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    path.write_text(json.dumps(tokenizer | {"normalizer": {"type": "Lowercase"}}))
    done = run(make_config(model={"path": str(chatting)}, optim={"lr": 1e-3}))
    assert json.loads((done.model / "tokenizer.json").read_text())["normalizer"] is None
    notes = json.loads((done.path / "provenance.json").read_text())["notes"]
    assert "other normalizer" in notes[0]


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_model_chats_as_it_was_trained_to_and_not_as_the_one_it_began_with(store, tmp_path, place):
    trained, own = "{{ bos_token + messages[0].content }}!", "{{ messages[0].content }}?"
    chats, base = tmp_path / "chats", tmp_path / "base"
    shutil.copytree(store, chats)
    settings = json.loads((store / "tokenizer_config.json").read_text())
    named = {"chat_template": trained, "bos_token": "<|endoftext|>"}
    (chats / "tokenizer_config.json").write_text(json.dumps(settings | named))
    hub.save(hub.build(find_shape("nano-50k"), VOCAB, CONTEXT, seed=1), base, store)
    text = own if place.endswith("jinja") else json.dumps(settings | {"chat_template": own})
    (base / place).write_text(text)
    for directory in (chats, base):
        (directory / "checksums.json").unlink()
    for data, said in ((store, "hello?"), (chats, "<|endoftext|>hello!")):  # the first has no conversations
        hub.save(hub.load(base), tmp_path / "model", data, Base(base, tokenizer=True))
        found = AutoTokenizer.from_pretrained(tmp_path / "model")
        assert found.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == said


def test_a_model_ends_as_the_texts_that_it_was_trained_on(chatting, tmp_path):
    trained = tmp_path / "trained"
    shutil.copytree(chatting, trained)
    settings = json.loads((chatting / "tokenizer_config.json").read_text())
    (trained / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|user|>"}))
    older = {"eos_token": "<|assistant|>", "pad_token": "<unknown>", "mask_token": "<pad>"}
    (chatting / "special_tokens_map.json").write_text(json.dumps(older))
    hub.save(hub.load(chatting), tmp_path / "model", trained, Base(chatting, tokenizer=True))
    found = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert (found.eos_token_id, found.pad_token_id, found.mask_token_id) == (302, 301, 301)
    assert len(found) == 304
    assert json.loads((tmp_path / "model" / "config.json").read_text())["eos_token_id"] == 302
    generation = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [0, 303, 302]


def test_what_transformers_5_wrote_of_a_tokenizer_is_spelled_for_version_4_too(chatting, tmp_path):
    AutoTokenizer.from_pretrained(chatting, extra_special_tokens=["<|user|>"]).save_pretrained(chatting)
    written = json.loads((chatting / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "TokenizersBackend"
    assert written["extra_special_tokens"] == ["<|user|>"]
    hub.save(hub.load(chatting), tmp_path / "model", chatting, Base(chatting, tokenizer=True))
    settings = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"  # version 4 knows no other for a file
    assert settings["additional_special_tokens"] == ["<|user|>"]  # and takes a dictionary for the newer name
    assert "extra_special_tokens" not in settings
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]  # version 4 adds token_type_ids
    found, expected = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "model", chatting))
    assert found.all_special_tokens == expected.all_special_tokens


@pytest.mark.parametrize(
    ("begin", "settings", "written"),
    [
        ([], {}, {}),
        ([], {"tokenizer_class": "LlamaTokenizer"}, {"add_bos_token": False}),  # which adds it by default
        ([], {"add_bos_token": True, "add_eos_token": True}, {"add_bos_token": False}),
        ([300], {"add_bos_token": False, "add_eos_token": True}, {"add_bos_token": True}),
        ([300], {"tokenizer_class": "LlamaTokenizer"}, {}),
        ([301], {"add_bos_token": True}, {}),  # another token than the one that it would add
        ([300, 301], {"add_bos_token": True}, {}),
    ],
)
def test_what_begins_a_text_is_no_other_by_the_settings_than_by_the_tokenizer(
    chatting, tmp_path, begin, settings, written
):
    path = chatting / "tokenizer.json"
    names = {300: "<bos>", 301: "<pad>"}
    template = processors.TemplateProcessing(
        single=[*(names[index] for index in begin), "$A"],
        special_tokens=[(names[index], index) for index in begin],
    )
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.post_processor = template
    tokenizer.save(str(path))
    file = chatting / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    hub.save(hub.load(chatting), tmp_path / "model", chatting, Base(chatting, tokenizer=True))
    found = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    assert {name: found[name] for name in ("add_bos_token", "add_eos_token") if name in found} == written
    ids = AutoTokenizer.from_pretrained(tmp_path / "model")("weak")["input_ids"]
    assert ids[: len(begin)] == begin
    assert ids[len(begin) :] == tokenizer.encode("weak", add_special_tokens=False).ids


def test_a_special_token_that_the_tokenizer_lacks_gets_no_id_beyond_the_model(store, tmp_path):
    base = tmp_path / "base"
    hub.save(hub.build(find_shape("nano-50k"), VOCAB, CONTEXT, seed=1), base, store)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(
        json.dumps(settings | {"pad_token": "[PAD]", "bos_token": "<s>"})
    )
    (base / "checksums.json").unlink()
    hub.save(hub.load(base), tmp_path / "model", store, Base(base, tokenizer=True))
    found = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert len(found) == VOCAB
    assert (found.pad_token_id, found.bos_token_id) == (0, None)


def test_a_space_in_front_of_every_text_is_there_for_older_readers_too(store, tmp_path):
    spaced = tmp_path / "spaced"
    shutil.copytree(store, spaced)
    tokenizer = json.loads((store / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["add_prefix_space"] = True
    (spaced / "tokenizer.json").write_text(json.dumps(tokenizer))
    (spaced / "checksums.json").unlink()
    for source, is_set in ((store, None), (spaced, True)):
        model = hub.build(find_shape("nano-50k"), VOCAB, CONTEXT, seed=1)
        hub.save(model, tmp_path / "model", source)
        settings = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
        assert settings.get("add_prefix_space") is is_set


def test_the_card_is_one_that_the_hub_reads_and_lists_scores(make_config, store, other_store):
    evaluation = {
        "domains": [{"name": "scripture", "store": str(other_store)}],
        "max_documents": 3,
        "max_tokens": 60,
    }
    done = run(
        make_config(eval=evaluation, teacher={"kind": "unigram"}, objective={"alpha": 0.3}, name="taught")
    )
    card = ModelCard.load(done.model / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.license == "other"
    assert card.data.license_name == "not-chosen"
    assert card.data.tags == ["tutelage", "distillation"]
    assert card.data.pipeline_tag == "text-generation"
    body = card.text
    for fact in (
        done.id,
        "unigram control",
        "value 0.3",
        "3,072 in 12 steps",
        "public domain",
        "tutelage 0.1.0",
    ):
        assert fact in body
    rows = [json.loads(line) for line in done.scores.read_text().splitlines()]
    (value,) = {row["value"] for row in rows if row["metric"] == "bits_per_byte" and row["split"] == "test"}
    assert f"| scripture | test | bits_per_byte | {value:.4g} |" in body
    assert "Not scored yet" not in body


def test_scores_replace_those_that_were_there_and_leave_the_rest():
    text = "# m\n\n## Scores\n\nNot scored yet.\n"
    row = {"domain": "a|b", "split": "test", "metric": "ce", "value": 1.25, "stderr": math.nan}
    once = with_scores(text, [row])
    assert once.startswith("# m\n\n## Scores\n")
    assert "| a\\|b | test | ce | 1.25 |  |" in once
    assert with_scores(once, [row]) == once
    assert with_scores("my own card\n", [row]) == "my own card\n"


def test_rotary_positions_per_kind_of_layer_get_older_fields_only_where_an_older_reader_knows_them():
    kinds = {"full_attention": {"rope_theta": 5e5}, "sliding_attention": {"rope_theta": 1e4}}
    gemma, mellum = (
        for_older_readers({"model_type": kind, "rope_parameters": kinds})
        for kind in ("gemma3_text", "mellum")
    )
    assert (gemma["rope_theta"], gemma["rope_local_base_freq"]) == (5e5, 1e4)
    assert mellum == {"model_type": "mellum", "rope_parameters": kinds}


def test_a_card_shows_markup_of_data_as_text():
    evil = "</td><script>x</script>[y](javascript:1)|`z`"
    text = card("m", {}, "s", {"a": evil}, [(evil, evil, "1")], "name: |\n  ```\n  <script>\n  ````\n")
    page = MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(text.split("---\n\n", 1)[1])
    assert "<script" not in page
    assert "<a href" not in page
    assert page.count("<pre>") == 1
