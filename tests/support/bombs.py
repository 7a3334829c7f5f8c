"""Read compressed files of a gigabyte with `max_bytes: 1000`; print seconds and growth of memory of each."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import json
import lzma
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import zstandard
from peak_memory import high_water_mark
from pyarrow import parquet

from tutelage.config.data_config import StoreConfig
from tutelage.config.load import validate
from tutelage.data.build import build_store
from tutelage.errors import UserError

MEMBER, MEMBERS = 2**24, 64
PACKERS = {
    "gz": gzip.compress,
    "zst": zstandard.ZstdCompressor().compress,
    "xz": lzma.compress,
    "bz2": bz2.compress,
}


def write(folder: Path) -> list[Path]:
    """A text and a row of a gigabyte for each kind of compression, and a value repeated in a table."""
    paths = []
    for ending, pack in PACKERS.items():
        text, row = pack(b"fifteen letters\n" * (MEMBER // 16)), pack(b"a" * MEMBER)
        contents = {"text.txt": text * MEMBERS, "row.jsonl": pack(b'{"text": "') + row * MEMBERS}
        for name, content in contents.items():
            paths.append(folder / f"{name}.{ending}")
            paths[-1].write_bytes(content)
    once = pa.DictionaryArray.from_arrays(np.zeros(256, np.int32), [" b" * 2**21])
    parquet.write_table(pa.table({"text": once}), folder / "value.parquet", compression="zstd")
    return [*paths, folder / "value.parquet"]


def main() -> None:
    found = {}
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        for path in write(Path()):
            source = {"kind": "files", "paths": [path.name], "on_bad_row": "stop"}
            config = {"name": path.name, "sources": [source], "validation": 0, "test": 0, "max_bytes": 1000}
            Path("/proc/self/clear_refs").write_text("5")  # the mark starts anew
            before, began = high_water_mark(), time.process_time()
            with contextlib.suppress(UserError):
                build_store(validate(StoreConfig, config, path.name), Path("stores"))
            found[path.name] = [time.process_time() - began, high_water_mark() - before, path.stat().st_size]
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
