from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from tutelage.config.load import validate
from tutelage.config.study_config import StudyConfig
from tutelage.config.teacher_config import HiddenFormat, MinVarianceFormat, MultinomialFormat, TopKFormat
from tutelage.errors import UserError
from tutelage.models.devices import DEVICES, find_device
from tutelage.models.flops import forward_flops, model_forward_flops, training_flops
from tutelage.models.shapes import find_shape
from tutelage.study.cache_cost import kept_bytes
from tutelage.study.cost import Machine, by_kind, by_purpose, duration, forecast, works_of
from tutelage.study.expand import expand
from tutelage.study.plan import draft_of
from tutelage.study.presets import demo_study, load_study, preset_names
from tutelage.study.timings import Speeds, Timing, chain_weights, critical_path, estimate_error, makespan
from tutelage.teachers.cache.codec import CodecSettings
from tutelage.teachers.cache.formats import make_codec
from tutelage.teachers.cache.shard import INDEX_BYTES

DEMO = demo_study(2, "100K", quick=False)


@st.composite
def graphs(draw):
    size = draw(st.integers(1, 8))
    costs = {str(i): draw(st.floats(0.5, 10)) for i in range(size)}
    needs = {str(i): [str(j) for j in range(i) if draw(st.booleans())] for i in range(size)}
    return costs, needs


@settings(deadline=None)
@given(graphs(), st.integers(1, 4))
def test_makespan_lies_between_its_bounds(graph, devices):
    costs, needs = graph
    total, path = sum(costs.values()), sum(costs[name] for name in critical_path(costs, needs))
    took = makespan(costs, needs, devices)
    assert max(path, total / devices) <= took * (1 + 1e-9)
    assert took <= (total - path) / devices + path + 1e-9  # Graham's bound
    assert makespan(costs, needs, 1) == pytest.approx(total)
    assert makespan(costs, needs, len(costs)) == pytest.approx(path)


@settings(deadline=None)
@given(graphs())
def test_the_critical_path_is_the_costliest_chain(graph):
    costs, needs = graph
    chains = {(name,) for name in costs}
    while longer := {(need, *chain) for chain in chains for need in needs[chain[0]]} - chains:
        chains |= longer
    costliest = max(sum(costs[name] for name in chain) for chain in chains)
    path = critical_path(costs, needs)
    assert sum(costs[name] for name in path) == pytest.approx(costliest)
    assert max(chain_weights(costs, needs).values()) == pytest.approx(costliest)
    assert all(before in needs[after] for before, after in itertools.pairwise(path))


TRAINED = 97 * 1024
"""Of 100K tokens, in whole batches."""


def test_flops_are_told_apart_and_add_up_to_the_shapes():
    works, caches, notes = works_of([expand(DEMO)])
    assert {kind: runs for kind, (runs, _) in by_kind(works).items()} == {
        "teacher": 6,  # three for each of two seeds
        "baseline": 2,
        "student": 14,
    }
    purposes = by_purpose(works, caches)
    per_token = {
        name: training_flops(forward_flops(find_shape(name), 512, 128))
        for name in ("nano-20k", "nano-50k", "nano-150k")
    }
    assert purposes["teacher training"] == pytest.approx(TRAINED * 2 * sum(per_token.values()))
    assert purposes["student training"] == pytest.approx(TRAINED * 16 * per_token["nano-50k"])
    assert purposes["teacher forward"] == pytest.approx(TRAINED * 4 * sum(per_token.values()) / 3)
    assert (caches.flops, caches.bytes) == (0, 0)
    assert notes == ["demo: of 100K tokens 99,328 are trained, in whole batches of 1,024"]


def test_questions_of_recall_are_scored_too():
    def scoring(*settings):
        works, _, _ = works_of([expand(load_study("mini", settings))])
        return [work.scoring_flops for work in works]

    asked, not_asked = scoring("run.eval.recall=true"), scoring()
    assert all(more > less > 0 for more, less in zip(asked, not_asked, strict=True))


