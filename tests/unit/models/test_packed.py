"""Documents of a packed sequence are read apart: by every family that can, and others are refused."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers as hf
from families import FAMILIES, GROUPED, SMALL, VOCAB
from transformers import modeling_flash_attention_utils as flash

from tutelage.errors import UserError
from tutelage.models import hub, shapes
from tutelage.models.hub import body_and_head
from tutelage.models.packed import check_documents, hidden_states
from tutelage.types import Batch

LENGTHS = [[9, 1, 14], [24], [3, 20, 1]]
REFUSED = {"openai-gpt", "bloom", "mamba", "rwkv", "falcon-alibi"}
MORE = {
    "falcon-alibi": FAMILIES["falcon"],
    "falcon-rotary": lambda: hf.FalconConfig(**{k: v for k, v in SMALL.items() if k != "intermediate_size"}),
    "phi3": lambda: hf.Phi3Config(**GROUPED),
    "olmoe": lambda: hf.OlmoeConfig(**GROUPED, num_experts=4, num_experts_per_tok=2),
    "qwen3-next": lambda: hf.Qwen3NextConfig(**GROUPED, head_dim=8, num_experts=0, linear_num_key_heads=2,
                                             linear_num_value_heads=2, linear_key_head_dim=8,
                                             linear_value_head_dim=8),
    "phi3-longrope": lambda: hf.Phi3Config(**GROUPED, original_max_position_embeddings=16, rope_parameters={
        "rope_type": "longrope", "rope_theta": 1e4,
        "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}),
    "llama-dynamic": lambda: hf.LlamaConfig(**GROUPED | {"max_position_embeddings": 16}, rope_parameters={
        "rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
}  # fmt: skip
REFUSED |= {"qwen3-next", "phi3-longrope", "llama-dynamic"}
ALL = {name: make for name, make in (FAMILIES | MORE).items() if name != "falcon"}


def model_of(config, attention=None):
    torch.manual_seed(0)
    chosen = {} if attention is None else {"attn_implementation": attention}
    return hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32, **chosen).eval()


def packed(seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(1, VOCAB, (len(LENGTHS), 24), generator=generator)
    positions_BT = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
    return Batch(tokens_BT, tokens_BT, (0,) * len(LENGTHS), positions_BT)


def documents():
    """Row and columns of every document."""
    for row, lengths in enumerate(LENGTHS):
        ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
        yield from ((row, slice(a, b)) for a, b in itertools.pairwise(ends))


def replaced(batch, row, columns):
    """The batch with other tokens in one document."""
    tokens_BT = batch.tokens_BT.clone()
    tokens_BT[row, columns] = (tokens_BT[row, columns] + 7) % VOCAB
    return Batch(tokens_BT, tokens_BT, batch.starts, batch.positions_BT)


def assert_apart(model):
    """Every document is what transformers gives for it alone, and depends on no other, to the bit."""
    body, batch = body_and_head(model)[0], packed()
    found_BTD = hidden_states(body, batch)
    for row, columns in documents():
        alone = model(input_ids=batch.tokens_BT[row : row + 1, columns], output_hidden_states=True)
        torch.testing.assert_close(found_BTD[row, columns], alone.hidden_states[-1][0], rtol=1e-4, atol=2e-5)
        changed_BTD = hidden_states(body, replaced(batch, row, columns))
        same = torch.ones_like(batch.tokens_BT, dtype=torch.bool)
        same[row, columns] = False
        assert torch.equal(changed_BTD[same], found_BTD[same])
        assert not torch.equal(changed_BTD[~same], found_BTD[~same])


@pytest.mark.parametrize("family", sorted(set(ALL) - REFUSED))
@torch.no_grad()
def test_a_document_is_read_as_if_it_were_alone(family):
    model = model_of(ALL[family]())
    check_documents(body_and_head(model)[0], "model x", 24)
    assert not model.training
    assert_apart(model)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@torch.no_grad()
def test_whatever_computes_attention(family, attention):
    assert_apart(model_of(ALL[family](), attention))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
@torch.no_grad()
def test_flex_attention():
    """It is compiled at its first call, by transformers, so it is called with one shape only."""
    plain, flex = (body_and_head(model_of(ALL["qwen3"](), kind))[0] for kind in ("sdpa", "flex_attention"))
    batch = packed()
    found_BTD = hidden_states(flex, batch)
    torch.testing.assert_close(found_BTD, hidden_states(plain, batch), rtol=1e-4, atol=1e-5)
    changed_BTD = hidden_states(flex, replaced(batch, 0, slice(0, 9)))
    assert torch.equal(changed_BTD[0, 9:], found_BTD[0, 9:])
    assert not torch.equal(changed_BTD[0, :9], found_BTD[0, :9])


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_a_family_that_cannot_is_refused_in_one_sentence(family):
    model = model_of(ALL[family]()).train()
    with pytest.raises(UserError, match=r"^model x: \w+ cannot keep the documents .* apart") as caught:
        check_documents(body_and_head(model)[0], "model x", 24)
    assert "\n" not in str(caught.value)
    assert model.training


@pytest.mark.parametrize("shape", shapes.LADDER)
def test_shapes_of_the_ladder_are_families_that_can(shape):
    """They are not tried before a run, since they may be built without weights."""
    assert shapes.find_shape(shape).config(VOCAB, 64).model_type in set(ALL) - REFUSED


@torch.no_grad()
def test_without_positions_nothing_is_passed_on():
    model = hub.build(shapes.find_shape("nano-50k"), VOCAB, 64, seed=0)
    body, batch = body_and_head(model)[0], packed()
    plain = Batch(batch.tokens_BT, batch.labels_BT, batch.starts)
    expected = model(input_ids=batch.tokens_BT, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(hidden_states(body, plain), expected)
    assert not torch.equal(hidden_states(body, batch), expected)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@torch.no_grad()
def test_flash_attention_gets_one_row_with_the_borders_of_all_documents(family, monkeypatch):
    """A stand-in for its kernel, which needs a GPU: plain attention in each of the pieces it is told."""
    calls = []

    def varlen(
        q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale, **_
    ):
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert causal
        assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
        calls.append(cu_seqlens_q.tolist())
        out = torch.empty_like(q)
        for a, b in itertools.pairwise(cu_seqlens_q.tolist()):
            heads = [x[a:b].transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
            piece = torch.nn.functional.scaled_dot_product_attention(
                *heads, is_causal=True, scale=softmax_scale, enable_gqa=True
            )
            out[a:b] = piece[0].transpose(0, 1)
        return out

    def whole(*_, **__):
        raise AssertionError("the documents were not told")

    def imported(_implementation):
        supported = dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), True)
        names = (
            "dropout_p",
            "window_size",
            "deterministic",
            "softcap",
            "s_aux",
            "block_table",
            "cache_seqlens",
        )
        supported |= dict.fromkeys((*names, "learnable_sink", "page_table"), False)

        def settings(**given):
            return flash._process_flash_attention_kwargs(supports_mapping=supported, **given)

        return (whole, varlen, None, None, None), (settings, None)

    sdpa = model_of(ALL[family](), "sdpa")
    expected_BTD = hidden_states(body_and_head(sdpa)[0], packed())
    monkeypatch.setattr(flash, "lazy_import_flash_attention", imported)
    sdpa.config._attn_implementation_internal = "flash_attention_2"
    found_BTD = hidden_states(body_and_head(sdpa)[0], packed())
    torch.testing.assert_close(found_BTD, expected_BTD, rtol=1e-4, atol=1e-5)
    borders = [row * 24 + columns.start for row, columns in documents()] + [72]
    assert calls == [borders] * sdpa.config.num_hidden_layers
