"""Hostile model directories: config, index, weights or tokenizer are not what they should be."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import torch
from any_settings import broken
from fuzz_case import to_json
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file

from tutelage.data.tokenizer import load_tokenizer
from tutelage.models import hub
from tutelage.models.directory import read_config, weights_fingerprint
from tutelage.models.shapes import read_shape

if TYPE_CHECKING:
    from pathlib import Path

    from fuzz_case import Tried


def models_of(tried: Tried) -> dict[str, Any]:
    """Model directories whose config, index, weights or tokenizer are not what they should be."""
    folders = [tried.folder / name for name in ("llama", "gpt2")]
    configs = {folder: read_config(folder) for folder in folders}

    @given(folder=st.sampled_from(folders), data=st.data())
    @example(folders[0], {"max_position_embeddings": 0})
    @example(folders[1], {"n_positions": 0})
    @example(folders[0], {"num_attention_heads": [2]})
    @example(folders[0], {"num_key_value_heads": "2"})
    def descriptions(folder: Path, data: Any) -> None:
        fields = configs[folder] | data if isinstance(data, dict) else data.draw(broken(configs[folder]))
        (folder / "config.json").write_bytes(to_json(fields))
        with tried.case("model configs", fields):
            try:
                weights_fingerprint(folder)
                read_shape(read_config(folder), "m")
                hub.load(folder)
            finally:
                (folder / "config.json").write_bytes(to_json(configs[folder]))

    place = tried.folder / "place"
    place.mkdir()
    (place / "config.json").write_bytes(to_json(configs[folders[0]]))
    index = {
        "metadata": {"total_size": 5},
        "weight_map": {"a": "../llama/model.safetensors", "b": "model-1.safetensors"},
    }
    save_file({"b": torch.zeros(2)}, place / "model-1.safetensors")

    @given(fields=broken(index))
    def indexes(fields: Any) -> None:
        (place / "model.safetensors.index.json").write_bytes(to_json(fields))
        with tried.case("indexes", fields):
            weights_fingerprint(place)

    header = {"b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    other = tried.folder / "weights"
    other.mkdir()
    (other / "config.json").write_bytes(to_json(configs[folders[0]]))

    @given(fields=broken(header), length=st.sampled_from([None, None, 0, 2**62, 7]), cut=st.integers(0, 9))
    def headers(fields: Any, length: int | None, cut: int) -> None:
        text = to_json(fields)
        data = (len(text) if length is None else length).to_bytes(8, "little") + text + b"\0" * 8
        (other / "model.safetensors").write_bytes(data[: -cut or None] if cut < 5 else data)
        with tried.case("weights", (fields, length)):
            weights_fingerprint(other)
            hub.load(other)

    chat = tried.folder / "tokens"
    shutil.copytree(tried.folder / "chat", chat)
    files = ["tokenizer.json", "tokenizer_config.json"]
    whole = {name: json.loads((chat / name).read_text()) for name in files}
    whole["tokenizer.json"]["model"]["merges"] = whole["tokenizer.json"]["model"]["merges"][:20]

    @given(name=st.sampled_from(files), data=st.data())
    def tokenizers(name: str, data: st.DataObject) -> None:
        original = (chat / name).read_bytes()
        fields = data.draw(broken(whole[name]))
        (chat / name).write_bytes(to_json(fields))
        with tried.case("tokenizers", (name, fields)):
            try:
                load_tokenizer(chat).encoder()(["some words <|endoftext|> more"])
            finally:
                (chat / name).write_bytes(original)

    return {"model configs": descriptions, "indexes": indexes, "weights": headers, "tokenizers": tokenizers}
