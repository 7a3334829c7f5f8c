"""Templates load as they stand and line by line; the pages of reference are those of the models."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tutelage.cli.settings_pages import KINDS, model_of, reference, template
from tutelage.config.load import validate
from tutelage.config.yaml_text import parse

ROOT = Path(__file__).parents[3]
SETTING = re.compile(r"( *)# ([a-z_]+: .*)")
OTHER = re.compile(r"( *)## or: (([a-z_]+): .*)")


def load(kind, lines):
    return validate(model_of(kind), parse("\n".join(lines), "template"), "template")


@pytest.mark.parametrize("kind", KINDS)
def test_every_line_that_can_be_uncommented_loads(kind):
    lines = template(kind, f"{kind}.yaml").splitlines()
    plain = load(kind, lines)
    settings = [number for number, line in enumerate(lines) if SETTING.fullmatch(line)]
    assert len(settings) >= 6
    for number in settings:
        indent, text = SETTING.fullmatch(lines[number]).groups()
        load(kind, [*lines[:number], indent + text, *lines[number + 1 :]])
    others = [number for number, line in enumerate(lines) if OTHER.fullmatch(line)]
    for number in others:
        indent, text, key = OTHER.fullmatch(lines[number]).groups()
        kept = [line for line in lines if not line.startswith(f"{indent}{key}:")]
        place = kept.index(lines[number])
        assert load(kind, [*kept[:place], indent + text, *kept[place + 1 :]]) != plain


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_is_in_the_template_and_on_the_page(kind):
    text, page = template(kind, "x.yaml"), reference(kind)
    names = {name for name in model_of(kind).model_json_schema()["properties"] if name != "base"}
    assert names == {name for name in names if re.search(rf"^(## |# )?{name}:", text, re.MULTILINE)}
    assert names == {name for name in names if f"\n| `{name}` |" in page}
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    untold = [row[0] for row in rows if len(row) < 4 and row[0] not in {"`kind`", "`policy`"}]
    assert untold == []
    assert isinstance(yaml.safe_load(text), dict)


@pytest.mark.parametrize("kind", KINDS)
def test_the_pages_are_up_to_date(kind):
    page = ROOT / "docs" / "reference" / f"{kind}.md"
    assert page.read_text(encoding="utf-8") == reference(kind), "run `make reference`"


def test_a_unit_and_a_range_are_said():
    page = reference("run")
    assert "| `sequence_length` | 128 | whole number of tokens, from 2 to 1,048,576 |" in page
    assert "| `lr` |  | number, above 0 to 1e+30 |" in page
    assert "| `tokens` | required | tokens: 50000, 50K, 1.5B, or 20x per parameter |" in page
    assert "| `name` | run | name of ASCII letters, digits, '.', '_' and '-' |" in page
    assert "## teacher (kind: model)" in page


def test_a_template_is_written_once(command):
    assert command("init", "run", "mine.yaml")[0] == 0
    Path("mine.yaml").write_text("changed")
    code, _, complaint = command("init", "run", "mine.yaml")
    assert (code, complaint) == (2, "error: mine.yaml: exists and is left as it is; name another file\n")
    assert Path("mine.yaml").read_text() == "changed"
    assert command("init", "cache")[0] == 0
    assert Path("cache.yaml").exists()
    assert "did you mean 'store'" in command("init", "stores")[2]
    assert "cannot be written" in command("init", "run", "no/where.yaml")[2]
