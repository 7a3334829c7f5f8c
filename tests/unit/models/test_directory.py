"""Malformed model directories: one line with the file and the field, quickly."""

import json
import math
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from tutelage.errors import UserError
from tutelage.models import slices
from tutelage.models.directory import identify, weights_fingerprint
from tutelage.models.hub import build, load
from tutelage.models.shapes import find_shape

VOCAB, CONTEXT = 300, 32


@pytest.fixture
def directory(tmp_path):
    build(find_shape("nano-50k"), VOCAB, CONTEXT, seed=7).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refusal(directory):
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        load(directory)
    assert time.monotonic() - start < 20
    message = str(caught.value)
    assert "\n" not in message
    assert "model" in message
    return message


def change(directory, **fields):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_position_embeddings", 0),
        ("max_position_embeddings", "long"),
        ("num_hidden_layers", -1),
        ("num_hidden_layers", 10**9),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 2.5),
        ("vocab_size", True),
        ("hidden_size", {"a": 1}),
        ("intermediate_size", 0),
        ("head_dim", 0),
    ],
)
def test_a_size_that_is_none_is_named(directory, field, value):
    change(directory, **{field: value})
    assert f"config.json: {field} = " in refusal(directory)
    with pytest.raises(UserError, match=field):
        weights_fingerprint(directory)
    with pytest.raises(UserError, match=field):
        identify(str(directory))


@pytest.mark.parametrize(
    "fields",
    [
        {"vocab_size": 10**9},
        {"hidden_size": 49},
        {"num_attention_heads": 7},
        {"rope_parameters": "fast"},
        {"rope_parameters": {"rope_type": "new"}},
        {"hidden_act": "sillu"},
        {"dtype": "float12"},
        {"layer_types": ["what"]},
        {"rms_norm_eps": "small"},
        {"model_type": "llama9"},
        {"model_type": 3},
        {"architectures": 3},
        {"max_position_embeddings": 10**18, "model_type": "gpt2"},
    ],
    ids=str,
)
def test_no_config_ends_in_a_traceback(directory, fields):
    change(directory, **fields)
    try:
        load(directory)
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017 - some fields are ignored, and that is fine


def test_a_run_or_an_adapter_in_the_place_of_a_model_is_told_what_it_is(directory):
    assert refusal(directory.parent).endswith(f"; it is a run, whose model is {directory}")
    (directory / "config.json").rename(directory / "adapter_config.json")
    assert "adapter_config.json: it is an adapter: merge it into its model" in refusal(directory)


def test_an_adapter_beside_a_model_is_refused(directory):
    """It would be added to the weights on one process where PEFT is installed, and nowhere else."""
    (directory / "adapter_config.json").write_text("{}")
    assert "adapter_config.json: it is an adapter: merge it into its model" in refusal(directory)


def test_files_beside_the_weights_are_no_weights(directory):
    weights = load_file(directory / "model.safetensors")
    save_file({name: 2 * weight for name, weight in weights.items()}, directory / "model_ema.safetensors")
    found, expected = slices.describe(directory).load(torch.device("cpu")), load(directory)
    for name, weight in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight), name


@pytest.mark.parametrize("section", [None, "text_config"])
def test_quantized_weights_are_refused(directory, section):
    quantized = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    change(directory, **(quantized if section is None else {section: quantized}))
    assert "quantization_config.quant_method = 'gptq'" in refusal(directory)


@pytest.mark.parametrize(
    ("text", "reason"), [("", "not valid JSON"), ("[1]", "not a JSON object but a list")]
)
def test_a_config_must_be_an_object(directory, text, reason):
    (directory / "config.json").write_text(text)
    assert reason in refusal(directory)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        b"\xff" * 64,
        (9).to_bytes(8, "little") + b"not json!",
        (2).to_bytes(8, "little") + b"[]",
    ],
)
def test_a_file_that_is_no_safetensors_is_damaged(directory, content):
    (directory / "model.safetensors").write_bytes(content)
    assert "model.safetensors: damaged" in refusal(directory)


