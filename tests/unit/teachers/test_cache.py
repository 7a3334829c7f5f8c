"""Reading a teacher cache: by position, and never anything that was not written."""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from manifests import change_manifest
from whole_caches import verify_cache

from tutelage.config.data_config import StoreConfig, TokenizerConfig
from tutelage.config.teacher_config import TeachConfig
from tutelage.data.build import build_store
from tutelage.data.store import open_store
from tutelage.errors import UserError
from tutelage.models import hub, shapes
from tutelage.teachers.cache import reader as cache_module
from tutelage.teachers.cache.cache_writer import write_cache
from tutelage.teachers.cache.codec import HiddenRows
from tutelage.teachers.cache.layout import read_cache_manifest
from tutelage.teachers.cache.reader import open_cache
from tutelage.types import SparseTargets
from tutelage.verify import verify

FORMATS = [
    {"kind": "topk", "k": 5},
    {"kind": "sample_multinomial", "draws": 20},
    {"kind": "sample_min_variance", "ids": 6},
    {"kind": "hidden", "dtype": "float32"},
]


def columns(rows):
    if isinstance(rows, HiddenRows):
        return [rows.hidden_NE, rows.gold_logp_N]
    assert isinstance(rows, SparseTargets)
    return [rows.ids_NK, rows.probs_NK, rows.tail_N, rows.gold_logp_N]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(columns(a), columns(b), strict=True))


@pytest.fixture(scope="module")
def pristine(text, tmp_path_factory):
    return write_cache(
        TeachConfig(
            store=text,
            teacher={"kind": "unigram"},
            format=FORMATS[0],
            context_length=32,
            shard_tokens=512,
            device="cpu",
            output=tmp_path_factory.mktemp("caches"),
        )
    )


@pytest.fixture
def written(pristine, tmp_path):
    """A cache to be damaged."""
    return shutil.copytree(pristine, tmp_path / "caches" / pristine.name)


@pytest.fixture
def model(text, tmp_path):
    """A model directory with the text's tokenizer."""
    directory = tmp_path / "model"
    hub.save(hub.build(shapes.find_shape("nano-50k"), 300, 64, seed=3), directory, text)
    return directory


def one_line(caught):
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------- what is read


def test_every_position_has_the_teachers_probability_of_the_next_token(written, text):
    cache, tokens = open_cache(str(written)), open_store(text).split("train").tokens[:].astype("int64")
    layout = cache.manifest.layout
    assert layout.positions == len(tokens) - 1
    counts = torch.bincount(torch.from_numpy(tokens), minlength=300).double() + 1
    logp_V = (counts / counts.sum()).log().float()
    rest = layout.positions % 32
    assert rest > 2  # so the last context is a short one, which is read in two pieces
    golds = [cache.read([start], 32).gold_logp_N for start in range(0, layout.positions - 31, 32)]
    golds += [
        cache.read([start], 1).gold_logp_N for start in range(layout.positions - rest, layout.positions)
    ]
    expected = logp_V[torch.from_numpy(tokens[1:])]
    torch.testing.assert_close(torch.cat(golds), expected, rtol=0, atol=2**-12)
    assert torch.equal(cache.read([64], 32).ids_NK[7], logp_V.topk(5).indices)


