import json
import pickle
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    GraniteConfig,
    LlamaForCausalLM,
    OPTConfig,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging

from tutelage.errors import UserError
from tutelage.models.directory import weights_fingerprint
from tutelage.models.hub import (
    body_and_head,
    build,
    check_logits,
    errors_of_loading,
    head_logits,
    load,
    logit_transform,
    outline,
    save,
)
from tutelage.models.shapes import find_shape
from tutelage.types import PLAIN, LogitTransform, transformed

VOCAB, CONTEXT = 300, 32
TOKENS_BT = torch.arange(2 * CONTEXT).reshape(2, CONTEXT) % VOCAB
SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """The tokenizer files that a token store holds."""
    path = tmp_path_factory.mktemp("store")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["a weak teacher may teach a strong student " * 9], vocab_size=VOCAB)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return path


@pytest.fixture(scope="module")
def model():
    return build(find_shape("nano-50k"), VOCAB, CONTEXT, seed=7)


@pytest.fixture
def saved(model, store, tmp_path):
    save(model, tmp_path / "model", store)
    (tmp_path / "model" / "checksums.json").unlink(missing_ok=True)  # tests change it on purpose
    return tmp_path / "model"


def _from_config(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = build(find_shape("nano-50k"), VOCAB, CONTEXT, seed=7).state_dict()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = build(find_shape("nano-50k"), VOCAB, CONTEXT, seed=7).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    other = build(find_shape("nano-50k"), VOCAB, CONTEXT, seed=8).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_fresh_weights_are_float32_with_the_usual_spread(model):
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.config._attn_implementation == "sdpa"


def test_a_meta_model_has_shapes_only():
    model = build(find_shape("llama-8b"), 128_256, 8192, seed=0, device="meta")
    assert all(weight.is_meta for weight in model.parameters())


def test_a_reloaded_model_gives_the_same_logits_bit_for_bit(model, saved):
    again = load(saved)
    assert not again.training
    assert again.config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert torch.equal(model.eval()(TOKENS_BT).logits, again(TOKENS_BT).logits)


def test_load_can_change_the_dtype(saved):
    assert load(str(saved), dtype=torch.bfloat16).lm_head.weight.dtype == torch.bfloat16
    assert load(str(saved)).lm_head.weight.dtype == torch.float32


def test_a_saved_directory_is_a_hugging_face_directory(saved, store):
    names = {path.name for path in saved.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    tokenizer = AutoTokenizer.from_pretrained(saved)
    text = "a strong student may teach a teacher"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert AutoModelForCausalLM.from_pretrained(saved).config.vocab_size == VOCAB


def test_save_replaces_an_older_directory(saved, store):
    (saved / "stale").write_text("old")
    save(build(find_shape("nano-50k"), VOCAB, CONTEXT, seed=8), saved, store)
    assert not (saved / "stale").exists()
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_save_and_load_print_nothing(model, store, tmp_path, capfd):
    save(model, tmp_path / "model", store)
    load(tmp_path / "model")
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled()


def test_save_needs_the_tokenizer(model, store, tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        save(model, tmp_path / "model", tmp_path)
    shutil.copy(store / "tokenizer.json", tmp_path)
    with pytest.raises(UserError, match=r"no tokenizer_config\.json"):
        save(model, tmp_path / "model", tmp_path)
    assert not (tmp_path / "model").exists()


def test_load_names_what_a_directory_lacks(saved, tmp_path):
    with pytest.raises(UserError, match="nowhere: no such directory"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="runs/x/model: no such directory"):
        load("runs/x/model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no config\.json"):
        load(tmp_path / "empty")
    (saved / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors, and no index of several"):
        load(saved)


def test_load_refuses_pickled_weights_and_says_how_to_convert(saved):
    (saved / "model.safetensors").unlink()
    (saved / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UserError, match=r"is a pickle.*use_safetensors=False\)\.save_pretrained"):
        load(saved)


def test_pickled_weights_beside_other_safetensors_are_not_read(model, saved):
    (saved / "model.safetensors").rename(saved / "other.safetensors")
    torch.save(model.state_dict(), saved / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle"):
        load(saved)


def test_load_refuses_damaged_weights(saved):
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(
        UserError, match=r"model\.safetensors: damaged: it has .* bytes, its header says"
    ) as caught:
        load(saved)
    assert "\n" not in str(caught.value)


def test_load_refuses_missing_weights(saved):
    weights = load_file(saved / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 weight is missing, for example model\.layers\.1\.mlp\.up_proj"):
        load(saved)


@pytest.mark.parametrize("text", ['{"model_type": "nonsense"}', '{"model_type": "t5"}', "{}"])
def test_load_refuses_a_config_that_is_no_causal_model(saved, text):
    (saved / "config.json").write_text(text)
    with pytest.raises(UserError, match="cannot be loaded as a causal language model"):
        load(saved)


def test_a_download_that_is_cut_is_told_in_the_words_of_what_cut_it():
    """Transformers asks to look for a directory of the same name."""
    told = pytest.raises(UserError, match=r"^a/b: cannot be loaded .*: peer closed connection$")
    with told, errors_of_loading("a/b", None):
        raise OSError("Can't load the model for 'a/b'") from ConnectionError("peer closed connection")


def test_load_never_runs_a_directorys_own_code(saved):
    config = json.loads((saved / "config.json").read_text())
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (saved / "config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": auto}))
    (saved / "evil.py").write_text(f"open({str(saved / 'ran')!r}, 'w').close()")
    with pytest.raises(UserError, match="needs code of its own") as caught:
        load(saved)
    assert "trust_remote_code" not in str(caught.value)
    assert not (saved / "ran").exists()


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("value", ["evil/kernel", "evil/kernel@main:run", {"": "evil/kernel"}])
@pytest.mark.parametrize("section", [None, "text_config"])
def test_load_takes_no_kernel_from_the_hub(saved, field, value, section):
    """With the package `kernels` such a name would be downloaded and run, without asking."""
    config = json.loads((saved / "config.json").read_text())
    more = {field: value} if section is None else {section: {field: value}}
    (saved / "config.json").write_text(json.dumps(config | more))
    with pytest.raises(UserError, match=f"{field} = .*names code on the Hub"):
        load(saved)


@pytest.mark.parametrize(
    ("field", "value"), [("logit_scale", -1.0), ("logits_scaling", "a"), ("logits_soft_cap", [30.0])]
)
def test_a_factor_of_logits_that_is_none_is_named(saved, field, value):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(UserError, match=f"{re.escape(str(saved))}: config.json of a LlamaForCausalLM: "):
        load(saved)


def test_a_hub_name_that_cannot_be_had_is_one_line(monkeypatch):
    with pytest.raises(UserError, match="no spaces allowed: cannot be loaded"):
        load("no spaces allowed")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="model tutelage-tests/no-such-model: not on this machine") as caught:
        load("tutelage-tests/no-such-model")
    assert "\n" not in str(caught.value)


def test_an_outline_is_of_the_config_that_was_read_and_of_no_other_revision(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    settings = find_shape("nano-50k").config(VOCAB, CONTEXT).to_dict() | {"num_hidden_layers": 3}
    model = outline("tutelage-tests/no-such-model", settings)
    assert (len(model.model.layers), model.device.type) == (3, "meta")


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4),
        OPTConfig(vocab_size=VOCAB, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4),
        Gemma2Config(**SMALL, **HEADS, final_logit_softcapping=None),
        GraniteConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2),
        find_shape("nano-50k").config(VOCAB, CONTEXT),
        find_shape("qwen3-0.15b").config(VOCAB, CONTEXT),
    ],
    ids=lambda config: config.model_type,
)
def test_head_of_body_is_the_model(config):
    model = _from_config(config).eval()
    body, head = body_and_head(model)
    with torch.no_grad():
        hidden_BTD = body(input_ids=TOKENS_BT, use_cache=False).last_hidden_state
        assert torch.equal(head(hidden_BTD), model(input_ids=TOKENS_BT).logits)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (Gemma2Config(**SMALL, **HEADS), LogitTransform(1.0, 30.0)),
        (CohereConfig(**SMALL, num_attention_heads=4), LogitTransform(0.0625)),
        (GraniteConfig(**SMALL, num_attention_heads=4, logits_scaling=8.0), LogitTransform(0.125)),
    ],
    ids=["gemma2", "cohere", "granite"],
)
def test_what_families_do_after_the_head_is_done_here_too(config, expected):
    model = _from_config(config).eval()
    assert logit_transform(model) == expected
    body, head = body_and_head(model)
    with torch.no_grad():
        hidden_BTD = 100 * body(input_ids=TOKENS_BT, use_cache=False).last_hidden_state
        ours = transformed(head(hidden_BTD), expected)
        assert ours.abs().max() > 1  # far enough from zero for a softcap to bend
        model.get_decoder().forward = lambda **_: BaseModelOutputWithPast(last_hidden_state=hidden_BTD)
        torch.testing.assert_close(ours, model(input_ids=TOKENS_BT).logits)


