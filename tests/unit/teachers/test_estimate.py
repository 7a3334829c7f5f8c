"""What a cache is said to take, against what it takes."""

from __future__ import annotations

import pytest

from tutelage.config.teacher_config import TeachConfig
from tutelage.errors import UserError
from tutelage.models import hub, shapes
from tutelage.models.flops import model_forward_flops
from tutelage.teachers.cache.cache_estimate import estimate_cache
from tutelage.teachers.cache.cache_writer import write_cache
from tutelage.teachers.cache.formats import FORMATS


def size_of(path):
    return sum(file.stat().st_size for file in path.rglob("*") if file.suffix in {".bin", ".safetensors"})


@pytest.fixture
def model(text, tmp_path):
    directory = tmp_path / "model"
    hub.save(hub.build(shapes.find_shape("nano-50k"), 300, 64, seed=3), directory, text)
    return {"kind": "model", "path": str(directory)}


def test_every_format_is_estimated_and_nothing_is_written(teaching, model, tmp_path):
    config = teaching(teacher=model, format={"kind": "topk", "k": 7})
    found = estimate_cache(config)
    assert not (tmp_path / "caches").exists()
    assert {row.format.kind for row in found.formats} == set(FORMATS)
    assert [row.configured for row in found.formats] == [True] + [False] * (len(found.formats) - 1)
    assert found.formats[0].label == "topk k=7 top_p=1.0"
    assert len({row.label for row in found.formats}) == len(found.formats)
    assert found.trial_tokens == 2 * 128
    per_token = model_forward_flops(hub.load(model["path"]), 32)
    assert found.teacher_flops == pytest.approx(per_token * found.tokens)
    assert found.free_bytes > 10**6
    assert all(row.seconds > 0 for row in found.formats)


def test_fixed_formats_take_what_was_estimated(teaching, model):
    for row in estimate_cache(teaching(teacher=model)).formats:
        if row.format.kind == "sample_multinomial":
            continue
        config = teaching(teacher=model).model_copy(update={"format": row.format})
        path = write_cache(TeachConfig.model_validate(config.model_dump()))
        assert row.total_bytes == pytest.approx(size_of(path), rel=0.05), row.label
        if row.format.kind != "hidden":
            tokens = estimate_cache(config).tokens
            assert row.bytes_per_token == pytest.approx(size_of(path) / tokens, rel=0.05)


def test_sizes_that_depend_on_the_text_are_near(teaching, model):
    for changes in (
        {"format": {"kind": "sample_multinomial", "draws": 30}},
        {"format": {"kind": "topk", "k": 40, "top_p": 0.5}},
        {"compress": True},
    ):
        config = teaching(teacher=model, **changes)
        estimated = estimate_cache(config).formats[0].total_bytes
        assert estimated == pytest.approx(size_of(write_cache(config)), rel=0.2)


def test_one_shard_is_enough_to_measure(teaching):
    assert estimate_cache(teaching(shard_tokens=10**6)).trial_tokens == 2 * 128


def test_mistakes_are_those_of_the_writer(teaching):
    with pytest.raises(UserError, match=r"format.k"):
        estimate_cache(teaching(format={"kind": "topk", "k": 301}))
