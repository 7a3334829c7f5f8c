"""`train --plan`, and the check before step 1: what cannot fit is refused, what may fit is not."""

from __future__ import annotations

import pytest
from training import Notes
from transformers import AutoModelForCausalLM, LlamaConfig, Starcoder2Config

from tutelage.errors import UserError
from tutelage.models.devices import Hardware
from tutelage.models.flops import parameters
from tutelage.models.shapes import read_shape
from tutelage.run import run
from tutelage.run_plan import check_fits, out_of_memory, plan_run


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
        check_fits(config, "cpu", 4, 4)
    check_fits(config, "cpu", 4, 2)


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
    assert check_fits(config, "cpu", 1, 1) is None


def test_a_run_out_of_memory_gets_the_table(make_config):
    lines = out_of_memory(make_config(), "cpu", 1, 1)
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
    assert check_fits(run_config, "cpu", 1, 1) is None  # nothing is refused by a formula that is another's