def test_runs_that_studies_share_count_once():
    one, _, _ = works_of([expand(DEMO)])
    assert len(works_of([expand(DEMO), expand(DEMO)])[0]) == len(one)
    more = demo_study(3, "100K", quick=False)
    assert len(works_of([expand(DEMO), expand(more)])[0]) == len(works_of([expand(more)])[0])
    other = validate(StudyConfig, DEMO.model_dump(mode="json") | {"run": {"optim": {"lr": 0.1}}}, "test")
    assert len(works_of([expand(DEMO), expand(other)])[0]) == 2 * len(one)


def test_a_kept_teacher_is_run_once_and_takes_room():
    raw = DEMO.model_dump(mode="json")
    raw["teachers"]["strong"]["cache"] = {"format": {"kind": "sample_min_variance", "ids": 16}}
    works, caches, _ = works_of([expand(validate(StudyConfig, raw, "test"))])
    forward = forward_flops(find_shape("nano-150k"), 512, 128)
    assert caches.flops == pytest.approx(TRAINED * 2 * forward)  # a teacher for each of two seeds
    assert caches.bytes == pytest.approx(TRAINED * 2 * (16 * (9 + 16) / 8 + INDEX_BYTES / 128))
    assert all(work.cost.teacher_flops == 0 for work in works if work.cell.teacher == "strong")
    raw["teachers"]["strong"]["cache"] = {"format": {"kind": "hidden", "dtype": "float32"}}
    _, caches, _ = works_of([expand(validate(StudyConfig, raw, "test"))])
    width = find_shape("nano-150k").hidden
    states, head = TRAINED * (4 * width + 4 + INDEX_BYTES / 128), 4 * 512 * width
    assert caches.bytes == pytest.approx(2 * (states + head))


@pytest.mark.parametrize("text", [None, 500_000])
def test_a_cache_covers_the_whole_text_and_takes_time(text):
    """340,101 positions were kept for students that read 19,968 tokens; a plan said a seventeenth."""
    raw = DEMO.model_dump(mode="json")
    raw["teachers"]["strong"]["cache"] = {"format": {"kind": "sample_min_variance", "ids": 16}}
    study = expand(validate(StudyConfig, raw, "test"))
    works, caches, notes = works_of([study], texts=[text])
    covered = 2 * (text or TRAINED)  # a teacher for each of two seeds
    assert caches.flops == pytest.approx(covered * forward_flops(find_shape("nano-150k"), 512, 128))
    assert caches.bytes == pytest.approx(covered * (16 * (9 + 16) / 8 + INDEX_BYTES / 128))
    assert any("the whole training text" in note for note in notes) == (text is None)
    assert duration(works, 1, lambda *_: 1e9).device == pytest.approx(
        sum(by_purpose(works, caches).values()) / 1e9
    )
    makers = [work.cell.teacher for work in works if work.cache_flops]
    assert makers == ["strong", "strong"]


def test_a_student_of_cached_targets_is_planned_as_it_will_count_itself():
    """Its speed is its FLOPs by the seconds that it took, in which no teacher ran."""
    raw = DEMO.model_dump(mode="json")
    raw["teachers"]["strong"]["cache"] = {}
    runs = draft_of(expand(validate(StudyConfig, raw, "test"))).runs
    (alone,) = {run.flops for run in runs if run.kind == "baseline"}
    assert {run.flops for run in runs if run.teacher == "strong" and run.kind == "student"} == {alone}


def test_what_cannot_be_run_is_named_before_anything_runs():
    raw = DEMO.model_dump(mode="json")
    with pytest.raises(UserError, match="nano-50kk"):
        works_of(
            [expand(validate(StudyConfig, json.loads(json.dumps(raw).replace("nano-50k", "nano-50kk")), "t"))]
        )
    with pytest.raises(UserError, match="did you mean 'lr'"):
        works_of([expand(validate(StudyConfig, raw | {"run": {"optim": {"lrr": 1}}}, "t"))])
    with pytest.raises(UserError, match="did you mean 'h100'"):
        find_device("H10O")
    with pytest.raises(UserError, match="did you mean 'demo'"):
        load_study("demoo")
    raw["corpus"]["tokenizer"]["path"] = "/no/such/tokenizer"
    with pytest.raises(UserError, match="is not here"):
        works_of([expand(validate(StudyConfig, raw, "t"))])


def test_a_device_can_work():
    assert all(device.mfu <= 1 and device.memory > 1e9 for device in DEVICES.values())


