"""One store has one name, wherever its inputs lie and however their places are spelled."""

from __future__ import annotations

import json
import shutil

import pytest

from tutelage.config.data_config import StoreConfig
from tutelage.config.load import load
from tutelage.data.build import build_store


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    rows = [
        {"text": f"document {number} says that {number * 7919 % 1000} is a number"} for number in range(200)
    ]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def name(paths, tmp_path, tokenizer="{vocab_size: 300}", more=""):
    path = tmp_path / "store.yaml"
    path.write_text(
        f"name: one\nsources: [{{kind: files, paths: [{paths}]}}]\ntokenizer: {tokenizer}\n"
        f"validation: .2\ntest: .2\n{more}"
    )
    return build_store(load(StoreConfig, path), tmp_path / "stores")


def test_places_of_texts_are_no_part_of_a_store(texts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    link = tmp_path / "link"
    link.symlink_to(texts)
    copy = shutil.copytree(texts, tmp_path / "copy")
    places = [
        f"{texts}/a.jsonl",
        "texts/a.jsonl",
        "./texts/../texts/a.jsonl",
        f"{link}/a.jsonl",
        f"{copy}/*.jsonl",
    ]
    assert len({name(place, tmp_path) for place in places}) == 1
    for more in ("max_bytes: 1_000_000", "max_bytes: 1e6", "max_bytes: 1000000"):
        assert name(places[0], tmp_path, more=more) == name(places[1], tmp_path, more="max_bytes: 1.0e6")
    (copy / "a.jsonl").write_text('{"text": "other"}\n' * 3 + (texts / "a.jsonl").read_text())
    assert name(f"{copy}/a.jsonl", tmp_path) != name(places[0], tmp_path)


def test_the_place_of_a_tokenizer_is_no_part_of_a_store(texts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = name("texts/a.jsonl", tmp_path)
    shutil.copytree(first, tmp_path / "moved")
    tokenizers = [
        f"{{path: {first}}}",
        f"{{path: {first}/}}",
        "{path: moved}",
        f"{{path: {first}, vocab_size: 400}}",
    ]
    assert len({name("texts/a.jsonl", tmp_path, one) for one in tokenizers}) == 1
