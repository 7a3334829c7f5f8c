"""A model of pictures and text is trained on text: what sees pictures costs nothing and stays as it is."""

from __future__ import annotations

import json

import pytest
import torch
from families import SMALL
from training import opened
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration

from tutelage.models.flops import model_forward_flops
from tutelage.run import run

ROWS = 310
"""Ten more than the store has ids."""

TEXT = SMALL | {"vocab_size": ROWS, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
CONFIG = Gemma3Config(
    text_config=TEXT, vision_config=VISION, image_token_index=309, boi_token_index=308, eoi_token_index=307
)


@pytest.fixture
def start(store, tmp_path):
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(CONFIG).save_pretrained(tmp_path / "start")
    return {"path": str(tmp_path / "start"), "assume_same_tokenizer": True}


def test_what_sees_pictures_is_not_updated_and_not_counted(start, make_config):
    student = opened(make_config(model=start))
    text = Gemma3ForCausalLM(CONFIG.text_config)
    updated = {weight for group in student.optimizer.param_groups for weight in group["params"]}
    names = {name for name, weight in student.model.named_parameters() if weight in updated}
    assert len(names) == len(list(text.parameters()))
    assert not [name for name in names if "vision" in name or "projector" in name]
    # On several processes a weight without a gradient would get zeros for one, and decay.
    assert set(student.parameters) == updated
    length = student.config.data.sequence_length
    assert student.training_flops == 3 * model_forward_flops(text, length)


def test_rows_that_are_no_tokens_are_not_written(start, make_config, tmp_path):
    done = run(make_config(model=start))
    config = json.loads((done.model / "config.json").read_text())
    assert "vocab_size" not in config  # it is the text's
    generation = json.loads((done.model / "generation_config.json").read_text())
    assert generation["suppress_tokens"] == list(range(300, ROWS))
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "start").state_dict()
    after = AutoModelForCausalLM.from_pretrained(done.model).state_dict()
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == {name for name in before if "vision" in name or "projector" in name}