class Adapted(torch.nn.Linear):
    """A head with an adapter beside its weight, as LoRA makes them."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features, bias=False)
        self.weight = base.weight
        self.lora = torch.nn.Linear(base.in_features, base.out_features, bias=False)

    def forward(self, x):
        return super().forward(x) + self.lora(x)


def test_a_head_that_is_more_than_a_matrix_and_a_bias_is_refused():
    model = _from_config(GPTJConfig(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=2, rotary_dim=8))
    body, head = body_and_head(model)
    with torch.no_grad():
        head.bias.normal_()
        hidden_ND = body(input_ids=TOKENS_BT).last_hidden_state.flatten(0, 1)
        logits_NV = model(input_ids=TOKENS_BT).logits.flatten(0, 1)
        torch.testing.assert_close(head_logits(head, hidden_ND, PLAIN), logits_NV)
        torch.testing.assert_close(head_logits(head, hidden_ND, PLAIN, VOCAB - 3), logits_NV[:, : VOCAB - 3])
    model.lm_head = Adapted(model.lm_head)
    with pytest.raises(UserError, match="GPTJForCausalLM: it cannot teach or learn here: head"):
        body_and_head(model)
    with pytest.raises(UserError, match="some/path: GPTJForCausalLM"):
        check_logits(model, "some/path")


class _Doubling(LlamaForCausalLM):
    """A model that does something to its logits and has no config field that says so."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


