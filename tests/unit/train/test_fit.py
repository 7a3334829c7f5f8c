"""`train --plan`, and the check before step 1: what cannot fit is refused, what may fit is not."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from training import Notes
from transformers import AutoModelForCausalLM, LlamaConfig, Starcoder2Config

from tutelage.config.load import validate
from tutelage.config.teacher_config import TeachConfig
from tutelage.data.store import open_store
from tutelage.errors import UserError
from tutelage.evals.evaluate import EvalRequest, evaluate
from tutelage.evals.evaluated_model import EvaluatedModel
from tutelage.evals.scoring import memory_warning
from tutelage.models import hub
from tutelage.models.devices import Hardware
from tutelage.models.flops import parameters
from tutelage.models.forward_memory import ForwardPass, scoring_parts
from tutelage.models.memory import plan_memory
from tutelage.models.shapes import find_shape, read_shape
from tutelage.run import run, run_cohort
from tutelage.run_footprint import footprint, teacher_shapes
from tutelage.run_plan import check_fits, out_of_memory, plan_run, plan_together
from tutelage.teachers.cache import job
from tutelage.teachers.cache.cache_writer import write_cache
from tutelage.teachers.cache.job import plan_cache


@pytest.fixture
def free(monkeypatch):
    """Set the memory that is free on every device of this machine."""

    def set_to(size):
        found = Hardware.here("cpu", 1, 1)
        here = Hardware(found.name, found.device, found.devices, size, found.cuda)
        monkeypatch.setattr(Hardware, "here", lambda *_, **__: here)

    return set_to


def test_what_cannot_fit_is_refused_before_anything_is_written(make_config, free):
    config = make_config()
    least = plan_run(config, Hardware.here("cpu", 1, 1)).least
    free(0.9 * least)
    with pytest.raises(
        UserError, match=r"run tiny: it needs .* GB on each device, and .* GB are free"
    ) as caught:
        run(config)
    table = str(caught.value)
    for part in ("weights", "objective", "activations", "each device", "turn: "):
        assert part in table
    assert not list(config.output.glob("*/model"))
    assert not list(config.output.glob("*/checkpoints"))


def test_what_may_fit_is_trained_with_a_warning(make_config, free):
    config = make_config()
    plan = plan_run(config, Hardware.here("cpu", 1, 1))
    assert plan.least < plan.memory.total
    free((plan.least + plan.memory.total) / 2)
    notes = Notes()
    assert run(config, notes).is_done()
    assert [note for note in notes.warnings if "it may need" in note and "turn: " in note]


def test_processes_on_a_cpu_have_its_memory_together(make_config, monkeypatch):
    """Each was said to have all of it, and more of them to need less."""
    monkeypatch.setattr("tutelage.models.devices._available", lambda: 8e5)
    assert Hardware.of_run("cpu", 4).memory == 2e5
    named, config = Hardware.named("cpu", 1), make_config(model={"shape": "nano-20m"})
    small = Hardware(named.name, named.device, 1, 8e5, named.cuda)
    for hardware, advised in ((small, True), (Hardware.of_run("cpu", 1), False)):
        settings = [one.setting for one in plan_run(config, hardware).remedies]
        assert any("processes, one per device" in one for one in settings) == advised


def test_processes_that_start_on_a_cpu_have_its_memory_together(make_config, monkeypatch):
    """Those of other machines have theirs."""
    config = make_config()
    least = plan_run(config, Hardware.here("cpu", 4, 1)).least
    monkeypatch.setattr("tutelage.models.devices._available", lambda: 3 * least)
    with pytest.raises(UserError, match=r"needs .* GB on each device, and .* GB are free"):
        check_fits([config], "cpu", 4, 4)
    check_fits([config], "cpu", 4, 2)


def test_processes_that_cannot_share_a_step_get_no_plan(make_config):
    config = make_config()
    sequences = config.global_batch_tokens // config.data.sequence_length
    wrong = sequences + 1
    with pytest.raises(
        UserError, match=rf"run tiny: global_batch_tokens: {sequences} seq.* by {wrong} ranks"
    ):
        plan_run(config, Hardware.named("h100", wrong))


def test_what_fits_is_not_spoken_of(make_config, free):
    config = make_config()
    free(1.1 * plan_run(config, Hardware.here("cpu", 1, 1)).memory.total)
    assert check_fits([config], "cpu", 1, 1) is None


def test_a_run_out_of_memory_gets_the_table(make_config):
    lines = out_of_memory([make_config()], "cpu", 1, 1)
    assert any(line.startswith("weights") for line in lines)
    assert any(line.startswith("turn: ") for line in lines)


def test_the_command_plans_for_devices_that_are_not_here(command, store, tmp_path):
    (tmp_path / "run.yaml").write_text(
        f"model: {{shape: llama-8b}}\ndata: {{store: {store}, sequence_length: 4096}}\n"
        "tokens: 50B\nglobal_batch_tokens: 1048576\nmicro_batch_tokens: 4096\n"
    )
    code, out, _ = command("train", "run.yaml", "--plan", "--device", "h100")
    assert "of model; without a cache of targets" in " ".join(out.split())
    assert code == 0
    assert "GB too much" in out
    assert "turn: 2 processes" in out or "turn: 4 processes" in out
    code, out, _ = command("train", "run.yaml", "--plan", "--device", "h100", "--devices", "8")
    assert code == 0
    assert "fits" in out
    assert "8 x h100" in out
    assert not (tmp_path / "runs").exists()
    code, _, err = command("train", "run.yaml", "--plan", "--device", "h10")
    assert code == 2
    assert "did you mean 'h100'" in err


@pytest.mark.parametrize(
    ("checkpoint", "left"),
    [
        ({"every": 7, "keep": 2}, 2),  # after steps 7 and 10
        ({"every": 2.9, "keep": 100}, 5),  # every two steps, in whole batches
        ({"every": 6, "keep": 1, "keep_every": 3.9}, 4),
        ({"every": 100, "keep": 3}, 1),
    ],
)
def test_checkpoints_take_no_more_of_the_disk_than_planned(checkpoint, left, make_config):
    config = make_config()
    batch = config.global_batch_tokens
    counts = {name: number if name == "keep" else int(number * batch) for name, number in checkpoint.items()}
    config = make_config(tokens=10 * batch, checkpoint=counts)
    plan = plan_run(config, Hardware.here("cpu", 1, 1))
    done = run(config)
    weights = done.state()["parameters"]
    assert len(done.saved()) == left
    assert left <= plan.checkpoint_bytes / (12 * weights) <= left + 1  # one is being written


@pytest.mark.parametrize("option", [("--device", "cpu"), ("--devices", "2")])
def test_a_device_to_plan_for_is_none_to_train_on(command, store, tmp_path, option):
    (tmp_path / "run.yaml").write_text(f"model: {{shape: nano-20k}}\ndata: {{store: {store}}}\ntokens: 20K\n")
    code, _, err = command("train", "run.yaml", *option)
    assert code == 2
    assert "say what to --plan for; to train, set runtime.device" in err
    assert not (tmp_path / "runs").exists()


def test_two_numbers_of_devices_are_not_planned_for(command, store, tmp_path):
    (tmp_path / "run.yaml").write_text(f"model: {{shape: nano-20k}}\ndata: {{store: {store}}}\ntokens: 20K\n")
    code, _, err = command("train", "run.yaml", "--plan", "--nproc", "2", "--devices", "4")
    assert (code, err) == (
        2,
        "error: --nproc 2 --devices 4: a plan has one process for each device; give one of them\n",
    )
    for numbers in (["--nproc", "2", "--devices", "2"], ["--nproc", "2"], ["--devices", "2"]):
        assert "2 x " in command("train", "run.yaml", "--plan", "--device", "h100", *numbers)[1]


@pytest.mark.parametrize("change", [{}, {"num_key_value_heads": 2}, {"tie_word_embeddings": True}])
def test_a_shape_is_read_from_the_config_of_a_model(change):
    config = LlamaConfig(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                         vocab_size=320, **change)  # fmt: skip
    shape = read_shape(config.to_dict(), "somewhere")
    model = AutoModelForCausalLM.from_config(config)
    assert parameters(shape, 320).total == sum(p.numel() for p in model.parameters())


def test_a_family_whose_weights_the_formula_does_not_count_has_no_plan(make_config, free, tmp_path):
    """Starcoder 2 has the fields of Llama and an MLP without a gate: less than the formula would say."""
    config = Starcoder2Config(hidden_size=48, intermediate_size=96, num_hidden_layers=2,
                              num_attention_heads=4, num_key_value_heads=2, vocab_size=300)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "start")
    run_config = make_config(model={"path": str(tmp_path / "start"), "assume_same_tokenizer": True})
    with pytest.raises(UserError, match=r"model\.path = .*start: .*, not of model_type starcoder2;"):
        plan_run(run_config, Hardware.here("cpu", 1, 1))
    free(1.0)
    assert check_fits([run_config], "cpu", 1, 1) is None  # nothing is refused by a formula that is another's


def test_runs_that_train_together_are_checked_together(make_config, free, command, store, tmp_path):
    """Each was checked as if it were alone: three of 28.9M weights took four times what was planned."""
    configs = [make_config(optim={"lr": lr}, name=f"lr-{lr}") for lr in (1e-3, 2e-3, 3e-3)]
    alone = plan_run(configs[0], Hardware.here("cpu", 1, 1)).memory
    weights = alone.parts["weights"] / 4
    free(alone.total + 0.5e6)
    for config in configs:
        assert check_fits([config], "cpu", 1, 1) is None
    warning = check_fits(configs, "cpu", 1, 1)
    assert warning is not None
    assert "runs lr-0.001, lr-0.002, lr-0.003: together they may need" in warning
    assert "turn: one run after the other" in warning
    together = plan_together(configs, Hardware.here("cpu", 1, 1))
    assert together.memory.parts["other students"] == 2 * (16 + 12) * weights  # with a copy for checkpoints
    assert together.memory.tensors == pytest.approx(alone.tensors + 2 * 28 * weights)
    free(0.9 * together.least)
    with pytest.raises(UserError, match=r"runs lr-0.001, lr-0.002, lr-0.003: together they need"):
        run_cohort(configs)
    texts = [f"model: {{shape: nano-50k}}\ndata: {{store: {store}}}\ntokens: {n}K\n" for n in (20, 30)]
    for name, text in zip("ab", texts, strict=True):
        (tmp_path / f"{name}.yaml").write_text(text)
    code, out, _ = command("train", "a.yaml", "b.yaml", "--plan", "--device", "h100")
    assert code == 0
    assert "together 2 runs" in " ".join(out.split())
    assert out.count("other students") == 1


def test_a_larger_student_without_a_teacher_stands_beside_that_of_the_others(make_config, teacher):
    plain = make_config(model={"shape": "nano-700k"}, name="plain")
    taught = make_config(teacher=teacher, objective={"alpha": 0.4}, name="taught")
    here = Hardware.here("cpu", 1, 1)
    parts = plan_together([taught, plain], here).memory.parts
    assert parts["teacher"] == plan_run(taught, here).memory.parts["teacher"]
    assert parts["weights"] == plan_run(plain, here).memory.parts["weights"]


@pytest.fixture
def teacher(tmp_path):
    """A teacher of a width of its own."""
    config = LlamaConfig(hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                         vocab_size=300)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "teacher")
    return {"kind": "model", "path": str(tmp_path / "teacher"), "assume_same_tokenizer": True}


def test_the_head_beside_hidden_states_is_planned_though_the_cache_is_not_written_yet(make_config, teacher):
    plans = {}
    for name, kept in (("hidden", {"kind": "hidden"}), ("ids", {"kind": "sample_min_variance"})):
        taught = {"teacher": teacher | {"cache": {"format": kept}}, "objective": {"alpha": 0.4}}
        config = make_config(**taught, micro_batch_tokens=64)
        plans[name] = plan_run(config, Hardware.named("cpu", 1)).memory
        assert plans[name].moment == "writing of the cache, if it is not there yet"
        assert not plan_run(config, Hardware.named("cpu", 1)).least > plans[name].total
        live, cached = teacher_shapes(config)
        needs = footprint(config, find_shape("nano-50k"), live, 300, Hardware.named("cpu", 1), cached)
        plans[name] = plan_memory(replace(needs, cached=())).parts["cache"]
    tokens = 2 * 256  # of a step, and of the next, of which targets are read ahead
    assert plans["hidden"] == 4 * 300 * 96 + 96 * (2 * tokens + 4 * 64)
    assert plans["ids"] == (12 * 16 + 8) * (tokens + 64)


def test_a_mean_of_caches_has_the_head_of_each(make_config, teacher, store, tmp_path):
    settings = {"store": str(store), "teacher": teacher, "format": {"kind": "hidden"}, "context_length": 32}
    cache = write_cache(validate(TeachConfig, settings | {"output": str(tmp_path / "caches")}, "test"))
    one = {"kind": "cache", "path": str(cache)}
    found = []
    for taught in (one, {"kind": "mean", "of": [one, one]}):
        config = make_config(teacher=taught, objective={"alpha": 0.4})
        found.append(plan_run(config, Hardware.here("cpu", 1, 1)).memory.parts["cache"])
    assert found[1] == 2 * found[0] > 2 * 4 * 300 * 96


def test_attention_that_forms_all_pairs_is_planned(make_config):
    """By the scores of 64 tokens, 4 heads and 2 layers, in the forward pass: 4 bytes a pair."""
    totals = []
    for attention in (None, "eager"):
        config = make_config(model={"shape": "nano-50k", "attn_implementation": attention})
        totals.append(plan_run(config, Hardware.here("cpu", 1, 1)).memory.parts["activations"])
    assert totals[1] - totals[0] > 256 * 2 * 4 * 32 * 4


def test_a_cache_is_written_with_a_warning_where_its_teacher_may_not_fit(teacher, store, tmp_path, free):
    """Only runs were checked: `teach` said nothing, and was killed."""
    settings = {"store": str(store), "teacher": teacher, "context_length": 32, "batch_tokens": 1024}
    config = validate(TeachConfig, settings | {"output": str(tmp_path / "caches")}, "test")
    weights = 4 * parameters(find_shape("nano-50k"), 300).total
    free(weights)
    notes = Notes()
    write_cache(config, notes)
    (warning,) = notes.warnings
    assert "cache-" in warning
    assert "it may need 0.0" in warning
    assert "turn: a smaller batch_tokens, dtype=bfloat16" in warning
    for part in ("teacher", "activations", "cache", "allocator", "writing of the cache"):
        assert part in warning
    turned = plan_cache(validate(TeachConfig, settings | {"dtype": "bfloat16", "batch_tokens": 32}, "test"))
    free(0.0)
    assert "turn:" not in job.memory_warning(turned)  # what could be turned is
    notes = Notes()
    write_cache(config, notes)  # it is there
    assert notes.warnings == []
    free(1e9)
    write_cache(config.model_copy(update={"seed": 1}), notes)
    assert notes.warnings == []


def test_a_model_is_scored_with_a_warning_where_it_may_not_fit(make_config, store, tmp_path, free):
    directory, request = run(make_config()), EvalRequest({}, {"own": store}, tmp_path, 1, 64, "cpu")
    for size, warned in ((1e9, False), (1e6, True)):
        free(size)
        notes = Notes()
        evaluate([str(directory.path)], request, notes)
        assert [f"{directory.id}: it may need" in note for note in notes.warnings] == [True] * warned
        (directory.path / "scores.jsonl").unlink()


def test_scoring_is_planned_by_weights_batch_and_rows_of_logits():
    """By hand: 4 bytes a weight, 4,096 tokens through an MLP, three blocks of 2,048 rows of 500 ids."""
    shape = find_shape("nano-50k")
    one = ForwardPass(shapes=[shape], vocab_size=500, tokens=4096, bytes=4)
    parts = scoring_parts(one, 2048)
    layer = 48 * 16 * 2 * (4 + 2) + 3 * 48 * 120 + 2 * 48
    assert parts["weights"] == 4 * (2 * layer + 48 + 2 * 500 * 48)
    assert parts["activations"] == 4096 * 4 * (3 * 120 + 3 * 48)
    assert parts["logits"] == 3 * 4 * 2048 * 500


def test_half_precision_is_known_by_either_name_in_config_json(store, tmp_path, free):
    vocab_size, path = open_store(store).vocab_size, tmp_path / "model"
    hub.save(hub.build(find_shape("nano-50k"), vocab_size, 64, seed=0), path, store)
    (path / "checksums.json").unlink()  # config.json is changed on purpose
    settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
    kind = settings.pop("dtype", None) or settings.pop("torch_dtype")
    assert kind == "float32"
    target = SimpleNamespace(store=open_store(store), context=64)
    free(0.0)
    told = {}
    for name, value in (("dtype", "float32"), ("dtype", "bfloat16"), ("torch_dtype", "bfloat16")):
        (path / "config.json").write_text(json.dumps(settings | {name: value}), encoding="utf-8")
        told[name, value] = memory_warning(EvaluatedModel("m", path, 64, tmp_path), [target], "cpu")
    assert told["dtype", "bfloat16"] == told["torch_dtype", "bfloat16"] != told["dtype", "float32"]
