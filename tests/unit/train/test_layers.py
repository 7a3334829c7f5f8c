"""Layers that recompute activations or are compiled: the same losses and gradients, in less memory."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from families import FAMILIES, VOCAB
from torch.distributed._tools.mem_tracker import MemTracker
from training import assert_same_weights, losses, opened, weights

from tutelage.config.runtime_config import RuntimeConfig
from tutelage.errors import UserError
from tutelage.models import hub, shapes
from tutelage.models.packed import body_of, hidden_states
from tutelage.models.sharding import decoder_layers
from tutelage.run import run
from tutelage.run_directory import run_id
from tutelage.train.distributed import World
from tutelage.train.layers import compile_layers, eagerly, recompute
from tutelage.train.setup import open_teacher
from tutelage.types import Batch

CPU = torch.device("cpu")
REFUSED = {"openai-gpt"}


def model_of(family):
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float32).train()


def packed(length=24):
    generator = torch.Generator().manual_seed(1)
    tokens_BT = torch.randint(1, VOCAB, (2, length), generator=generator)
    positions_T = torch.cat([torch.arange(length // 3), torch.arange(length - length // 3)])
    return Batch(tokens_BT, tokens_BT, (0, length), positions_T.expand(2, -1).contiguous())


def gradients(model, batch):
    """Gradients of a loss with dropout, and how often every layer was run."""
    calls = []
    inner = [next(m for m in layer.modules() if not list(m.children())) for layer in decoder_layers(model)]
    hooks = [module.register_forward_hook(lambda module, *_: calls.append(module)) for module in inner]
    torch.manual_seed(3)
    (hidden_states(body_of(model), batch) ** 2).sum().backward()
    for hook in hooks:
        hook.remove()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found, [calls.count(module) for module in inner]


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - REFUSED))
def test_gradients_are_the_same_to_the_bit(family):
    model, batch = model_of(family), packed()
    if family in {"bloom", "mamba", "rwkv", "falcon"}:
        batch = Batch(batch.tokens_BT, batch.labels_BT, batch.starts)
    expected, once = gradients(model, batch)
    for kind in ("selective", "full"):
        again = model_of(family)
        recompute(again, RuntimeConfig(activation_checkpointing=kind))
        found, calls = gradients(again, batch)
        assert list(found) == list(expected)
        for name, gradient in found.items():
            assert torch.equal(gradient, expected[name]), name
        assert calls == [2 * count for count in once]


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_a_family_that_cannot_is_one_line(family):
    with pytest.raises(UserError, match=r"^runtime.activation_checkpointing = full: ") as caught:
        recompute(model_of(family), RuntimeConfig(activation_checkpointing="full"))
    assert "\n" not in str(caught.value)


def test_a_teacher_or_a_model_that_is_scored_recomputes_nothing():
    model, batch = model_of("llama").eval(), packed()
    recompute(model, RuntimeConfig(activation_checkpointing="full"))
    _, calls = gradients(model, batch)
    assert calls == [1, 1]
    with torch.no_grad():
        assert not hidden_states(body_of(model), batch).requires_grad


@pytest.mark.parametrize(("attention", "kept"), [("eager", 0.95), ("sdpa", 0.8)])
def test_less_memory_for_activations(attention, kept):
    """By torch's own tracker, at the peak; eager attention keeps its scores, which are a product."""
    peaks = []
    for kind in ("none", "selective", "full"):
        model = hub.build(shapes.find_shape("nano-150k"), VOCAB, 256, 0, attn_implementation=attention)
        model.train()
        recompute(model, RuntimeConfig(activation_checkpointing=kind))
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker:
            hidden_BTD = hidden_states(body_of(model), packed(256))
            (hidden_BTD**2).sum().backward()
        peaks.append(tracker.get_tracker_snapshot("peak")[CPU]["Total"])
    none, selective, full = peaks
    assert selective < kept * none
    assert full < 0.7 * selective


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_a_run_that_recomputes_is_the_same_run(make_config, tmp_path, kind):
    def made(name, **runtime):
        runtime = {"device": "cpu", "threads": 1, "log_every": 1} | runtime
        return make_config(output=str(tmp_path / name), runtime=runtime, tokens=6 * 256)

    plain, sparing = made("plain"), made("sparing", activation_checkpointing=kind)
    assert run_id(plain) == run_id(sparing)
    first, second = run(plain), run(sparing)
    assert losses(first) == losses(second)
    assert_same_weights(first, second)


