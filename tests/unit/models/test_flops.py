import pytest
import tiny_families
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from tutelage.models.flops import (
    Parameters,
    forward_flops,
    kd_cost_factor,
    model_forward_flops,
    parameters,
    shape_of,
    training_flops,
)
from tutelage.models.hub import build
from tutelage.models.shapes import LADDER, find_shape, read_shape

VOCAB = 512


@pytest.mark.parametrize("shape", LADDER.values(), ids=lambda shape: shape.name)
def test_the_formula_counts_what_the_real_module_holds(shape):
    vocab_size = shape.vocab_size or VOCAB
    model = build(shape, vocab_size, context=128, seed=0, device="meta")
    total = sum(weight.numel() for weight in model.parameters())
    embeddings = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    outside = total - sum(weight.numel() for weight in set(embeddings))
    assert parameters(shape, vocab_size) == Parameters(total, outside)
    assert forward_flops(shape, vocab_size, 128) == model_forward_flops(model, 128)


@pytest.mark.parametrize(
    ("name", "non_embedding", "total"),
    [
        ("llama-0.7b", 428e6, 0.69e9),
        ("llama-1.7b", 1.14e9, 1.67e9),
        ("llama-3.8b", 2.99e9, 3.78e9),
        ("llama-8b", 6.98e9, 8.03e9),
        ("qwen3-0.15b", 63e6, 0.14e9),
        ("qwen3-0.3b", 165e6, 0.28e9),
        ("qwen3-0.6b", 440e6, 0.60e9),
        ("qwen3-1b", 771e6, 1.00e9),
    ],
)
def test_the_papers_sizes(name, non_embedding, total):
    counted = parameters(find_shape(name), find_shape(name).vocab_size)
    assert counted.non_embedding == pytest.approx(non_embedding, rel=0.005)
    assert counted.total == pytest.approx(total, rel=0.01)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("nano-50k", 50e3),
        ("nano-150k", 150e3),
        ("nano-350k", 350e3),
        ("nano-700k", 700e3),
        ("nano-2m", 2e6),
        ("nano-6m", 6e6),
        ("nano-20m", 20e6),
    ],
)
def test_tiny_shapes_have_the_size_in_their_name(name, size):
    assert parameters(find_shape(name), VOCAB).non_embedding == pytest.approx(size, rel=0.15)


@pytest.mark.parametrize("name", ["nano-50k", "nano-350k", "qwen3-0.15b"])
def test_forward_flops_against_torchs_own_counter(name):
    shape, context = find_shape(name), 64
    model = build(shape, VOCAB, context, seed=0)
    model.set_attn_implementation("eager")  # torch does not count its fused CPU attention
    tokens_BT = torch.zeros(2, context, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=tokens_BT)
    counted = counter.get_total_flops() / tokens_BT.numel()
    # torch counts all keys of a causal query, the formula half of them: twice the context makes up for it.
    assert forward_flops(shape, VOCAB, 2 * context) == pytest.approx(counted, rel=2e-3)
    assert forward_flops(shape, VOCAB, context) < counted


def test_operations_of_other_models():
    config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    weights = 2 * (4 * 32 * 32 + 2 * 32 * 128) + VOCAB * 32  # positions are looked up
    assert model_forward_flops(GPT2LMHeadModel(config), 64) == 2 * weights + 2 * 64 * 32 * 2
    mamba = MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2))
    assert model_forward_flops(mamba, 64) == model_forward_flops(mamba, 128) > 2 * VOCAB * 32


def test_backward_costs_twice_forward():
    shape, context = find_shape("nano-50k"), 32
    model = build(shape, VOCAB, context, seed=0)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(2, context, dtype=torch.long)).logits.sum().backward()
    counted = counter.get_total_flops() / (2 * context)
    whole = training_flops(forward_flops(shape, VOCAB, 2 * context))
    assert whole == pytest.approx(counted, rel=0.01)
    assert whole == 3 * forward_flops(shape, VOCAB, 2 * context)


@pytest.mark.parametrize(
    ("teacher", "factor"),
    [("llama-0.7b", 1.17), ("llama-1.7b", 1.33), ("llama-3.8b", 1.74), ("llama-8b", 2.47)],
)
def test_the_papers_cost_of_an_online_teacher(teacher, factor):
    def forward(name):
        return forward_flops(find_shape(name), 128_256, 8192)

    assert kd_cost_factor(forward(teacher), forward("llama-1.7b")) == pytest.approx(factor, abs=0.005)


def test_parameters_stand_in_for_operations():
    n_teacher, n_student = 3_000_000, 1_000_000
    assert kd_cost_factor(n_teacher, n_student) == 2.0
    assert kd_cost_factor(0.0, n_student) == 1.0


MOE = (
    "mixtral",
    "qwen3_moe",
    "qwen2_moe",
    "deepseek_v2",
    "deepseek_v3",
    "granitemoe",
    "hunyuan_v1_moe",
    "glm4_moe",
    "gpt_oss",
    "jamba",
    "jetmoe",
    "lfm2_moe",
)
"""Experts alone, with shared ones beside them, with dense layers below, with heads of two widths, with
biases, with heads of their own, and in some layers of some, beside others that do not attend."""