def test_a_run_larger_than_a_device_is_divided_and_takes_as_many_at_a_time():
    study = load_study("paper/mixing", ["run.parallel.processes=1"])
    works, _, _ = works_of([expand(study)], "h100")
    processes = {work.cell.shape: work.processes for work in works}
    assert all(work.memory <= 0.9 * DEVICES["h100"].memory for work in works)
    assert processes["llama-0.7b"] == processes["llama-1.7b"] == 1
    assert processes["llama-8b"] > 1  # 16 bytes per weight are 128 GB
    smaller, _, _ = works_of([expand(study)], "l40s")
    assert sum(work.processes for work in smaller) > sum(work.processes for work in works)
    took = duration(works, 64, lambda *_: 1e15)
    assert took.device == pytest.approx(sum(work.flops for work in works) / 1e15)
    assert took.wall >= took.device / 64


@pytest.mark.parametrize("name", [name for name in preset_names() if name.startswith("paper/")])
def test_every_run_of_the_paper_fits_on_the_devices_that_its_file_gives_it(name):
    works, _, _ = works_of([expand(load_study(name))], "h100")
    assert {work.processes for work in works} == {8}
    assert all(work.memory <= 0.9 * DEVICES["h100"].memory for work in works)


def test_pieces_that_take_several_devices_share_them():
    costs, needs = {"a": 4.0, "b": 2.0, "c": 2.0}, {"a": [], "b": [], "c": []}
    assert makespan(costs, needs, 2, {"a": 2}) == 6  # a alone, then b beside c
    assert makespan(costs, needs, 3, {"a": 2}) == 4  # b and then c beside a
    assert makespan(costs, needs, 4, {"a": 2}) == 4


def test_the_plan_of_a_study_says_what_each_size_takes():
    found = forecast([expand(load_study("paper/mixing"))], Machine("h100", 64, None, None), None)
    assert sum(row["runs"] for row in found["sizes"]) == found["total_runs"]
    assert max(row["devices"] for row in found["sizes"]) == found["memory"]["devices"]
    assert max(row["bytes"] for row in found["sizes"]) == found["memory"]["bytes"]
    hours = sum(row["runs"] * row["hours"] * row["devices"] for row in found["sizes"])
    assert hours * 3600 == pytest.approx(found["time"]["device_seconds"])


def test_time_energy_and_cost_follow_from_the_device():
    works, _, _ = works_of([expand(DEMO)])
    device = DEVICES["h100"]
    took = duration(works, 2, lambda *_: 0.5 * device.peak_flops)
    assert took.device == pytest.approx(sum(work.flops for work in works) / (0.5 * device.peak_flops))
    assert took.path_seconds <= took.wall <= took.device
    found = forecast([expand(DEMO)], Machine("h100", 2, 0.5, 3.0), None)
    assert found["energy_kwh"] == pytest.approx(700 * took.device / 3.6e6)
    assert found["cost"] == pytest.approx(3.0 * took.device / 3600)
    assert found["memory"]["fits"]
    assert json.loads(json.dumps(found)) == found


def test_speed_is_that_of_the_most_alike_and_its_error_is_left_out_of_itself():
    timings = [
        Timing("a", None, 100.0, 10.0),
        Timing("a", None, 100.0, 10.0),
        Timing("a", "t", 100.0, 20.0),
        Timing("b", None, 100.0, 5.0),
    ]
    speeds = Speeds(timings)
    assert speeds.of("a", None) == 10
    assert speeds.of("a", "t") == 5
    assert speeds.of("a", "other") == 10
    assert speeds.of("new", None) == 10
    assert speeds.of("b", None, without=20.0) == 10
    assert estimate_error(timings) == pytest.approx(0.25)  # of 0, 0, |20/10-1|, |5/10-1|
    assert estimate_error(timings[:1]) is None
    assert Speeds([]).of("a", None) is None