def test_load_finds_out_by_trying_when_no_field_says_so(model):
    check_logits(model, "plain")
    with pytest.raises(UserError, match="odd: _Doubling computes its logits in a way not known here"):
        check_logits(_Doubling(model.config), "odd")


def test_the_fingerprint_follows_weights_and_shape_and_nothing_else(model, saved, store, tmp_path):
    first = weights_fingerprint(saved)
    assert len(first) == 64
    save(load(saved), tmp_path / "again", store)
    assert weights_fingerprint(tmp_path / "again") == first
    (saved / "tokenizer.json").write_text("{}")
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(
        json.dumps(config | {"transformers_version": "9.9", "use_cache": True})
    )
    assert weights_fingerprint(saved) == first
    (saved / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert weights_fingerprint(saved) != first


def test_the_fingerprint_sees_one_changed_weight(saved):
    first = weights_fingerprint(saved)
    weights = load_file(saved / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-6
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    assert weights_fingerprint(saved) != first


def test_the_fingerprint_of_no_model_is_refused(saved, tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        weights_fingerprint(tmp_path)
    (saved / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        weights_fingerprint(saved)


def test_an_encoder_decoder_is_no_causal_model(tmp_path):
    config = T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    with pytest.raises(
        UserError, match=r"t5/config\.json: is_encoder_decoder = true: it is no causal language model"
    ):
        load(tmp_path / "t5")
