from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tutelage.models import hub
from tutelage.models.flops import parameters
from tutelage.models.memory import Footprint, kept_bytes_of_layer, plan_memory
from tutelage.models.memory_remedies import least_memory, remedies
from tutelage.models.shapes import LADDER, find_shape

TOKENS = 61
BIG = Footprint(
    shape=find_shape("llama-1.7b"),
    vocab_size=128_256,
    micro_batch=16384,
    micro_batches=4,
    chunk=512,
    half=True,
)


def kept_by_autograd(shape, *, half, cast, attention=None):
    """Bytes per token that the backward pass of a body holds, weights and their copies left out."""
    model = hub.build(shape, 300, TOKENS, seed=1, attn_implementation=attention)
    if half and not cast:
        model = model.to(torch.bfloat16)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    shapes = {tuple(parameter.shape) for parameter in model.parameters()}
    shapes |= {shape[::-1] for shape in shapes}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tuple(tensor.shape) not in shapes:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    body, _ = hub.body_and_head(model)
    saved = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with saved, torch.autocast("cpu", torch.bfloat16, enabled=cast):
        hidden = body(torch.zeros(1, TOKENS, dtype=torch.long)).last_hidden_state
    assert hidden is not None
    return sum(size for size, _ in kept.values()) / TOKENS


@pytest.mark.parametrize("name", ["nano-150k", "nano-150k-qk"])
@pytest.mark.parametrize(("half", "cast"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_layer_keeps_what_autograd_keeps(name, half, cast, attention):
    """Of two depths the difference: a layer, without what comes before and after all of them."""
    shapes = [replace(LADDER[name], layers=layers) for layers in (2, 5)]
    few, more = (kept_by_autograd(shape, half=half, cast=cast, attention=attention) for shape in shapes)
    kept = kept_bytes_of_layer(shapes[0], half=half, cast=cast, eager=TOKENS * (attention == "eager"))
    assert kept == pytest.approx((more - few) / 3, rel=0.02)


def test_state_is_sixteen_bytes_a_weight_shared_by_the_shards():
    total = parameters(BIG.shape, BIG.vocab_size).total
    for shards in (1, 4):
        plan = plan_memory(replace(BIG, shards=shards, micro_batch=1))
        state = sum(plan.parts[name] for name in ("weights", "moments", "gradients"))
        assert state == pytest.approx(16 * total / shards)
    replicated = plan_memory(replace(BIG, replicate=4))
    assert replicated.parts["weights"] == 4 * total


def test_the_teacher_is_whole_or_shared():
    teacher = find_shape("llama-8b")
    weights = parameters(teacher, BIG.vocab_size).total
    beside = replace(BIG, teachers=(teacher,), dense=True, shards=4, teacher_bytes=2)
    assert plan_memory(beside).parts["teacher"] == 2 * weights
    assert plan_memory(replace(beside, teacher_shards=4)).parts["teacher"] == 2 * weights / 4
    assert "teacher" not in plan_memory(BIG).parts


@pytest.mark.parametrize(
    "change",
    [
        {"micro_batch": 8192, "micro_batches": 8},
        {"recomputation": "selective"},
        {"recomputation": "full"},
        {"shards": 8},
        {"chunk": 128},
        {"mask_length": 0},
    ],
    ids=str,
)
def test_what_should_lower_the_memory_does(change):
    before = replace(BIG, mask_length=2048, chunk=4096)
    assert plan_memory(replace(before, **change)).total < plan_memory(before).total


def test_parts_add_up_and_none_is_zero():
    plan = plan_memory(BIG)
    assert plan.total == sum(plan.parts.values())
    assert all(plan.parts.values())
    assert list(plan.parts.values()) == sorted(plan.parts.values(), reverse=True)


def test_remedies_are_in_order_help_and_are_enough_together():
    needs = replace(BIG, teachers=(find_shape("llama-3.8b"),), dense=True, teacher_bytes=4, replicate=2)
    total, memory = plan_memory(needs).total, 60e9
    assert total > memory
    found = list(remedies(needs, 2048, memory))
    words = [one.setting.split("=")[0] for one in found]
    assert words[:3] == ["micro_batch_tokens", *["runtime.activation_checkpointing"] * 2]
    assert words.index("teacher.dtype") > words.index("parallel.replicate")
    assert words[-1] == "all of these"
    assert all(one.bytes < total for one in found)
    assert found[-1].bytes == min(one.bytes for one in found)
    assert found[-1].bytes < memory
    assert least_memory(needs) < total


def test_the_smaller_micro_batch_is_the_first_that_fits():
    total = plan_memory(BIG).total
    sizes = [next(remedies(BIG, 2048, memory)).setting for memory in (0.99 * total, 0.7 * total, 1.0)]
    assert sizes == ["micro_batch_tokens=8192", "micro_batch_tokens=4096", "micro_batch_tokens=2048"]