def counted_forward(family, directory, shape):
    """A tiny model, and torch's own count of its forward pass over random tokens."""
    model = tiny_families.tiny_model(family, directory).eval()
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")  # an expert multiplies the tokens that are sent to it
    tokens_BT = torch.randint(10, tiny_families.VOCAB, shape, generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=tokens_BT, use_cache=False)
    return model, counter


@pytest.mark.parametrize("family", MOE)
def test_of_experts_those_count_that_a_token_is_sent_to(family, tmp_path):
    context = 64
    model, counter = counted_forward(family, tmp_path / "model", (2, context))
    counted = counter.get_total_flops() / (2 * context)
    model.config.sliding_window = None  # torch counts the keys outside too
    within = 3e-3 if family == "jamba" else 2e-3  # its convolution is counted at the padded positions too
    assert model_forward_flops(model, 2 * context) == pytest.approx(counted, rel=within)
    assert model_forward_flops(model, context) < counted
    every = 2 * sum(weight.numel() for weight in model.parameters() if weight.ndim > 2)
    assert every > 0.05 * counted  # experts weigh something here, and half of them are left out
    assert read_shape(model.config.to_dict(), family) is None


@pytest.mark.parametrize("family", ["nemotron_h", "qwen3_next", "falcon_h1", "bamba"])
def test_of_recurrent_layers_the_matrices_count_and_of_others_the_keys(family, tmp_path):
    """By torch's own count: products with weights, and those of two activations where a layer attends."""
    context = 16
    model, counter = counted_forward(family, tmp_path / "model", (8, context))
    kinds, counts = model.config.layer_types, counter.get_flop_counts()
    weights = sum(flops for kind, flops in counts["Global"].items() if kind is not torch.ops.aten.bmm)
    attending = [name for name in counts if name.endswith(".self_attn")]
    keys = sum(counts[name].get(torch.ops.aten.bmm, 0) for name in attending)
    counted = (weights + keys) / (8 * context)
    # a causal convolution is counted at the padded positions too
    assert model_forward_flops(model, 2 * context) == pytest.approx(counted, rel=0.015)
    grows = {kind for kind in kinds if kind in ("full_attention", "hybrid")}
    assert (model_forward_flops(model, 4 * context) > model_forward_flops(model, context)) == bool(grows)


@pytest.mark.parametrize("family", ["gemma4_text", "mimo_v2_flash", "deepseek_v4"])
def test_heads_have_the_width_of_their_layer(family, tmp_path):
    """By torch's own count: wider heads in full attention, values narrower than keys."""
    context = 16
    model, counter = counted_forward(family, tmp_path / "model", (8, context))
    counted = counter.get_total_flops() / (8 * context)
    model.config.sliding_window = 4 * context  # torch counts the keys outside too
    assert model_forward_flops(model, 2 * context) == pytest.approx(counted, rel=4e-3)


COUNTED = ("llama", "qwen2", "qwen3", "gemma2", "olmo2", "stablelm", "glm4", "phi3", "cohere")
WITHOUT_A_GATE = ("phi", "gpt_neox", "starcoder2", "nemotron", "nanochat")
OTHER_LAYERS = ("bamba", "falcon_h1", "lfm2", "qwen3_5_text", "recurrent_gemma", "hrm_text")


@pytest.mark.parametrize("family", COUNTED + WITHOUT_A_GATE + OTHER_LAYERS)
def test_a_shape_that_does_not_count_a_models_weights_is_not_its_own(family):
    config = tiny_families.tiny_config(family)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = shape_of(read_shape(config.to_dict(), family), model)
    assert (shape is not None) == (family in COUNTED)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_config_that_does_not_say_whether_it_ties_does_as_its_family(family):
    """Llama's heads are weights of their own then, Gemma's are not."""
    config = tiny_families.tiny_config(family)
    config = type(config)(**{k: v for k, v in config.to_dict().items() if k != "tie_word_embeddings"})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    settings = {k: v for k, v in config.to_dict().items() if k != "tie_word_embeddings"}
    shape = shape_of(read_shape(settings, family), model)
    counted = parameters(shape, shape.vocab_size).total
    assert counted == pytest.approx(model.num_parameters(), rel=0.02)


@pytest.mark.parametrize(("field", "value", "keys"), [
    ("sliding_window", 16, lambda place: min(place, 16)),
    ("sliding_window", None, lambda place: place),
    ("sliding_window", 4096, lambda place: place),
])  # fmt: skip
def test_a_window_bounds_the_keys(field, value, keys):
    context = 64
    config = MistralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, **{field: value},
    )  # fmt: skip
    model = MistralForCausalLM(config)
    weights = sum(weight.numel() for weight in model.parameters() if weight.ndim > 1) - VOCAB * 32
    mean = sum(keys(place + 0.5) for place in range(context)) / context
    assert model_forward_flops(model, context) == pytest.approx(2 * weights + 2 * 4 * mean * 32)
