"""`runtime.profile` leaves a trace that tools can open, and changes no result."""

from __future__ import annotations

import json
import shutil

import pytest
from training import Notes, assert_same_weights

from tutelage.run import run


def trace(directory):
    (path,) = (directory.path / "profile").iterdir()
    assert path.name == "rank-0.json"
    return json.loads(path.read_text())


@pytest.mark.parametrize("tokens", [12 * 256, 4 * 256])
def test_a_trace_has_as_many_steps_as_were_asked_for(make_config, tmp_path, tokens):
    runtime = {"device": "cpu", "threads": 1}
    notes = Notes()
    directory = run(make_config(tokens=tokens, runtime=runtime | {"profile": 2}), notes)
    events = trace(directory)["traceEvents"]
    steps = {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep#")}
    last = tokens // 256
    assert steps == {f"ProfilerStep#{step}" for step in (min(10, last - 2), min(10, last - 2) + 1)}
    names = {event.get("name") for event in events}
    assert "aten::mm" in names
    assert sum("ui.perfetto.dev" in note and "rank-0.json" in note for note in notes.notes) == 1
    plain = run(make_config(tokens=tokens, runtime=runtime, output=str(tmp_path / "plain")))
    assert_same_weights(directory, plain)


def test_a_run_without_it_has_no_trace(make_config):
    assert not (run(make_config()).path / "profile").exists()


def test_a_run_that_is_only_to_be_exported_again_has_no_trace(make_config):
    directory = run(make_config())
    shutil.rmtree(directory.model)
    assert run(make_config(runtime={"device": "cpu", "threads": 1, "profile": 2})).model.is_dir()
    assert not (directory.path / "profile").exists()
