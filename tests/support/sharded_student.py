"""Train students on meshes of several processes, and compare each with one process without a mesh.

    python sharded_student.py DIRECTORY STORE

Every comparison of the parent's `EXPECTED` runs in forked processes; what differs is an AssertionError.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import forked_ranks
import pytest
import torch
from families import FAMILIES, VOCAB
from tiny_families import tiny_config
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from traffic import Traffic
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from tutelage.config.load import validate
from tutelage.config.run_config import RunConfig
from tutelage.errors import UserError
from tutelage.models import hub, shapes
from tutelage.models.sharding import Sharding, gathered, shard_model
from tutelage.objective import Objective
from tutelage.run_directory import RunDirectory
from tutelage.train import distributed
from tutelage.train.objective_model import ObjectiveModel
from tutelage.train.parallel import use_model
from tutelage.train.setup import open_student, open_teacher
from tutelage.train.step import train_step
from tutelage.types import Batch

STEPS, LENGTH, SEQUENCES = 3, 32, 8
_ODD = shapes.ModelShape("odd", "llama", 36, 2, 3, 1, 12, 50, False, 1e-3, 301, "sizes that nothing divides")
SHAPES = {
    "llama": _ODD,
    "llama-tied": replace(_ODD, tied=True),
    # Norms of two weights over four processes: two have none.
    "qwen3": replace(_ODD, family="qwen3", heads=5, head_dim=2),
    "qwen3-tied": replace(_ODD, family="qwen3", heads=5, head_dim=2, tied=True),
}
ACCUMULATED = {"micro_batch_tokens": LENGTH}
HALF = {"dtype": "bfloat16"}
RUNTIME = {"device": "cpu", "threads": 1}
RECOMPUTED = {"runtime": RUNTIME | {"activation_checkpointing": "full"}}
SEPARATE = {"document_mask": True}
RESHARD, KEEP = {"reshard_after_forward": True}, {"reshard_after_forward": False}


def make_config(folder, store, model, *, document_mask=False, **changes):
    settings = {
        "name": "student",
        "model": {"path": str(folder / model)} if (folder / model).exists() else {"shape": model},
        "data": {"store": str(store), "sequence_length": LENGTH, "document_mask": document_mask},
        "tokens": STEPS * SEQUENCES * LENGTH,
        "global_batch_tokens": SEQUENCES * LENGTH,
        "optim": {"lr": 1e-3, "eps": 1e-6, "warmup": 0.0},
        "runtime": RUNTIME,
        "teacher": {"kind": "unigram"},
        "objective": {"alpha": 0.4},
        "output": str(folder / "runs"),
    }
    return validate(RunConfig, settings | changes, "test")


def opened(config):
    world = distributed.start(config.runtime, config.parallel)
    student = open_student(config, RunDirectory(config.output / config.name), world)
    if config.teacher is not None:
        student.learn_from(open_teacher(config, world))
    student.model.train()
    return student


def micro_batches(student, step):
    size = (student.config.micro_batch_tokens or student.config.global_batch_tokens) // LENGTH
    batch = student.loader.batch(step)
    return [batch.rows(slice(start, start + size)) for start in range(0, len(batch.starts), size)]


def weights(student):
    return {name: gathered(weight.detach()).clone() for name, weight in student.model.named_parameters()}


def take_steps(students):
    """Train students together; (loss, ce, kd, gradient norm) of every step and student."""
    rows = []
    for step in range(STEPS):
        batches = micro_batches(students[0], step)
        inputs = [student.step_inputs(student.step) for student in students]
        reports = train_step(inputs, batches)
        for student, report in zip(students, reports, strict=True):
            student.step += 1
            rows.append([float(x) for x in (report.loss, report.ce, report.kd, report.grad_norm)])
    return torch.tensor(rows, dtype=torch.float64)


def result(config):
    student = opened(config)
    before = weights(student)
    rows = take_steps([student])
    return before, rows, weights(student)


def assert_near(found, expected, tolerance, what):
    (before, rows, after), (their_before, their_rows, their_after) = found, expected
    assert before.keys() == their_before.keys(), what
    for name, weight in before.items():
        assert torch.equal(weight, their_before[name]), (what, name, "as it was drawn")
    loss, weight_error = tolerance
    assert (rows / their_rows - 1).abs().max() < loss, (what, rows, their_rows)
    for name, weight in after.items():
        worst = float((weight - their_after[name]).abs().max())
        assert worst < weight_error, (what, name, worst)


def write_starts(folder, store):
    """Models to start from: biases and a position table, and one that leaves layers out."""
    torch.manual_seed(0)
    small = GPT2Config(vocab_size=301, n_embd=36, n_layer=2, n_head=3, n_positions=LENGTH, bos_token_id=0,
                       eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
    hub.save(GPT2LMHeadModel(small), folder / "gpt2", store)
    leaves_out = OPTConfig(vocab_size=301, hidden_size=36, ffn_dim=48, num_hidden_layers=2,
                           num_attention_heads=3, max_position_embeddings=LENGTH, word_embed_proj_dim=36,
                           layerdrop=0.5)  # fmt: skip
    hub.save(OPTForCausalLM(leaves_out), folder / "layerdrop", store)


def cases(size):
    """(model, settings, settings of `parallel`) of everything that is compared with one process."""
    for replicate in (1, 2, 4) if size == 4 else (1, 2):
        layout = {"replicate": replicate}
        for model in (*SHAPES, "gpt2"):
            yield model, ACCUMULATED, layout
        if size == 4:
            yield "llama", {}, layout
            yield "qwen3-tied", ACCUMULATED, layout | KEEP
            yield "llama", ACCUMULATED | HALF, layout
    # What else is done to a layer, inside what is sharded.
    yield "llama", ACCUMULATED | RECOMPUTED, {}
    yield "qwen3-tied", SEPARATE, {}


EXACT, COMPILED, ROUNDED = (2e-6, 2e-5), (2e-5, 5e-5), (5e-3, 3e-3)
"""Largest relative difference of losses and norms, and largest difference of weights after three steps."""


def compare(make, expected, size):
    for model, settings, layout in cases(size):
        found = result(make(model, **settings, parallel=layout))
        kind = next((kind for kind in ("dtype", "document_mask") if kind in settings), "")
        tolerance = ROUNDED if kind == "dtype" else EXACT
        assert_near(found, expected[model, kind], tolerance, (model, settings, layout))


def with_layers(store, recompute, compiled):
    return ACCUMULATED | {
        "data": {"store": str(store), "sequence_length": LENGTH, "document_mask": True},
        "runtime": {
            "device": "cpu",
            "threads": 1,
            "activation_checkpointing": recompute,
            "compile": compiled,
        },
    }


def compare_compiled(make, store, expected):
    """Compiled layers that recompute, of documents kept apart, give what plain ones give in one process."""
    settings = with_layers(store, "selective", compiled=True)
    for layout in ({"replicate": 1} | RESHARD, {"replicate": 1} | KEEP, {"replicate": 2}):
        found = result(make("llama", **settings, parallel=layout))
        assert_near(found, expected, COMPILED, (settings, layout))


def check_memory(make):
    """Every process holds its part of weights, gradients' moments and nothing else."""
    for replicate in (1, 2, 4):
        student = opened(make("llama", parallel={"replicate": replicate}))
        take_steps([student])
        shard = dist.get_world_size() // replicate
        rows = {name: -(-weight.shape[0] // shard) for name, weight in student.model.named_parameters()}
        for name, weight in student.model.named_parameters():
            state = student.optimizer.state[weight]
            for tensor in (weight, state["exp_avg"], state["exp_avg_sq"]):
                assert isinstance(tensor, DTensor), name
                assert tensor.to_local().shape[0] <= rows[name], name
                assert tensor.dtype == torch.float32, name
            assert weight.grad is None
        held = sum(weight.to_local().numel() for weight in student.parameters)
        assert held <= student.parameter_count / shard * 1.02 + 300, (held, student.parameter_count)


def check_traffic(make):
    """Collectives of a step of two micro-batches; the groups are two layers, embedding, head and the rest."""
    for settings, gathers, scatters in (
        # A layer is gathered for each forward and each backward pass, and reduced after each.
        (RESHARD, 2 * (2 + 2) + 2 + 1 + 1, 2 * 2 + 2 + 1 + 1),
        (KEEP, 2 + 1 + 1 + 1, 2 + 1 + 1 + 1),
    ):
        student = opened(make("llama", **ACCUMULATED, parallel=settings))
        take_steps([student])
        with Traffic() as traffic:
            train_step([student.step_inputs(student.step)], micro_batches(student, 0))
        counts = traffic.calls["_allgather_base_"], traffic.calls["_reduce_scatter_base_"]
        assert counts == (gathers, scatters), (settings, traffic.calls)


def check_use(make, whole):
    """Between steps, and before the first, a function sees the model that one process has."""
    tokens = torch.arange(2 * LENGTH).view(2, LENGTH)
    for model, (before, _, _) in whole.items():
        for settings in (RESHARD, KEEP):
            student = opened(make(model, parallel=settings))
            reference = hub.build(shapes.find_shape(model), 301, LENGTH, 1)
            reference.load_state_dict(before, strict=False)
            expected = reference(tokens).logits
            found = use_model(student.module, lambda loaded: loaded(tokens).logits)
            assert torch.equal(found, expected), model
            assert all(isinstance(weight, DTensor) for weight in student.model.parameters())
            take_steps([student])
            reference.load_state_dict(weights(student), strict=False)
            found = use_model(student.module, lambda loaded: loaded(tokens).logits)
            torch.testing.assert_close(found, reference(tokens).logits, rtol=1e-5, atol=1e-6)


def check_cohort(make):
    """Each of a cohort is what it is alone, to the bit."""
    configs = [make("llama", seed=seed, parallel={"replicate": 2}) for seed in (1, 2)]
    together = [opened(config) for config in configs]
    together[1].teacher = together[0].teacher
    take_steps(together)
    for student, config in zip(together, configs, strict=True):
        alone = opened(config)
        take_steps([alone])
        for name, weight in weights(alone).items():
            assert torch.equal(weights(student)[name], weight), name


def check_families():
    """Gradients of every family, over two processes with other tokens each, are those of the whole batch."""
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("replicate", "shard"))
    normed = {"inkling_text": partial(tiny_config, "inkling_text")}  # its embedding has a norm in it
    for family, settings in (FAMILIES | normed).items():
        whole, sharded = (_family(settings()) for _ in range(2))
        shard_model(sharded.model, Sharding(mesh, None, reshard_after_forward=True), sharded, sharded.head)
        for rank in range(dist.get_world_size()):
            _backward(whole, rank)
        _backward(sharded, dist.get_rank())
        for name, weight in whole.model.named_parameters():
            found = gathered(sharded.model.get_parameter(name).grad)
            torch.testing.assert_close(
                found, weight.grad, rtol=1e-4, atol=1e-6, msg=lambda text, at=(family, name): f"{at}: {text}"
            )


def _family(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    return ObjectiveModel(model, Objective(), VOCAB)


def _backward(module, rank):
    """Dropout and tokens are those of a rank."""
    torch.manual_seed(rank)
    tokens = torch.randint(VOCAB, (2, LENGTH))
    module(Batch(tokens, tokens.roll(-1, 1), (0, 1)), None, 0.0)[0].backward()


def check_refusals(make):
    with pytest.raises(UserError, match=r"layerdrop = 0\.5: .*set it to 0") as caught:
        opened(make("layerdrop"))
    assert len(str(caught.value).splitlines()) == 1


def work(make, store, expected):
    compare(make, expected, int(distributed.processes.place().size))
    if dist.get_world_size() == 2:
        check_families()
        compare_compiled(make, store, expected["compiled"])
    else:
        check_memory(make)
        check_traffic(make)
        check_use(make, {model: expected[model, ""] for model in SHAPES})
        check_cohort(make)
        check_refusals(make)
    distributed.stop()


def main(folder, store):
    torch.set_num_threads(1)
    shapes.LADDER.update({name: replace(shape, name=name) for name, shape in SHAPES.items()})
    folder = Path(folder)
    write_starts(folder, Path(store))
    make = partial(make_config, folder, store)
    expected = {(model, ""): result(make(model)) for model in (*SHAPES, "gpt2")}
    expected["llama", "dtype"] = result(make("llama", **HALF))
    expected["qwen3-tied", "document_mask"] = result(make("qwen3-tied", **SEPARATE))
    expected["compiled"] = result(make("llama", **with_layers(store, "none", compiled=False)))
    for size in (2, 4):
        forked_ranks.run(size, partial(work, make, store, expected), seconds=300)


if __name__ == "__main__":
    main(*sys.argv[1:])