def test_a_file_that_was_cut_or_grew_is_damaged(directory):
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    for content in (whole[:-1], whole[: len(whole) // 2], whole + b"\0"):
        path.write_bytes(content)
        assert "its header says" in refusal(directory)


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ({"weight_map": {"a": "../model.safetensors"}}, "must be a file in the same directory"),
        ({"weight_map": {"a": "/etc/passwd"}}, "must be a file in the same directory"),
        ({"weight_map": {"a": "gone.safetensors"}}, "there is no such file"),
        ({"weight_map": {"a": "part.safetensors"}}, "metadata is missing"),
        ({"weight_map": {}}, "weight_map is missing or empty"),
        ({}, "weight_map is missing or empty"),
        ([], "not a JSON object"),
    ],
)
def test_an_index_is_checked(directory, index, reason):
    (directory / "model.safetensors").rename(directory / "part.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert reason in refusal(directory)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_named(directory, value):
    weights = load_file(directory / "model.safetensors")
    weights["model.embed_tokens.weight"][17, 3] = value  # a rare token
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    assert "model.embed_tokens.weight holds numbers that are not finite" in refusal(directory)


def test_more_layers_than_the_config_says_are_not_dropped(directory):
    change(directory, num_hidden_layers=1)
    assert "config.json speaks of fewer layers than there are weights" in refusal(directory)


WAYS = [load, lambda path: slices.describe(path).load(torch.device("cpu"))]
"""By one process, and as each of several does."""


def rewritten(directory, **weights):
    """The directory with more weights, and changed ones."""
    path = directory / "model.safetensors"
    more = {name.replace("__", "."): weight for name, weight in weights.items()}
    save_file(load_file(path) | more, path, metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.q_proj.bias",
        "lm_head.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "layers.0.self_attn.q_norm.weight",
        "model.layers.0.mlp.up_proj.weight_scale_inv",
        "model.layers.0.self_attn.q_proj.lora_A.default.weight",
    ],
)
def test_weights_that_the_config_has_no_place_for_are_not_dropped(directory, way, name):
    """Transformers says so in a log alone, and computes something else."""
    rewritten(directory, **{name: torch.ones(48)})
    with pytest.raises(
        UserError, match=f"without {name}, and 1 of the weights in its files would be left out"
    ):
        way(directory)


@pytest.mark.parametrize("way", WAYS)
def test_what_nothing_is_computed_with_may_be_left_out(directory, way):
    buffers = ("masked_bias", "rotary_emb.inv_freq")
    names = (
        "v_head.weight",
        "vision.layers.0.weight",
        *[f"model.layers.0.self_attn.{one}" for one in buffers],
    )
    assert way(rewritten(directory, **{name: torch.ones(1) for name in names})).num_parameters() > 0


@pytest.mark.parametrize("way", WAYS)
def test_a_head_beside_the_embedding_that_it_is_said_to_be(directory, way):
    """Transformers 5 takes it, version 4 the embedding: a model trained from it was another to each."""
    change(directory, tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"config\.json says that .* are one weight \(tie_word_embeddings\)"):
        way(directory)
    embedding = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    model = way(rewritten(directory, lm_head__weight=embedding))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_other_shapes_than_the_config_says(directory):
    change(directory, intermediate_size=121)
    assert "weights in its files have other shapes than the sizes in config.json" in refusal(directory)


def test_a_table_of_positions_larger_than_the_weights(tmp_path):
    config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    change(tmp_path / "model", n_positions=10**6)
    assert "cannot be loaded" in refusal(tmp_path / "model")


@pytest.mark.parametrize("way", WAYS)
def test_a_config_that_asks_for_tuples_changes_nothing(directory, way):
    change(directory, return_dict=False)
    assert way(directory)(torch.arange(4).unsqueeze(0)).logits.shape == (1, 4, VOCAB)
