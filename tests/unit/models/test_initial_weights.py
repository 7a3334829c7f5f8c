"""Weights that are drawn one tensor at a time are those of the whole model, to the bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from tutelage.models.hub import build
from tutelage.models.initial_weights import draw_weights, fill_model
from tutelage.models.shapes import find_shape

VOCAB, CONTEXT = 301, 32
CPU = torch.device("cpu")


def tensors(model):
    return dict(model.named_parameters()) | dict(model.named_buffers())


@pytest.mark.parametrize("name", ["nano-50k", "nano-50k-qk"])
@pytest.mark.parametrize("tied", [False, True])
def test_same_as_built_at_once(name, tied):
    shape = replace(find_shape(name), tied=tied)
    found = {}
    before = torch.get_rng_state()
    draw_weights(shape, VOCAB, CONTEXT, 7, lambda key, value: found.__setitem__(key, value.clone()))
    assert torch.equal(torch.get_rng_state(), before)
    expected = tensors(build(shape, VOCAB, CONTEXT, 7))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_on_the_meta_device_becomes_the_one_that_is_built(tied):
    drawn = replace(find_shape("nano-50k-qk"), tied=tied), VOCAB, CONTEXT, 7
    model = build(*drawn, device="meta")
    fill_model(model, *drawn, CPU)
    tokens_BT = torch.arange(2 * CONTEXT).reshape(2, CONTEXT) % VOCAB
    with torch.no_grad():
        assert torch.equal(model(tokens_BT).logits, build(*drawn)(tokens_BT).logits)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_no_more_than_the_largest_tensor_stands_whole():
    shape, vocabulary = find_shape("nano-2m"), 4096
    largest = vocabulary * shape.hidden * 4

    def peak(work):
        with MemTracker() as tracker:
            work()
        return tracker.get_tracker_snapshot("peak")[CPU]["Total"]

    assert peak(lambda: draw_weights(shape, vocabulary, CONTEXT, 7, lambda *_: None)) == largest
    assert peak(lambda: build(shape, vocabulary, CONTEXT, 7)) > 4 * largest
