"""The examples of docs/explanation/study-files.md, and the schema that editors check study files with."""

from __future__ import annotations

import json
import re
from collections import Counter
from importlib import resources
from pathlib import Path

import jsonschema
import pytest
import yaml

from tutelage.config.study_config import StudyConfig
from tutelage.errors import UserError
from tutelage.study.expand import expand
from tutelage.study.presets import load_study, preset_names

PAGE = Path(__file__).parents[3] / "docs" / "explanation" / "study-files.md"
BLOCK = re.compile(r"```yaml\n# (\S+\.yaml)(?:: ([^\n]*))?\n(.*?)```", re.DOTALL)
BLOCKS = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
STUDIES = {name: (promise, text) for name, promise, text in BLOCKS if promise}


@pytest.fixture
def folder(tmp_path):
    for name, _, text in BLOCKS:
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_the_examples_are_found():
    assert len(STUDIES) == 8


@pytest.mark.parametrize("name", STUDIES)
def test_an_example_has_the_runs_that_it_promises(folder, name):
    found = Counter(cell.kind for cell in expand(load_study(str(folder / name))).cells)
    promised = re.findall(r"(\d+) (teacher|baseline|student|after)", STUDIES[name][0])
    assert found == Counter({kind: int(number) for number, kind in promised})


def test_the_schema_admits_examples_and_presets_and_refuses_mistakes():
    schema = StudyConfig.model_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    presets = resources.files("tutelage.presets")
    texts = [text for _, text in STUDIES.values()]
    texts += [(presets / f"{name}.yaml").read_text(encoding="utf-8") for name in preset_names()]
    for text in texts:
        validator.validate(yaml.safe_load(text))
    good = yaml.safe_load(STUDIES["grids.yaml"][1])
    without_base = {key: value for key, value in good.items() if key != "base"}
    for bad in (without_base, good | {"base": 3}, good | {"student": {}}, good | {"seeds": ["a"]}):
        assert not validator.is_valid(bad)


def test_the_command_prints_the_schema(command):
    _, shown, _ = command("schema", "study")
    printed = json.loads(shown)
    assert printed == json.loads(json.dumps(StudyConfig.model_json_schema()))
    assert "base" in printed["properties"]
    assert {"grid", "then", "cache"} <= {
        field for part in printed["$defs"].values() for field in part.get("properties", {})
    }


def test_a_study_without_what_is_required_is_refused(folder):
    (folder / "own.yaml").write_text("{base: common, name: own, seeds: null}")
    with pytest.raises(UserError, match=r"own\.yaml on .*common\.yaml: seeds"):
        load_study(str(folder / "own.yaml"))
