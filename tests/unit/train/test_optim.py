from __future__ import annotations

import pytest
import torch
from tiny_families import tiny_config
from torch import nn
from transformers import AutoModelForCausalLM

from tutelage.config.run_config import OptimConfig
from tutelage.train.optim import adamw, learning_rate


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("cosine", 0, 0.1),  # 10 warm-up steps of 100
        ("cosine", 9, 1.0),
        ("cosine", 10, 1.0),
        ("cosine", 99, 0.1),  # the last step is at final_lr
        ("wsd", 9, 1.0),
        ("wsd", 79, 1.0),  # stable until the last 20 steps
        ("wsd", 89, 0.55),
        ("wsd", 99, 0.1),
        ("constant", 50, 1.0),
        ("constant", 99, 1.0),
    ],
)
def test_learning_rate_at_the_knots(schedule, step, expected):
    config = OptimConfig(schedule=schedule, warmup=0.1, decay=0.2, final_lr=0.1)
    assert learning_rate(config, 1.0, step, 100, batch_tokens=1) == pytest.approx(expected)


def test_cosine_falls_and_never_leaves_its_bounds():
    config = OptimConfig(warmup=0.0)
    rates = [learning_rate(config, 2.0, step, 57, batch_tokens=1) for step in range(57)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == pytest.approx(2.0)
    assert rates[-1] == pytest.approx(0.2)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize(("warmup", "steps"), [("900", 10), (0.0, 1), (0.75, 4)])
def test_a_last_step_that_is_all_that_is_left_is_at_the_final_rate(schedule, warmup, steps):
    config = OptimConfig(schedule=schedule, warmup=warmup, decay=0.25, final_lr=0.3)
    assert learning_rate(config, 2.0, steps - 1, steps, batch_tokens=100) == pytest.approx(0.6)


def test_one_step_runs_have_a_learning_rate():
    for schedule in ("cosine", "wsd", "constant"):
        assert learning_rate(OptimConfig(schedule=schedule), 1.0, 0, 1, batch_tokens=1) > 0


def test_a_warm_up_in_tokens_does_not_follow_the_budget():
    config = OptimConfig(schedule="wsd", warmup="1K", decay=0.2)
    short, long = (
        [learning_rate(config, 1.0, step, steps, batch_tokens=100) for step in range(40)]
        for steps in (50, 400)
    )
    assert short == long
    assert short[9:] == [1.0] * 31  # 1,000 tokens are ten steps
    assert short[4] == 0.5
    assert config.decay_start(50, 100) == 40
    assert learning_rate(config, 1.0, 40, 50, batch_tokens=100) < 1.0


def test_only_matrices_decay():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    groups = adamw(model, OptimConfig(weight_decay=0.3), 1e-3).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(model[0].weight)}


@pytest.mark.parametrize(
    ("family", "spared"),
    [
        ("gpt_oss", {"gate_up_proj_bias", "down_proj_bias"}),
        ("cohere", {"q_norm.weight", "k_norm.weight"}),
        ("recurrent_gemma", {"input_gate_bias", "recurrent_gate_bias"}),
        ("mamba", {"A_log"}),
        ("rwkv", {"time_mix_key", "time_mix_value", "time_mix_receptance"}),
        ("roberta-prelayernorm", set()),  # its matrices have "layernorm" in their names
        ("qwen2_moe", set()),  # the gate of its shared expert has one row
    ],
)
def test_norms_and_biases_do_not_decay_where_they_have_several_rows(family, spared):
    """Biases of GPT-OSS's experts did, a row for each; transformers' Trainer spares them too."""
    config = tiny_config(family)
    if family == "cohere":
        config.use_qk_norm = True
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = {id(p): name for name, p in model.named_parameters()}
    _, others = adamw(model, OptimConfig(), 1e-3).param_groups
    found = {names[id(p)] for p in others["params"] if p.ndim > 1}
    assert {name for name in found if not name.endswith(tuple(spared))} == set()
    assert {end for end in spared if not any(name.endswith(end) for name in found)} == set()


def test_update_is_the_textbook_adamw():
    model = nn.Linear(4, 2, bias=False)
    start = model.weight.detach().clone()
    config = OptimConfig(weight_decay=0.1)
    optimizer = adamw(model, config, 0.01)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    # first step: bias-corrected m / sqrt(v) is the sign of the gradient, here 1
    expected = start * (1 - 0.01 * 0.1) - 0.01 / (1 + config.eps)
    torch.testing.assert_close(model.weight.detach(), expected)
