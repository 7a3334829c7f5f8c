"""A student with dropout: masks are a function of seed, step and rank, so runs repeat to the bit."""

from __future__ import annotations

import pytest
import torch
from training import StopAt, assert_same_weights, losses, opened
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from tutelage.data.hashing import mixed
from tutelage.errors import Stopped
from tutelage.models import hub
from tutelage.run import run, run_cohort


@pytest.fixture(params=["gpt2", "opt"])
def start(request, store, tmp_path):
    """A start model with dropout of 0.1 on residual stream and attention; OPT also drops whole layers."""
    config = {
        "gpt2": GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0,
                           eos_token_id=0),
        "opt": OPTConfig(vocab_size=300, hidden_size=32, ffn_dim=48, num_hidden_layers=2,
                         num_attention_heads=2, max_position_embeddings=64, word_embed_proj_dim=32,
                         layerdrop=0.3, attention_dropout=0.1),
    }[request.param]  # fmt: skip
    torch.manual_seed(0)
    model = (GPT2LMHeadModel if request.param == "gpt2" else OPTForCausalLM)(config)
    hub.save(model, tmp_path / "start", store)
    return str(tmp_path / "start")


@pytest.fixture
def make(make_config, start):
    def config(**changes):
        return make_config(**{"model": {"path": start}, "optim": {"lr": 1e-3}} | changes)

    return config


def test_the_same_run_twice_is_the_same_to_the_bit(make, tmp_path):
    first = run(make())
    torch.manual_seed(5)
    torch.rand(100)
    again = run(make(output=str(tmp_path / "again")))
    assert again.id == first.id
    assert losses(again) == losses(first)
    assert_same_weights(again, first)
    other = run(make(seed=44))
    assert other.id != first.id
    assert losses(other) != losses(first)


def test_resumed_is_uninterrupted(make, tmp_path):
    whole = run(make())
    config = make(output=str(tmp_path / "stopped"))
    with pytest.raises(Stopped):
        run(config, StopAt(6))
    torch.manual_seed(99)
    resumed = run(config)
    assert losses(resumed) == losses(whole)
    assert_same_weights(resumed, whole)


def test_each_of_a_cohort_is_as_alone_however_it_is_made_up(make, tmp_path):
    def members(**changes):
        taught = {"teacher": {"kind": "unigram"}, "objective": {"alpha": 0.3}}
        shape = {"model": {"shape": "nano-50k"}}
        return [
            make(**changes),
            make(seed=44, **changes),
            make(**taught, **changes),
            make(**shape, **changes),
        ]

    together = run_cohort(members())
    alone = [run(config) for config in members(output=str(tmp_path / "alone"))]
    for a, b in zip(together, alone, strict=True):
        assert losses(a) == losses(b)
        assert_same_weights(a, b)


def test_scoring_on_the_way_changes_nothing(make, store, tmp_path):
    evaluation = {
        "domains": [{"name": "speeches", "store": str(store), "role": "in_domain"}],
        "max_documents": 3,
        "max_tokens": 60,
    }
    plain = run(make())
    watched = run(make(eval=evaluation | {"every": 5 * 256}, output=str(tmp_path / "watched")))
    assert_same_weights(watched, plain)


def test_masks_differ_by_step_rank_and_micro_batch(make, tmp_path):
    student = opened(make())
    first = student.step_inputs(student.step).seed
    student.step += 1
    assert student.step_inputs(student.step).seed == mixed(43, student.step, 0) != first
    seeds = {mixed(43, step, rank) for step in range(200) for rank in range(8)}
    assert len(seeds) == 1600
    assert mixed(1, 2) != mixed(2, 1)


def test_a_teacher_with_dropout_never_drops(make_config, start):
    taught = {"teacher": {"kind": "model", "path": start}, "objective": {"alpha": 0.4}}
    student = opened(make_config(**taught))
    student.model.train()
    batch = student.loader.batch(0)
    first = student.teacher.targets(batch)
    again = student.teacher.targets(batch)
    assert torch.equal(first.hidden_NE, again.hidden_NE)
    plain = hub.load(start).eval()
    with torch.no_grad():
        expected = plain(input_ids=batch.tokens_BT).logits.flatten(0, 1)
    torch.testing.assert_close(first.hidden_NE @ first.head_VE.T, expected)


def test_dropout_is_on_in_training(make):
    """Without it the tests above prove nothing."""
    student = opened(make())
    student.model.train()
    batch = student.loader.batch(0)
    with torch.no_grad():
        twice = [student.model.get_decoder()(input_ids=batch.tokens_BT).last_hidden_state for _ in range(2)]
    assert not torch.equal(*twice)
