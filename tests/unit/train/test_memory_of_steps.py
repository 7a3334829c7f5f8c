"""The formula of the memory plan, torch's trackers on tensors without values, and real memory: one number."""

from __future__ import annotations

import dataclasses
import itertools
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_steps import open_steps, take_steps, traced

from tutelage.config.load import to_yaml
from tutelage.config.runtime_config import RuntimeConfig
from tutelage.models import hub
from tutelage.models.devices import Hardware, find_device
from tutelage.models.memory import Footprint, _kept_when_recomputed, _layer_bytes, plan_memory
from tutelage.models.shapes import find_shape
from tutelage.models.sharding import decoder_layers
from tutelage.run_footprint import footprint
from tutelage.train.distributed import World
from tutelage.train.layers import recompute

SCRIPT = Path(__file__).parents[2] / "support" / "measured_steps.py"
TINY = {"shape": "nano-2m", "vocab": 4096, "batch": 4096, "micro": 1024, "teacher": "nano-2m"}
MID = {"shape": "nano-20m", "vocab": 8192, "batch": 2048, "micro": None, "dtype": "bfloat16"}
LONG = {"shape": "nano-2m", "vocab": 8192, "batch": 8192, "micro": None}
HALF = {"shape": "nano-20m", "vocab": 8192, "batch": 8192, "micro": 1024, "dtype": "bfloat16"}


@pytest.fixture
def run(make_config):
    """The config of a case."""

    def make(case, **sections):
        batch = case["batch"]
        if case.get("teacher"):
            sections |= {"teacher": {"kind": "model", "path": "x"}, "objective": {"alpha": 0.4}}
        base = make_config().data.store
        mask = sections.pop("mask", False)
        sections["data"] = {"store": str(base), "sequence_length": 256, "document_mask": mask}
        return make_config(
            model={"shape": case["shape"]},
            tokens=100 * batch,
            global_batch_tokens=batch,
            micro_batch_tokens=case["micro"],
            dtype=case.get("dtype", "float32"),
            checkpoint={"asynchronous": False},  # the steps here are not saved
            **sections,
        )

    return make


def by_formula(config, case, processes=1, kind="cpu"):
    teacher = case.get("teacher")
    hardware = Hardware("here", find_device("cpu"), processes, 1e12, cuda=kind == "cuda")
    taught = [] if teacher is None else [find_shape(teacher)]
    return plan_memory(footprint(config, find_shape(case["shape"]), taught, case["vocab"], hardware))


GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def measured(config, case, tmp_path, allocator):
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    command = [sys.executable, str(SCRIPT), str(file), str(case["vocab"])]
    done = subprocess.run(
        [*command, *([case["teacher"]] if case.get("teacher") else [])],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | allocator,
    )
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("case", [TINY, MID], ids=["tiny", "mid"])
def test_trace_and_formula_are_what_a_process_takes(case, run, tmp_path):
    config = run(case)
    bytes_taken = measured(config, case, tmp_path, GIVEN_BACK)
    total, _ = traced(config, case["vocab"], teacher=case.get("teacher"))
    assert total == pytest.approx(bytes_taken, rel=0.1)
    assert by_formula(config, case).tensors == pytest.approx(total, rel=0.1)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator keeps other things")
@pytest.mark.parametrize(("case", "recomputation"), [(MID, "none"), (LONG, "full")], ids=["none", "full"])
def test_what_the_allocator_keeps_is_planned(case, recomputation, run, tmp_path):
    config = run(case, runtime={"activation_checkpointing": recomputation})
    # What it keeps differs from start to start: by a fifth of the mean in 26 of them.
    taken = statistics.median(measured(config, case, tmp_path, {}) for _ in range(3))
    assert by_formula(config, case).total == pytest.approx(taken, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "sections"),
    [
        (HALF | {"micro": 2048, "teacher": "nano-6m"}, {"parallel": {"replicate": 2}}),
        (HALF | {"micro": 2048}, {"parallel": {"reshard_after_forward": False}}),
        (HALF | {"dtype": "float32"}, {"runtime": {"activation_checkpointing": "full"}, "mask": True}),
    ],
    ids=["hybrid-taught", "keep-gathered", "recomputed-masked"],
)
def test_the_formula_is_what_a_process_of_four_takes(case, sections, run):
    config = run(case, **sections)
    total, parts = traced(config, case["vocab"], 4, case.get("teacher"))
    assert by_formula(config, case, 4).tensors == pytest.approx(total, rel=0.12)
    if "teacher" not in case:
        assert parts["OptState"] == pytest.approx(2 * parts["Sharded Param"], rel=0.01)


def kept(run):
    """Bytes that compiled layers keep of 64 tokens, besides weights and copies of them."""
    model = hub.build(run.shape, 16, 64, seed=1).train()
    recompute(model, RuntimeConfig(activation_checkpointing=run.recomputation))
    torch._dynamo.reset()
    for layer in decoder_layers(model):
        layer.compile(backend="aot_eager_decomp_partition")  # the choice of what is kept is inductor's
    weights, found = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens_BT = torch.arange(64).unsqueeze(0) % 16
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=run.half),
    ):
        model.model(input_ids=tokens_BT, use_cache=False)
    mine = (t for place, t in found.items() if place not in weights and 64 in t.shape)
    return sum(tensor.untyped_storage().nbytes() for tensor in mine)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch itself, while it compiles
def test_a_compiled_layer_keeps_what_the_formula_says():
    for half, recomputation in itertools.product((True, False), ("none", "selective")):
        one, two = (
            Footprint(
                shape=dataclasses.replace(find_shape("qwen3-0.15b"), layers=layers),
                vocab_size=16,
                micro_batch=64,
                micro_batches=1,
                chunk=64,
                half=half,
                recomputation=recomputation,
                compiled=True,
            )
            for layers in (1, 2)
        )
        layer = _layer_bytes(one) if recomputation == "none" else _kept_when_recomputed(one)
        assert 64 * layer == pytest.approx(kept(two) - kept(one), rel=0.01), (half, recomputation)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", [TINY, MID], ids=["tiny", "mid"])
def test_trace_and_formula_are_what_a_gpu_allocates(case, run):
    # Compiled layers keep about two thirds of what these count, so nothing is compiled.
    config, device = run(case, runtime={"compile": False}), torch.device("cuda", 0)
    torch.cuda.reset_peak_memory_stats()
    take_steps(open_steps(config, case["vocab"], World(device), case.get("teacher")))
    allocated = torch.cuda.max_memory_allocated()
    total, _ = traced(config, case["vocab"], teacher=case.get("teacher"), device=device)
    assert total == pytest.approx(allocated, rel=0.1)
    assert by_formula(config, case, kind="cuda").total == pytest.approx(total, rel=0.15)
