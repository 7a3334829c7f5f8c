"""`tutelage teach` as a user meets it: real processes, interrupted, two at a time."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time

import jsonschema
import pytest
import yaml
from whole_caches import verify_cache

from tutelage.cli.main import main
from tutelage.config.load import load
from tutelage.config.teacher_config import TeachConfig
from tutelage.teachers.cache.cache_writer import write_cache
from tutelage.teachers.cache.formats import FORMATS


@pytest.fixture
def teach_file(tmp_path, store):
    path = tmp_path / "teach.yaml"
    settings = {
        "name": "unigram",
        "store": str(store),
        "teacher": {"kind": "unigram"},
        "context_length": 32,
        "shard_tokens": 1024,
        "batch_tokens": 512,
        "device": "cpu",
        "threads": 1,
        "output": str(tmp_path / "caches"),
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def tree(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "tutelage", "teach", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(condition):
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def holders(directory):
    """Ids of the processes that hold a shard, from the lock files."""
    found = set()
    for file in directory.glob("*/shards/0*.lock"):
        with contextlib.suppress(FileNotFoundError):
            found.update(file.read_text().split()[:1])
    return found


def pause(process, directory):
    """Stop a writer, but not while it holds the manifest, for which the other would wait."""
    while True:
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.05)
        if not list(directory.glob("*/shards/manifest.lock")):
            return
        process.send_signal(signal.SIGCONT)
        time.sleep(0.01)


@pytest.mark.slow
def test_two_commands_stopped_and_continued_write_what_one_writes(teach_file, tmp_path, tutelage):
    command = [teach_file, "format={kind: hidden}"]
    alone = write_cache(load(TeachConfig, teach_file, [command[1], f"output={tmp_path / 'alone'}"]))
    size = sum(len(data) for name, data in tree(alone).items() if name.endswith(".bin"))
    caches = tmp_path / "caches"
    with start(*command) as first, start(*command) as second:
        wait_until(lambda: holders(caches) & {str(first.pid), str(second.pid)})
        early, late = (first, second) if str(first.pid) in holders(caches) else (second, first)
        pause(early, caches)  # or it may be done before the other has begun
        wait_until(lambda: str(late.pid) in holders(caches))
        for process in (late, early):
            process.send_signal(signal.SIGINT)
        early.send_signal(signal.SIGCONT)
        for process in (first, second):
            _, error = process.communicate()
            assert process.returncode == 130
            assert error == "\nstopped; run the same command again to resume\n"
    (together,) = caches.iterdir()
    assert len(list(together.glob("shards/*.bin"))) < len(list(alone.glob("shards/*.bin")))

    with start(*command) as first, start(*command) as second:
        for process in (first, second):
            text, error = process.communicate()
            assert process.returncode == 0, error
            assert f"cache    {together}\n" in text
            assert f"{size:,} bytes" in text
            assert f"teacher: {{kind: cache, path: {together}}}" in text
    assert tree(together) == tree(alone)
    verify_cache(together)


def test_estimate_compares_every_format_and_writes_nothing(teach_file, tmp_path, command):
    _, text, _ = command("teach", teach_file, "--estimate")
    for kind in FORMATS:
        assert kind in text
    (marked,) = [line for line in text.splitlines() if line.strip().startswith("->")]
    assert "sample_min_variance ids=16" in marked
    for word in ("bytes/token", "total", "FLOPs", "free"):
        assert word in text
    assert not (tmp_path / "caches").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["format.kind=topl"], "topl"),
        (["format.idz=3"], "format.idz: unknown setting; did you mean 'ids'"),
        (["format.ids=0"], "format.ids = 0"),
        (["format={kind: topk}"], "format.k: required"),
        (["context_length=1"], "context_length = 1"),
        (["teacher={kind: cache, path: x}"], "teacher"),
        (["teacher={kind: run, run: none-1}"], "no run is called so in runs/"),
        (["teacher={kind: model, path: ./none}"], "none: no such directory"),
        (["store=."], "not a token store"),
        (["format={kind: topk, k: 301}"], "at most the vocabulary of 300"),
        (["device=cuda"], "no such device"),
        (["output=/proc/x"], "/proc/x"),
        (["temperature=0"], "temperature"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(teach_file, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(teach_file.parent)
    monkeypatch.setattr(sys, "argv", ["tutelage", "teach", str(teach_file), *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_verify_recomputes_the_checksums_of_a_cache(teach_file, command):
    cache = write_cache(load(TeachConfig, teach_file, []))
    code, shown, _ = command("verify", cache)
    assert code == 0
    assert f"{cache}: teacher cache" in shown
    shard = cache / "shards" / "000001.bin"
    content = bytearray(shard.read_bytes())
    content[7] ^= 1
    shard.write_bytes(content)
    code, shown, _ = command("verify", cache)
    assert code == 1
    assert "000001.bin: damaged (a block, tokens 1,024 to 1,055); delete" in shown


def test_schema_describes_what_is_accepted(teach_file, tmp_path, command):
    command("schema", "teach", "--output", tmp_path / "teach.json")
    schema = json.loads((tmp_path / "teach.json").read_text())
    jsonschema.validate(yaml.safe_load(teach_file.read_text()), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"storr": "x"}, schema)
