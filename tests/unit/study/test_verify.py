"""Flips, truncations and deletions in everything that a finished study has on disk."""

from __future__ import annotations

import os
import random
import shutil
import sys

import pytest
from manifests import change_manifest
from tiny_study import run_tiny, tiny_study
from transformers import LlamaConfig, LlamaForCausalLM

from tutelage.data.store import open_store
from tutelage.data.store_manifest import SPLITS
from tutelage.data.tokenizer import load_tokenizer
from tutelage.errors import UserError
from tutelage.evals.contamination import kept
from tutelage.evals.score_files import read_scores
from tutelage.models import hub
from tutelage.records import write_sealed
from tutelage.run_directory import RunDirectory
from tutelage.study.leases import Failures
from tutelage.study.results import load_results
from tutelage.teachers.cache.layout import read_cache_manifest
from tutelage.teachers.cache.reader import open_cache
from tutelage.train.checkpoint_files import damage
from tutelage.verify import verify

PLACES = 2
"""Random bytes that are flipped in each file."""

TEACHER = {"shape": "nano-20k", "tokens": "4K", "cache": {"format": {"kind": "hidden"}}}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    directory = tmp_path_factory.mktemp("verified") / "study"
    run_tiny(tiny_study(teachers={"weak": TEACHER}), directory)
    run = next((directory / "runs").iterdir()).name
    Failures(directory, 1).add(run, "the machine went away", 4)
    return directory


def wrong(path):
    return [f"{one.path}: {one.wrong}" for one in verify(path, lambda _: None) if one.wrong is not None]


def files_of(study):
    """What is read again; locks are not."""
    paths = sorted(path for path in study.rglob("*") if path.is_file())
    return [path for path in paths if path.name != "lock" and path.suffix != ".lock"]


def part_of(study, file):
    """The store, cache or run that a file is in, or the study."""
    names = file.relative_to(study).parts
    return study / names[0] / names[1] if names[0] in {"data", "runs", "caches"} else study


PIPE = object()
"""What is there is no file, and reading it would wait for ever."""


def damages(content, rng):
    """The content with a bit flipped, at several places, and cut short."""
    for place in {0, len(content) - 1, *(rng.randrange(len(content)) for _ in range(PLACES))}:
        changed = bytearray(content)
        changed[place] ^= 1 << rng.randrange(8)
        yield f"byte {place}", bytes(changed)
    for length in (0, len(content) - 1, rng.randrange(len(content))):
        yield f"cut to {length}", content[:length]
    yield "deleted", None
    yield "a pipe", PIPE


def replaced(file, content):
    file.unlink(missing_ok=True)
    if content is PIPE:
        os.mkfifo(file)
    elif content is not None:
        file.write_bytes(content)


@pytest.mark.slow
def test_a_study_that_nothing_happened_to_is_intact(study):
    assert wrong(study) == []
    assert {one.what for one in verify(study, lambda _: None)} >= {
        "token store",
        "teacher cache",
        "checkpoint",
        "rows",
    }


def of_store(path):
    store = open_store(path)
    views = [store.split(name) for name in SPLITS]
    read = [part[:].tobytes() for v in views for part in (v.tokens, v.offsets, v.bytes) if part is not None]
    return store.manifest.model_dump(), load_tokenizer(path), read


def of_cache(path):
    cache = open_cache(path)
    layout = cache.manifest.layout
    starts = range(0, layout.positions - 31, 32)
    rows = [cache.read([start], 32).hidden_NE.numpy().tobytes() for start in starts]
    return cache.manifest.model_dump(), rows, cache.head()[0].numpy().tobytes()


def of_run(path):
    run = RunDirectory(path)
    weights = {name: weight.numpy().tobytes() for name, weight in hub.load(run.model).state_dict().items()}
    (newest,) = run.checkpoints.glob("step-*")
    if (reason := damage(newest)) is not None:
        raise UserError(f"{newest}: {reason}")
    return weights, load_tokenizer(run.model), run.config(), read_scores(run.scores)


def of_study(path):
    results = load_results(path)
    frames = (results.scores, results.documents, results.curves, results.runs)
    return results.plan, [frame.rows() for frame in frames], [*results.problems]


USES = {"data": of_store, "caches": of_cache, "runs": of_run}


def used(study, file):
    """What a study's report and a use of the damaged part see, and what they complain of."""
    kind = file.relative_to(study).parts[0]
    seen = []
    for use, path in ((of_study, study), (USES.get(kind, of_study), part_of(study, file))):
        try:
            seen.append(use(path))
        except UserError as error:
            seen.append(str(error))
    assert not any("\n" in one for one in seen if isinstance(one, str))
    return seen


def names(seen, file):
    """Whether one line speaks of a file; of a checkpoint, block or manifest at least of what it is in."""
    lines = [line for line in seen if isinstance(line, str)]
    lines += [line for one in seen if not isinstance(one, str) for line in one[-1] if isinstance(line, str)]
    return any(file.name.removesuffix(".crc32") in line for line in lines)


