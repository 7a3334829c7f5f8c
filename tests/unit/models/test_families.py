"""Tiny random models of many families: the logits of transformers, and what happens beyond their length."""

import pytest
import torch
import transformers as hf
from families import FAMILIES, GROUPED, POSITIONS, SMALL, VOCAB

from tutelage.config.objective_config import Objective
from tutelage.errors import UserError
from tutelage.models.hub import body_and_head, build, load, logit_transform
from tutelage.models.packed import check_length, trained_length
from tutelage.models.shapes import find_shape
from tutelage.models.sharding import decoder_layers
from tutelage.train.objective_model import ObjectiveModel
from tutelage.types import Batch, transformed

TABLES = {"gpt2", "openai-gpt", "gpt_bigcode", "opt", "gpt_neo", "mpt"}
WITHOUT = {"bloom", "mamba"}


def written(family, folder):
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float32).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_are_those_of_transformers(family, tmp_path):
    model = written(family, tmp_path)
    tokens_BT = (torch.arange(2 * 32).reshape(2, 32) * 7) % VOCAB
    expected = model(input_ids=tokens_BT, use_cache=False).logits
    again = load(tmp_path)
    body, head = body_and_head(again)
    hidden_BTD = body(input_ids=tokens_BT, use_cache=False).last_hidden_state
    assert torch.equal(transformed(head(hidden_BTD), logit_transform(again)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_cap_in_float32_is_known_in_half_precision(dtype, tmp_path):
    torch.manual_seed(0)
    model = hf.xLSTMForCausalLM(
        hf.xLSTMConfig(vocab_size=VOCAB, hidden_size=32, num_heads=2, num_hidden_layers=1)
    )
    model.lm_head.weight.data.normal_()
    model.to(dtype).save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.dtype == dtype
    with torch.no_grad():
        logits = again(input_ids=torch.arange(4).unsqueeze(0), use_cache=False).logits
    assert logits.dtype == torch.float32
    assert logits.abs().max() > 8  # of which a cap of 30 takes .2, and half precision does not have that much


@pytest.mark.parametrize("family", FAMILIES)
def test_beyond_its_length_a_model_is_refused_or_a_note_is_made(family, tmp_path):
    model = written(family, tmp_path)
    if family in WITHOUT:
        assert trained_length(model.config) is None
        assert check_length(model, "model", 4 * POSITIONS) is None
        return
    assert trained_length(model.config) == POSITIONS
    assert check_length(model, "model", POSITIONS) is None
    if family in TABLES:
        with pytest.raises(UserError, match=r"^model x: it has 64 positions, and sequences of 65 tokens"):
            check_length(model, "model x", POSITIONS + 1)
    else:
        note = check_length(model, "model x", POSITIONS + 1)
        assert note.startswith("model x: it was made for sequences of 64 tokens and reads 65 here")


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_layers_are_found_in_order(family):
    config = FAMILIES[family]()
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(config)
    layers = decoder_layers(model)
    assert len(layers) == config.num_hidden_layers
    assert len({type(layer) for layer in layers}) == 1
    outside = {weight.shape[0] for weight in model.parameters()} - {w.shape[0] for w in layers.parameters()}
    assert VOCAB in outside
    order = [name for name, module in model.named_modules() if module in set(layers)]
    assert order == [name for name, module in model.named_modules() if type(module) is type(layers[0])]


def test_a_family_without_a_list_of_layers_is_one_line():
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(hf.LlamaConfig(**GROUPED))
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    with pytest.raises(UserError, match=r"^LlamaForCausalLM: it has no list of decoder layers") as caught:
        decoder_layers(model)
    assert "\n" not in str(caught.value)


def test_the_implementation_of_attention_can_be_chosen(tmp_path):
    written("llama", tmp_path)
    assert load(tmp_path).config._attn_implementation == "sdpa"
    assert load(tmp_path, attn_implementation="eager").config._attn_implementation == "eager"
    written("gpt_neo", tmp_path / "neo")
    assert load(tmp_path / "neo").config._attn_implementation == "eager"
    for name, kind in (("neo", "sdpa"), ("neo", "flex_attention"), ("", "flash_attention_2")):
        with pytest.raises(UserError, match=f"{name}: attn_implementation = {kind}: [A-Z]") as caught:
            load(tmp_path / name, attn_implementation=kind)
        assert str(caught.value).endswith("remove the setting, and transformers chooses what the family has")
    with pytest.raises(UserError, match=r"^model.shape = nano-20k: attn_implementation = flash_"):
        build(find_shape("nano-20k"), VOCAB, POSITIONS, 0, attn_implementation="flash_attention_2")


@pytest.mark.parametrize(
    "config",
    [
        hf.BertConfig(**(SMALL | {"pad_token_id": 0})),
        hf.RobertaConfig(**(SMALL | {"pad_token_id": 0})),
        hf.ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4),
        hf.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4),
        hf.CLIPConfig(),
        hf.LlavaConfig(
            text_config=hf.LlamaConfig(**GROUPED),
            vision_config=hf.CLIPVisionConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2),
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_what_is_no_causal_language_model_is_one_line(config, tmp_path):
    (hf.AutoModelForMaskedLM if config.model_type in {"bert", "roberta"} else hf.AutoModel).from_config(
        config
    ).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="other") as caught:
        load(tmp_path / "other")
    assert "\n" not in str(caught.value)


def test_a_model_that_sees_later_tokens_is_refused(tmp_path):
    config = hf.LlamaConfig(**GROUPED, is_causal=False)
    model = hf.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "both-ways")
    with pytest.raises(UserError, match="lets tokens see later ones, so it is no causal language model"):
        load(tmp_path / "both-ways")


def test_no_loss_of_routers_is_part_of_the_objective():
    """Gradients are those of cross-entropy alone, although the config asks for the router's loss."""
    torch.manual_seed(0)
    config = FAMILIES["mixtral"]()
    config.output_router_logits, config.router_aux_loss_coef = True, 1.0
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    ids = torch.arange(2 * 17).reshape(2, 17) * 7 % VOCAB
    batch = Batch(ids[:, :-1], ids[:, 1:].contiguous(), (0, 1))
    router = model.model.layers[0].mlp.gate.weight

    def gradient(loss):
        return torch.autograd.grad(loss, router)[0]

    ours = gradient(ObjectiveModel(model, Objective(), VOCAB)(batch, None, 0.0)[0])
    output = model(input_ids=batch.tokens_BT)
    plain = torch.nn.functional.cross_entropy(
        output.logits.flatten(0, 1), batch.labels_BT.flatten(), reduction="sum"
    )
    theirs = model(input_ids=batch.tokens_BT, labels=batch.labels_BT, shift_labels=batch.labels_BT)
    assert theirs.aux_loss > 0
    assert torch.allclose(ours, gradient(plain), rtol=1e-3, atol=1e-5)
    assert not torch.allclose(ours / batch.labels_BT.numel(), gradient(theirs.loss), rtol=0.1)
