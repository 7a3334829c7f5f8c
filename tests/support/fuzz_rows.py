"""Hostile rows: .jsonl, .parquet and text files, plain and compressed, texts and chats, built into stores."""

from __future__ import annotations

import bz2
import gzip
import lzma
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import zstandard
from any_settings import anything, broken
from fuzz_case import to_json
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from tutelage.cli.show_commands import show_store
from tutelage.config.data_config import StoreConfig
from tutelage.config.load import validate
from tutelage.data.build import build_store

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fuzz_case import Tried


def rows_of(tried: Tried) -> dict[str, Any]:
    """Rows of .jsonl and .parquet files, plain and compressed, texts and chats, as token stores."""
    folder, output = tried.folder / "rows", tried.folder / "stores"
    folder.mkdir()
    tokenizer = tried.folder / "chat"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    rows = st.lists(
        st.one_of(
            broken({"text": "some words", "prompt": "a", "completion": "b", "messages": turns}),
            st.just({"text": "good words", "prompt": "q", "completion": "r", "messages": turns}),
            anything,
        ),
        max_size=4,
    )
    lines = st.one_of(
        rows.map(lambda found: b"\n".join(to_json(row) for row in found)),
        st.sampled_from(
            [
                b'{"text": "a", "text": "b"}',
                b'{"text": ' + b"[" * 10**5,
                b'{"text": 1e999}',
                b'{"text": "\\ud800"}',
                b'{"text": NaN}',
                b"\xff\xfe",
                b'{"text": "a"}\0',
                b"9" * 5000,
                b'{"text": "' + b"x" * 9_000_000 + b'"}',
            ]
        ),
        st.binary(max_size=60),
    )
    packers: dict[str, Callable[[bytes], bytes]] = {
        ".jsonl": bytes,
        ".jsonl.gz": gzip.compress,
        ".jsonl.zst": zstandard.ZstdCompressor().compress,
        ".jsonl.xz": lzma.compress,
        ".jsonl.bz2": bz2.compress,
        ".csv": bytes,
        ".html": bytes,
        ".txt": bytes,
        ".txt.gz": gzip.compress,
        ".md.zst": bytes,  # and so no zstd
    }
    sources = st.sampled_from(
        [
            {"kind": "files"},
            {"kind": "files", "document_bytes": "file"},
            {"kind": "files", "field": "messages"},
            {"kind": "pairs"},
            {"kind": "pairs", "messages": "messages", "template": "chat"},
        ]
    )

    def built(tree: dict[str, Any], path: Path) -> None:
        config = {
            "name": "s",
            "sources": [tree | {"paths": [str(path)]}],
            "validation": 0,
            "test": 0,
            "max_bytes": 1000,
            "tokenizer": {"path": str(tokenizer)},
        }
        show_store(build_store(validate(StoreConfig, config, "s.yaml"), output))

    @given(
        text=lines,
        ending=st.sampled_from([*packers]),
        source=sources,
        skip=st.booleans(),
        cut=st.integers(0, 40),
    )
    def text_rows(text: bytes, ending: str, source: dict[str, Any], skip: bool, cut: int) -> None:
        data = packers[ending](text)
        path = folder / f"rows{ending}"
        path.write_bytes(data[: -cut or None] if cut < 20 else data)
        with tried.case("rows", (ending, source, text[:200]), output):
            built(source | {"on_bad_row": "skip" if skip else "stop"}, path)

    columns = st.dictionaries(
        st.sampled_from(["text", "prompt", "completion", "messages", "x"]),
        st.sampled_from(
            [
                ["a", "b"],
                [None, "b"],
                [1, 2],
                [b"\xff", b"b"],
                [["a"], []],
                [{"role": "user"}] * 2,
                [turns, turns],
                [1.5, float("nan")],
                ["", " "],
                [True, False],
                ["x" * 10**6] * 2,
            ]
        ),
        max_size=4,
    )

    @given(
        columns=columns,
        source=sources,
        cut=st.integers(0, 40),
        compression=st.sampled_from(["zstd", "none", "gzip"]),
    )
    def tables(columns: dict[str, list[Any]], source: dict[str, Any], cut: int, compression: str) -> None:
        path = folder / "rows.parquet"
        parquet.write_table(pa.table(columns), path, compression=compression)
        if cut < 8:
            path.write_bytes(path.read_bytes()[: -cut or None])
        elif cut < 20:
            data = bytearray(path.read_bytes())
            data[-cut * len(data) // 41] ^= 0x55
            path.write_bytes(data)
        with tried.case("tables", (columns, source, cut), output):
            built(source, path)

    return {"rows": text_rows, "tables": tables}