@pytest.mark.parametrize("vocab_size", [257, 1000, 128_000])
@pytest.mark.parametrize(
    ("kept", "is_exact"),
    [
        (TopKFormat(kind="topk", k=8), True),
        (TopKFormat(kind="topk", k=50, top_p=0.9), False),
        *((HiddenFormat(kind="hidden", dtype=dtype), True) for dtype in ("float32", "float16", "int8")),
        *((MultinomialFormat(kind="sample_multinomial", draws=draws), False) for draws in (1, 50, 4095)),
        *((MinVarianceFormat(ids=ids), False) for ids in (1, 16, 200)),
    ],
)
def test_kept_bytes_are_the_most_that_a_codec_takes(kept, is_exact, vocab_size):
    settings = CodecSettings(vocab_size, 64, 1.0, 0)
    stored = make_codec(kept, settings).bits_per_token() / 8
    planned = kept_bytes(kept, vocab_size, 64)
    assert planned >= stored
    assert planned == stored or not is_exact


def test_plan_is_quick_and_loads_no_torch():
    code = (
        "import sys, time\nstart = time.process_time()\nfrom tutelage.cli.main import app\n"
        "app(['study', 'plan', 'mini', 'claims=[]', '--json'], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'polars'} & set(sys.modules)\n"
        "print(time.process_time() - start, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["total_runs"] == len(works_of([expand(load_study("mini"))])[0])
    assert float(done.stderr) < 5


@pytest.mark.parametrize("kept", [False, True])
def test_a_given_teacher_costs_what_a_run_counts(kept, tmp_path):
    """A directory without weights is enough; a mixture of experts has no plan of memory, and says so."""
    plain = LlamaConfig(vocab_size=520, hidden_size=96, num_hidden_layers=3, num_attention_heads=6)
    mixed = MixtralConfig(vocab_size=520, hidden_size=96, num_hidden_layers=2, num_attention_heads=6)
    raw = DEMO.model_dump(mode="json")
    for name, config in (("strong", plain), ("weak", mixed)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config.to_json_string(use_diff=False))
        save_file({f"{i}": torch.zeros(1) for i in range(4)}, tmp_path / name / "model.safetensors")
        raw["teachers"][name] = {"model": str(tmp_path / name)}
        if kept:
            raw["teachers"][name]["cache"] = {"format": {"kind": "hidden", "dtype": "float32"}}
    works, caches, notes = works_of([expand(validate(StudyConfig, raw, "test"))])
    expected = {}
    for name, config in (("strong", plain), ("weak", mixed)):
        with torch.device("meta"):
            expected[name] = model_forward_flops(AutoModelForCausalLM.from_config(config), 128)
    for work in works:
        if work.cell.teacher in expected and work.cell.kind == "student":
            flops = TRAINED * expected[work.cell.teacher]
            assert work.cost.teacher_flops == (0 if kept else pytest.approx(flops))
    assert caches.flops == pytest.approx(TRAINED * sum(expected.values()) if kept else 0)
    each = TRAINED * (96 * 4 + 4 + INDEX_BYTES / 128) + 4 * 512 * 96  # heads without their padded rows
    assert caches.bytes == pytest.approx(2 * each if kept else 0)
    memory = {work.cell.teacher: work.memory for work in works if work.cell.kind == "student"}
    assert memory["strong"] > memory["weak"]
    left_out = f"demo: the memory of {tmp_path / 'weak'} is left out; how its family computes is not known"
    assert left_out in notes  # of what is kept the writing too


def test_a_given_teacher_that_is_not_here_is_said_to_be_left_out(tmp_path):
    raw = DEMO.model_dump(mode="json")
    raw["teachers"]["strong"] = {"model": str(tmp_path / "none")}
    works, _, notes = works_of([expand(validate(StudyConfig, raw, "test"))])
    assert all(work.cost.teacher_flops == 0 for work in works if work.cell.teacher == "strong")
    missing = f"{tmp_path / 'none'} cannot be read here; its forward passes and memory are left out"
    assert f"demo: {missing}" in notes


def test_what_fits_a_device_is_what_train_plans_with(monkeypatch):
    """`train --plan` sets a tenth of a device's memory aside."""
    raw = DEMO.model_dump(mode="json")
    raw["run"]["parallel"] = {"shard": 1}  # else it would be divided over more devices
    machine, studies = Machine("h100", 1, None, None), [expand(validate(StudyConfig, raw, "test"))]
    size = forecast(studies, machine, None)["memory"]["bytes"]
    for memory, fits in ((size / 0.95, False), (size / 0.85, True)):
        monkeypatch.setitem(DEVICES, "h100", replace(DEVICES["h100"], memory=memory))
        assert forecast(studies, machine, None)["memory"]["fits"] is fits