@pytest.mark.parametrize("kept", FORMATS, ids=[form["kind"] for form in FORMATS])
@pytest.mark.parametrize("compress", [False, True])
def test_any_starts_and_lengths_give_the_same_rows(teaching, model, kept, compress):
    teacher = {"kind": "model", "path": str(model)}
    path = write_cache(teaching(teacher=teacher, format=kept, compress=compress))
    cache = open_cache(path)
    contexts = [cache.read([start], 32) for start in range(0, cache.manifest.layout.positions - 31, 32)]
    whole = [torch.cat(parts) for parts in zip(*map(columns, contexts), strict=True)]
    chance = np.random.default_rng(1)
    for length in (1, 4, 16, 32):
        starts = [length * int(chance.integers(len(whole[0]) // length)) for _ in range(9)]
        found = columns(cache.read(starts, length))
        for column, expected in zip(found, whole, strict=True):
            pieces = [expected[start : start + length] for start in starts]
            assert torch.equal(column, torch.cat(pieces))


def test_compression_changes_the_size_and_nothing_else(teaching):
    fingerprints = set()
    caches = []
    for compress in (False, True):
        path = write_cache(teaching(compress=compress, name=f"zstd-{compress}"))
        fingerprints.add(read_cache_manifest(path).fingerprint)
        caches.append(verify_cache(path))
    assert caches[1].bytes < caches[0].bytes
    assert len(fingerprints) == 1
    assert equal(caches[0].read([0, 320, 32], 32), caches[1].read([0, 320, 32], 32))


def test_hidden_states_and_head_are_the_teachers(teaching, model, text):
    path = write_cache(
        teaching(teacher={"kind": "model", "path": str(model)}, format={"kind": "hidden", "dtype": "float32"})
    )
    cache = open_cache(path)
    head_VE, transform, bias_V = cache.head()
    assert bias_V is None
    body, head = hub.body_and_head(hub.load(model))
    assert torch.equal(head_VE, head.weight)
    assert transform == cache.manifest.transform
    tokens = torch.from_numpy(open_store(text).split("train").tokens[:128].astype("int64")).view(4, 32)
    with torch.no_grad():
        expected = body(input_ids=tokens).last_hidden_state.flatten(0, 1)
    assert torch.equal(cache.read([0, 32, 64, 96], 32).hidden_NE, expected)
    assert (path / "head.safetensors").stat().st_mode & 0o777 == (
        path / "manifest.json"
    ).stat().st_mode & 0o777


def test_a_sparse_cache_has_no_head(written):
    with pytest.raises(ValueError, match="has no head"):
        open_cache(written).head()


@pytest.mark.parametrize(
    ("starts", "length"),
    [
        ([16], 32),
        ([0, 33], 32),
        ([-32], 32),
        ([0], 24),
        ([0], 64),
        ([10**9], 32),
        ([0], 0),
        ([0], -32),
    ],
)
def test_places_outside_the_grid_are_refused(written, starts, length):
    with pytest.raises(ValueError, match="contexts of 32"):
        open_cache(written).read(starts, length)


def test_no_places_at_all_are_refused(written):
    with pytest.raises(ValueError, match="at least one place"):
        open_cache(written).read([], 32)


def test_more_shards_than_may_be_open_and_many_threads(written, monkeypatch):
    monkeypatch.setattr(cache_module, "_OPEN_FILES", 3)
    few, alone = open_cache(written), open_cache(written)
    chance = np.random.default_rng(2)
    starts = [[32 * int(chance.integers(200)) for _ in range(8)] for _ in range(60)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda some: few.read(some, 32), starts))
    assert len(few._shards) <= 3
    for some, rows in zip(starts, found, strict=True):
        assert equal(rows, alone.read(some, 32))


# ------------------------------------------------------------------------------------------------- damage


def flip(path, place, bit=0):
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def test_a_flipped_bit_in_a_block_is_found_when_it_is_read(written):
    file = written / "shards" / "000002.bin"
    flip(file, 100, 3)  # in the first block of the shard, tokens 1024 to 1055
    cache = open_cache(written)
    cache.read([992, 1056], 32)
    with pytest.raises(
        UserError, match=r"000002.bin: damaged .a block, tokens 1,024 to 1,055.; delete"
    ) as caught:
        cache.read([992, 1024], 32)
    assert one_line(caught)


@pytest.mark.parametrize("entry", [0, 5, 8, 11, -1])
def test_a_flipped_bit_in_the_index_is_found_when_the_shard_is_read(written, entry):
    file = written / "shards" / "000001.bin"
    index = file.stat().st_size - 32 - 16 * 12
    flip(file, index + entry if entry >= 0 else -1, 7)
    with pytest.raises(UserError, match=r"000001.bin: damaged .its index, tokens 512 to 1,023") as caught:
        open_cache(written).read([512], 32)
    assert one_line(caught)


@pytest.mark.parametrize("compress", [False, True])
def test_no_flipped_bit_goes_unnoticed(teaching, compress):
    """Whatever is flipped, a read either complains or gives what was written."""
    path = write_cache(teaching(compress=compress))
    whole = open_cache(path)
    starts = list(range(0, 512, 32))
    expected = whole.read(starts, 32)
    file = path / "shards" / "000000.bin"
    content = file.read_bytes()
    chance = np.random.default_rng(3)
    for _ in range(60):
        flip(file, chance.integers(len(content)), chance.integers(8))
        with pytest.raises(UserError, match=r"000000.bin: damaged"):
            open_cache(path).read(starts, 32)
        with pytest.raises(UserError, match=r"000000.bin: damaged"):
            verify_cache(path)
        file.write_bytes(content)
    assert equal(verify_cache(path).read(starts, 32), expected)


@pytest.mark.parametrize("change", ["shorter", "longer", "empty", "missing"])
def test_a_shard_of_another_size_is_refused_at_the_start_and_made_anew(written, teaching, tree, change):
    before = tree(written)
    file = written / "shards" / "000003.bin"
    content = file.read_bytes()
    if change == "missing":
        file.unlink()
    else:
        file.write_bytes({"shorter": content[:-5], "longer": content + b"x", "empty": b""}[change])
    with pytest.raises(UserError, match=r"000003.bin: .*which computes just ") as caught:
        open_cache(written)
    assert one_line(caught)
    file.unlink(missing_ok=True)
    others = {path: path.stat().st_mtime_ns for path in (written / "shards").iterdir()}
    assert write_cache(teaching(format=FORMATS[0], batch_tokens=4096)) == written
    assert tree(written) == before
    assert {path: path.stat().st_mtime_ns for path in others} == others


def test_verify_names_all_that_is_damaged(teaching):
    path = write_cache(teaching(format={"kind": "hidden"}))
    assert [finding.wrong for finding in verify(path, lambda _: None)] == [None]
    flip(path / "head.safetensors", -1)
    for shard in (0, 2):
        flip(path / "shards" / f"{shard:06d}.bin", 40)
    (path / "shards" / "000001.bin").write_bytes(b"")
    (path / "shards" / "000003.bin").unlink()
    wrong = [finding.wrong for finding in verify(path, lambda _: None)]
    named = (
        "000003.bin: missing",
        "head.safetensors: missing or damaged",
        *(f"00000{n}.bin" for n in range(3)),
    )
    assert len(wrong) == len(named)
    assert all(name in text for name, text in zip(named, wrong, strict=True))


def test_a_damaged_head_is_found_and_mended(teaching, tree):
    config = teaching(format={"kind": "hidden"})
    path = write_cache(config)
    before = tree(path)
    flip(path / "head.safetensors", -1)
    cache = open_cache(path)
    with pytest.raises(UserError, match=r"head.safetensors: missing or damaged"):
        cache.head()
    with pytest.raises(UserError, match=r"head.safetensors: missing or damaged"):
        verify_cache(path)
    (path / "head.safetensors").unlink()
    with pytest.raises(UserError, match=r"head.safetensors: missing or damaged"):
        verify_cache(path)
    write_cache(config)
    assert tree(path) == before


# ------------------------------------------------------------------------------------------ what is refused


def test_an_unfinished_cache_says_how_far_it_is(written):
    shards = sorted((written / "shards").iterdir())
    for shard in shards[12:]:
        shard.unlink()
    with pytest.raises(
        UserError, match=f"12 of {len(shards)} shards done; run the same `tutelage teach`"
    ) as caught:
        open_cache(written)
    assert one_line(caught)


def test_a_shard_of_another_place_or_cache_is_refused(written, teaching):
    shards = written / "shards"
    shutil.copy(shards / "000002.bin", shards / "000003.bin")
    with pytest.raises(UserError, match=r"000003.bin: damaged .its index"):
        open_cache(written).read([1536], 32)
    other = write_cache(teaching(format=FORMATS[0], temperature=2.0))
    shutil.copy(other / "shards" / "000003.bin", shards / "000003.bin")
    with pytest.raises(UserError, match=r"000003.bin: damaged .its index"):
        open_cache(written).read([1536], 32)


def test_a_cache_of_the_first_schema_version_is_refused(written):
    change_manifest(written, schema_version=1, shards=[])
    with pytest.raises(UserError, match="schema version 1, this version reads 3; build it again") as caught:
        open_cache(written)
    assert one_line(caught)


def test_another_schema_version_is_refused(written):
    change_manifest(written, schema_version=99, something_new=1)
    with pytest.raises(UserError, match="schema version 99, this version reads 3") as caught:
        open_cache(written)
    assert one_line(caught)


@pytest.mark.parametrize(
    "damage",
    [
        {"vocab_size": "many"},
        {"unknown": 1},
        {"format": {"kind": "topl"}},
        {
            "shards": [
                {"file": "shards/000001.bin", "first": 0, "tokens": 512, "bytes": 1, "index_sha256": ""}
            ]
        },
        {"shards": [{"file": "../x.bin", "first": 0, "tokens": 512, "bytes": 1, "index_sha256": ""}]},
    ],
)
def test_a_damaged_manifest_is_one_line(written, damage):
    change_manifest(written, **damage)
    with pytest.raises(UserError, match=r"manifest.json: not the manifest of a teacher cache") as caught:
        open_cache(written)
    assert one_line(caught)


@pytest.mark.parametrize(
    ("field", "value"),
    [("positions", 0), ("positions", -5), ("context_length", 0), ("contexts_per_shard", 0)],
)
def test_sizes_that_make_no_sense_are_one_line(written, field, value):
    layout = json.loads((written / "manifest.json").read_text())["layout"]
    change_manifest(written, layout=layout | {field: value})
    with pytest.raises(UserError, match=rf"not the manifest of a teacher cache \(layout\.{field}") as caught:
        open_cache(written)
    assert one_line(caught)


def test_a_cache_that_claims_to_be_immense_is_refused_at_once(written):
    layout = json.loads((written / "manifest.json").read_text())["layout"]
    change_manifest(written, layout=layout | {"positions": 10**15})
    began = time.process_time()
    with pytest.raises(UserError, match="shards done; run the same `tutelage teach`"):
        open_cache(written)
    assert time.process_time() - began < 1


def test_what_is_no_cache_is_refused(tmp_path, text):
    with pytest.raises(UserError, match="no such directory"):
        open_cache(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no manifest.json"):
        open_cache(tmp_path)
    with pytest.raises(UserError, match="not the manifest of a teacher cache"):
        open_cache(text)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="not the manifest of a teacher cache"):
        open_cache(tmp_path)


def test_another_store_or_length_is_refused_with_both_values(written, text, tmp_path):
    cache, store = open_cache(written), open_store(text)
    for length in (2, 16, 32):
        cache.check_fits(store, length, document_mask=False)
    for length in (24, 64):
        with pytest.raises(UserError, match=rf"sequence_length = {length}: must divide .* 32$") as caught:
            cache.check_fits(store, length, document_mask=False)
        assert one_line(caught)
    with pytest.raises(UserError, match=r"^data.document_mask = true: .* written with .* = false") as caught:
        cache.check_fits(store, 32, document_mask=True)
    assert one_line(caught)
    config = StoreConfig(
        name="other",
        sources=({"kind": "corpus", "name": "kjv"},),
        tokenizer=TokenizerConfig(path=text),
        max_bytes=40_000,
    )
    other = open_store(build_store(config, tmp_path))
    with pytest.raises(UserError, match=f"{store.fingerprint[:16]}, .*{other.fingerprint[:16]}") as caught:
        cache.check_fits(other, 32, document_mask=False)
    assert one_line(caught)


def test_a_moved_store_and_a_moved_cache_fit(written, text, tmp_path):
    cache = shutil.copytree(written, tmp_path / "cache")
    store = shutil.copytree(text, tmp_path / "store")
    open_cache(cache).check_fits(open_store(store), 32, document_mask=False)
    assert read_cache_manifest(cache).fingerprint == read_cache_manifest(written).fingerprint
