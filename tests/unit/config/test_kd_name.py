"""Metrics that measure different things have different names."""

from __future__ import annotations

import json

import pytest
from pydantic import TypeAdapter

from tutelage.cli.bars import RichProgress, err
from tutelage.config.load import validate
from tutelage.config.objective_config import ObjectiveConfig
from tutelage.config.teacher_config import Format, incompatibility, kd_name
from tutelage.run import run

TOP = {"truncation": {"kind": "top_k", "k": 50}}
NAMES = [
    ({}, None, "kd"),
    ({}, {"kind": "hidden"}, "kd"),
    ({"temperature": 2.0}, None, "kd_t2"),
    ({"temperature": 2.0, "temperature_squared": False}, None, "kd_t2_unscaled"),
    ({"temperature_squared": False}, None, "kd"),
    ({"divergence": "reverse_kl"}, None, "kd_reverse_kl"),
    ({"divergence": "tvd", "temperature": 0.5}, None, "kd_tvd_t0.5"),
    ({"divergence": "jsd"}, None, "kd_jsd_0.5"),
    ({"divergence": "jsd", "jsd_beta": 0.1}, None, "kd_jsd_0.1"),
    ({"divergence": "skew_kl", "skew": 0.2, "temperature": 2.0}, None, "kd_skew_kl_0.2_t2"),
    ({"divergence": "hard_labels", "temperature": 3.0}, None, "kd_hard_labels"),
    (TOP, None, "kd_top50"),
    (TOP | {"tail": "renormalise", "temperature": 2.0}, None, "kd_t2_top50_renormalise"),
    ({"truncation": {"kind": "top_p", "p": 0.9}}, None, "kd_top_p0.9"),
    ({}, {"kind": "topk", "k": 50}, "kd_top50"),
    ({}, {"kind": "topk", "k": 50, "top_p": 0.9}, "kd_top50_top_p0.9"),
    ({"tail": "none"}, {"kind": "sample_multinomial", "draws": 50}, "kd_sampled50_none"),
    ({}, {"kind": "sample_multinomial", "draws": 12}, "kd_sampled12"),
    ({}, {"kind": "sample_min_variance", "ids": 16}, "kd_sampled16_min_variance"),
]


def config(**changes):
    return validate(ObjectiveConfig, {"alpha": 0.4} | changes, "test")


@pytest.mark.parametrize(("objective", "kept", "name"), NAMES, ids=[name for *_, name in NAMES])
def test_each_way_to_measure_has_its_name(objective, kept, name):
    kept = None if kept is None else TypeAdapter(Format).validate_python(kept)
    assert kd_name(config(**objective), kept) == name


def test_rows_and_console_use_it(make_config):
    taught = {"teacher": {"kind": "unigram"}}
    names = {}
    for objective in ({}, {"temperature": 2.0}, TOP, {"divergence": "jsd"}, {"divergence": "hard_labels"}):
        directory = run(make_config(**taught, objective={"alpha": 0.3} | objective))
        rows = [json.loads(line) for line in (directory.path / "metrics.jsonl").read_text().splitlines()]
        [name] = {key for row in rows for key in row if key.startswith("kd")}
        names[name] = rows[-1]
        with err.capture() as shown, RichProgress() as progress:
            progress.start("run", 12, "steps")
            progress.describe("run", rows[-1])
            progress.finish("run")
        assert f" {name} {rows[-1][name]:.3f} · alpha 0.30" in shown.get()
    assert set(names) == {"kd", "kd_t2", "kd_top50", "kd_jsd_0.5", "kd_hard_labels"}


@pytest.mark.parametrize("gate", ["teacher_entropy", "teacher_confidence"])
def test_gates_that_look_at_the_teacher_at_t_1_refuse_probabilities_at_another(gate):
    top = TypeAdapter(Format).validate_python({"kind": "topk", "k": 5})
    asking = config(gate={"kind": gate}, temperature=2.0)
    assert "needs the teacher at temperature 1" in str(incompatibility(top, 2.0, asking, "x"))
    assert incompatibility(TypeAdapter(Format).validate_python({"kind": "hidden"}), 2.0, asking, "x") is None
    assert incompatibility(top, 1.0, config(gate={"kind": gate}), "x") is None
    assert incompatibility(top, 2.0, config(gate={"kind": "teacher_better"}, temperature=2.0), "x") is None
