import dataclasses
import subprocess
import sys

import pytest

from tutelage.errors import UserError
from tutelage.models.hub import build
from tutelage.models.shapes import LADDER, find_shape

TINY = [shape for shape in LADDER.values() if shape.name.startswith("nano-") and shape.family == "llama"]
NORMALISED = [shape for shape in LADDER.values() if shape.name.endswith("-qk")]
PAPER = {
    "llama-0.7b": ("llama", 1024, 12, 32, 8, 128, 8192),
    "llama-1.7b": ("llama", 2048, 16, 32, 8, 128, 8192),
    "llama-3.8b": ("llama", 3072, 28, 32, 8, 128, 8192),
    "llama-8b": ("llama", 4096, 32, 32, 8, 128, 14336),
    "qwen3-0.15b": ("qwen3", 512, 20, 8, 4, 64, 1536),
    "qwen3-0.3b": ("qwen3", 768, 24, 12, 4, 64, 2304),
    "qwen3-0.6b": ("qwen3", 1024, 28, 16, 8, 128, 3072),
    "qwen3-1b": ("qwen3", 1536, 28, 12, 4, 128, 4608),
}


def test_the_ladder_holds_the_papers_eight_shapes_and_eight_tiny_ones():
    assert {shape.name for shape in LADDER.values()} == set(LADDER)
    assert set(LADDER) - {shape.name for shape in (*TINY, *NORMALISED)} == set(PAPER)
    assert [shape.name for shape in TINY] == [
        f"nano-{size}" for size in ("20k", "50k", "150k", "350k", "700k", "2m", "6m", "20m")
    ]


@pytest.mark.parametrize("name", PAPER)
def test_paper_shapes(name):
    shape = find_shape(name)
    fields = ("family", "hidden", "layers", "heads", "kv_heads", "head_dim", "mlp")
    assert tuple(dataclasses.asdict(shape)[field] for field in fields) == PAPER[name]
    expected = {"llama": (False, 3e-4, 128_256), "qwen3": (True, 5e-4, 151_936)}
    assert (shape.tied, shape.lr, shape.vocab_size) == expected[shape.family]


@pytest.mark.parametrize("shape", TINY, ids=lambda shape: shape.name)
def test_tiny_shapes_are_untied_llamas_with_grouped_queries(shape):
    assert (shape.family, shape.tied, shape.kv_heads, shape.vocab_size) == ("llama", False, 2, None)
    assert shape.head_dim in (8, 16, 32)
    assert shape.heads % shape.kv_heads == 0
    assert 2.3 < shape.mlp / shape.hidden < 3.5


def test_normalised_shapes_differ_from_the_tiny_ones_in_their_family_alone():
    assert [shape.name for shape in NORMALISED] == ["nano-50k-qk", "nano-150k-qk", "nano-350k-qk"]
    for shape in NORMALISED:
        plain = find_shape(shape.name.removesuffix("-qk"))
        assert dataclasses.replace(shape, name=plain.name, family="llama", summary=plain.summary) == plain
        model = build(shape, 300, 32, seed=0)
        assert model.config.model_type == "qwen3"
        assert model.model.layers[0].self_attn.q_norm.weight.shape == (shape.head_dim,)


def test_the_learning_rate_falls_with_size():
    rates = [shape.lr for shape in TINY]
    assert rates[-1] == 1e-3
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(
    ("name", "theta", "eps", "kind"),
    [("nano-150k", 5e5, 1e-5, "llama"), ("llama-8b", 5e5, 1e-5, "llama"), ("qwen3-1b", 1e6, 1e-6, "qwen3")],
)
def test_config(name, theta, eps, kind):
    shape = find_shape(name)
    config = shape.config(vocab_size=1000, context=256)
    assert config.model_type == kind
    assert config.rope_parameters["rope_theta"] == theta
    assert config.rms_norm_eps == eps
    assert (config.vocab_size, config.max_position_embeddings) == (1000, 256)
    assert (config.hidden_size, config.intermediate_size) == (shape.hidden, shape.mlp)
    assert (config.num_attention_heads, config.num_key_value_heads) == (shape.heads, shape.kv_heads)
    assert (config.num_hidden_layers, config.head_dim) == (shape.layers, shape.head_dim)
    assert config.tie_word_embeddings is shape.tied
    assert config.attention_dropout == 0.0
    assert config.bos_token_id is None
    assert config.eos_token_id is None


def test_an_unknown_shape_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match=r"model\.shape = 'nano-150K'.*did you mean 'nano-150k'\?"):
        find_shape("nano-150K")
    with pytest.raises(UserError, match="known: nano-20k, ") as caught:
        find_shape("zzz")
    assert "did you mean" not in str(caught.value)


def test_the_table_and_the_formulas_load_neither_torch_nor_transformers():
    code = (
        "import sys, tutelage.models.shapes, tutelage.models.flops;"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