NOT_MISSED = {"overlap", "queue"}
"""What is in them is found out again where it is needed; a finished run is finished by its own files."""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="pipes of Unix")
def test_whatever_is_damaged_is_named_or_changes_nothing(study):
    rng = random.Random(15)  # noqa: S311
    wrongly, pristine = [], {}
    for file in files_of(study):
        content, where = file.read_bytes(), file.relative_to(study)
        part = part_of(study, file)
        if part not in pristine:
            pristine[part] = used(study, file)
        for what, changed in damages(content, rng) if content else ():
            replaced(file, changed)
            if changed is not None or where.parts[0] not in NOT_MISSED:
                found = wrong(part)
                if not any(file.name in line for line in found):
                    wrongly.append(f"verify: {where}: {what}: {found}")
            seen = used(study, file)
            if seen != pristine[part] and not names(seen, file):
                wrongly.append(f"use: {where}: {what}: {[str(one)[:200] for one in seen]}")
            replaced(file, content)
    assert not wrongly, "\n".join(wrongly)
    assert wrong(study) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["data", "caches", "runs", "caches/", "data/"])
def test_a_part_of_a_study_that_is_lost_whole_is_named(study, kind, tmp_path):
    """One after another, and with a slash all of a kind."""
    whole = sorted((study / kind).iterdir()) if not kind.endswith("/") else [study / kind]
    whole = [path for path in whole if path.is_dir()]
    assert whole
    for part in whole:
        kept = part.rename(tmp_path / "kept")
        found = wrong(study)
        kept.rename(part)
        assert found
        teacher = next(path.name for path in (study / "runs").glob("teacher-*"))
        assert all(line.startswith(str(part)) or teacher in line for line in found), found
        assert all("`tutelage study run` m" in line for line in found), found
    assert wrong(study) == []


def test_a_lost_cache_of_a_mean_is_named_by_its_teachers(tmp_path):
    form = {"kind": "topk", "k": 4}
    teachers = {
        "weak": {"shape": "nano-20k", "tokens": "2K"},
        "unigram": {"control": "unigram"},
        "both": {"mean": ["weak", "unigram"], "cache": {"format": form}},
        "warm": {"mean": ["weak", "unigram"], "cache": {"format": form, "temperature": 2.0}},
    }
    points = {"teacher": ["both", "warm"], "temperature": [1.0, 2.0]}
    grid = {"cross": [{"zip": points}, {"product": {"alpha": [0.4]}}]}
    students = {"main": {"shape": "nano-20k", "tokens": "2K", "grid": grid}}
    run_tiny(tiny_study(teachers=teachers, students=students), tmp_path / "study")
    assert wrong(tmp_path / "study") == []

    (teacher,) = (path.name for path in (tmp_path / "study" / "runs").glob("teacher-weak-*"))
    caches = [*(tmp_path / "study" / "caches").iterdir()]
    assert len(caches) == 2
    for cache in caches:
        cache.rename(tmp_path / "kept")
        (found,) = wrong(tmp_path / "study")
        temperature = read_cache_manifest(tmp_path / "kept").temperature
        assert f"the one of {teacher}, unigram with format" in found
        assert f"at temperature {temperature:g}" in found
        assert "is lost; `tutelage study run` makes it again" in found
        (tmp_path / "kept").rename(cache)
        # A model's path is in the cache as it was given, relative to where the study was started, say.
        record = read_cache_manifest(cache).teacher
        parts = [["model", f"given/{name}"] for _, name in record.parts]
        given = {"id": ", ".join(name for _, name in parts), "parts": parts}
        change_manifest(cache, teacher=record.model_dump(mode="json") | given)
    assert wrong(tmp_path / "study") == []


def test_of_a_foreign_model_nothing_can_be_compared_and_that_is_said(tmp_path, command):
    model = tmp_path / "model"
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=99, **sizes)).save_pretrained(model)

    (found,) = wrong(model)
    assert found.startswith(f"{model}: no checksums.json: another program wrote it")
    assert "hf cache verify" in found
    assert "again" not in found
    code, shown, _ = command("verify", model)
    assert code == 1
    assert shown.startswith("unknown ")
    assert "nothing here is known to be wrong; 1 can only be compared where it is from" in shown

    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (found,) = wrong(tmp_path)
    assert "model.safetensors" in found.partition(": ")[2]


def test_an_intact_record_in_the_place_of_another_is_named(tmp_path):
    write_sealed(tmp_path / "state.json", {"status": "running", "step": 3})
    write_sealed(tmp_path / "provenance.json", {"command": ["tutelage"], "sessions": []})
    (tmp_path / "overlap").mkdir()
    for letter in "ab":
        kept(tmp_path / "overlap" / f"{letter}.json", lambda letter=letter: [letter])
    assert not [line for line in wrong(tmp_path) if "another file" in line]

    for place, other in (("provenance.json", "state.json"), ("overlap/a.json", "overlap/b.json")):
        before = (tmp_path / place).read_bytes()
        shutil.copyfile(tmp_path / other, tmp_path / place)
        (found,) = (line for line in wrong(tmp_path) if "another file" in line)
        assert place in found
        (tmp_path / place).write_bytes(before)