def test_without_settings_a_student_is_as_it_was_built(make_config):
    student = opened(make_config())
    for layer in decoder_layers(student.model):
        assert not layer.gradient_checkpointing
        assert layer._compiled_call_impl is None


@pytest.mark.filterwarnings("ignore")  # of torch itself, while it compiles
def test_a_missing_compiler_is_one_line_if_it_was_asked_for():
    model, wanted = model_of("llama"), r"^runtime.compile = true: .*No working C\+\+ compiler"
    torch._dynamo.reset()
    missing = torch._inductor.config.patch({"cpp.cxx": (None, "/nowhere/g++")})
    with missing, pytest.raises(UserError, match=wanted) as caught:
        compile_layers(model, RuntimeConfig(compile=True), CPU)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250
    assert compile_layers(model, RuntimeConfig(), CPU) == ()
    assert compile_layers(model, RuntimeConfig(compile=False), torch.device("cuda")) == ()


@pytest.mark.skipif(torch.cuda.is_available(), reason="it works there")
def test_left_to_the_device_a_missing_compiler_is_a_note():
    """On cuda, which is not here: torch's reason stands in the note, and no layer is compiled."""
    model = model_of("llama")
    (note,) = compile_layers(model, RuntimeConfig(), torch.device("cuda"))
    assert note.startswith("torch.compile does not work on cuda here (")
    assert note.endswith("training goes on without it")
    assert "\n" not in note
    assert all(layer._compiled_call_impl is None for layer in decoder_layers(model))


@pytest.mark.filterwarnings("ignore")  # of torch itself, while it compiles
@pytest.mark.parametrize("kind", ["model", "mean"])
def test_the_layers_of_a_teacher_are_compiled_too(make_config, tmp_path, store, kind, monkeypatch):
    monkeypatch.setattr("tutelage.train.layers._try_compiler", lambda _device: None)  # nothing is run
    one = {"kind": "model", "path": str(tmp_path / "teacher")}
    hub.save(hub.build(shapes.find_shape("nano-20k"), 300, 32, 0), tmp_path / "teacher", store)
    teacher = one if kind == "model" else {"kind": "mean", "of": [one, one]}
    layers = []
    for asked in (True, False):
        config = make_config(
            teacher=teacher,
            objective={"alpha": 0.4},
            runtime={"device": "cpu", "threads": 1, "compile": asked},
        )
        opened = open_teacher(config, World(CPU))
        opened.use(lambda model: layers.append(decoder_layers(model)))
    compiled = [layer._compiled_call_impl is not None for found in layers for layer in found]
    assert compiled == len(compiled) // 2 * [True] + len(compiled) // 2 * [False]
    assert len(layers) == (2 if kind == "model" else 4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch itself, while it compiles
def test_compiled_layers_compute_the_same():
    """One compiled graph serves all layers; names stay; scoring of other lengths compiles nothing."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = (hub.build(shapes.find_shape("nano-50k"), VOCAB, 64, 0).train() for _ in range(2))
    runtime = RuntimeConfig(compile=True, activation_checkpointing="full")
    recompute(compiled, runtime)
    assert compile_layers(compiled, runtime, CPU) == ()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    expected, _ = gradients(plain, packed())
    torch.manual_seed(3)
    (hidden_states(compiled.get_decoder(), packed()) ** 2).sum().backward()
    found = {name: p.grad for name, p in compiled.named_parameters() if p.grad is not None}
    assert list(found) == list(expected)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 1
    compiled.eval()
    with torch.no_grad(), eagerly():
        for length in (3, 9, 30):
            scored = hidden_states(compiled.get_decoder(), packed(length))
            assert torch.equal(scored, hidden_states(plain.eval().get_decoder(), packed(length)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_run_ends_at_the_same_weights(make_config, tmp_path, store):
    def made(name, **runtime):
        return make_config(
            output=str(tmp_path / name),
            tokens=6 * 256,
            data={"store": str(store), "sequence_length": 32, "document_mask": True},
            eval={"every": 256, "domains": [{"name": "own", "store": str(store), "role": "in_domain"}],
                  "max_documents": 2},
            runtime={"device": "cpu", "threads": 1, "log_every": 1, **runtime},
        )  # fmt: skip

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain = run(made("plain"))
    compiled = run(made("compiled", compile=True, activation_checkpointing="selective"))
    assert compiled.id == plain.id
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # the trial, and the layer
    for first, second in zip(losses(plain), losses(compiled), strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-5)
    ours, theirs = weights(compiled), weights(plain)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-5)
