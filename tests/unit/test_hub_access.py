"""A Hub that does not answer costs seconds and says one line, and what was downloaded before is used."""

from __future__ import annotations

import hashlib
import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from datasets import config as datasets_config
from huggingface_hub import constants
from tiny_families import tiny_model

from tutelage import hub_access
from tutelage.config.data_config import HubSource
from tutelage.data.row_readers import hub_rows
from tutelage.data.store import open_store
from tutelage.data.tokenizer import find_tokenizer
from tutelage.data.tokenizer_comparison import check_model_tokenizer
from tutelage.errors import UserError
from tutelage.evals.evaluated_model import find_model
from tutelage.models import hub, slices
from tutelage.models.directory import hub_config

NAME = "someone/model-of-nobody"
ASKED = {
    "config": lambda: hub_config(NAME),
    "model": lambda: hub.load(NAME),
    "slices": lambda: slices.describe(NAME),
    "tokenizer": lambda: find_tokenizer(Path(NAME)),
    "tokenizer of one word": lambda: find_tokenizer(Path(NAME.split("/")[1])),
    "evaluated": lambda: find_model(NAME, Path("evals")),
    "dataset": lambda: next(hub_rows(HubSource(kind="hub", path=NAME))),
}


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """A Hub whose address refuses connections."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    hub_access._no_answer.cache_clear()
    yield address
    hub_access._no_answer.cache_clear()


@pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED)
def test_a_hub_out_of_reach_is_one_line_at_once(no_hub, ask, capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        ask()
    assert time.monotonic() - began < 10  # left to themselves the libraries take 24 s at least
    text = str(caught.value)
    assert "\n" not in text
    assert NAME.split("/")[1] in text
    assert (
        f"the Hugging Face Hub cannot be reached ({no_hub}: ConnectError; HF_ENDPOINT names a mirror)" in text
    )
    assert ("copy that cache" in text) == (ask is not ASKED["dataset"])  # a stream leaves no copy
    assert "Retrying" not in "".join(capfd.readouterr())
    assert not constants.HF_HUB_OFFLINE
    assert not datasets_config.HF_HUB_OFFLINE


def test_what_was_downloaded_before_is_used(no_hub, tmp_path):
    snapshot = tmp_path / "cache" / f"models--{NAME.replace('/', '--')}" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"model_type": "llama"}')
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    script = f"""
from pathlib import Path
from tutelage.models.directory import hub_config
print(hub_config({NAME!r}))
Path({str(snapshot)!r}, "adapter_config.json").write_text("{{}}")
for _ in range(2):
    try:
        hub_config({NAME!r})
    except Exception as error:
        print(error)
    Path({str(snapshot)!r}, "config.json").unlink(missing_ok=True)
"""
    where = {"HF_ENDPOINT": no_hub, "HF_HUB_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | where, capture_output=True, text=True, check=True
    )
    config, *adapted = done.stdout.splitlines()
    assert config == "{'model_type': 'llama'}"
    assert len(adapted) == 2  # beside a model, and as most are: alone
    assert all(line.startswith(f"{NAME}: adapter_config.json: it is an adapter") for line in adapted)
    assert "Retrying" not in done.stderr


def test_a_hub_that_never_answers_is_not_waited_for(no_hub, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(hub_access, "_SECONDS", 0.5)
        began = time.monotonic()
        with pytest.raises(
            UserError, match=r"cannot be reached \(http://127\.0\.0\.1:\d+: (no answer|\w*Timeout)"
        ):
            hub_config(NAME)
        assert time.monotonic() - began < 5


def test_a_hub_that_has_no_such_model_says_so_itself(tmp_path):
    class Empty(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(200 if self.path == "/" else 404)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Empty) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        script = f"from tutelage.models.directory import hub_config; hub_config({NAME!r})"
        where = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
        }
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | where,
            capture_output=True,
            text=True,
            check=False,
        )
        server.shutdown()
    last = done.stderr.strip().splitlines()[-1]
    assert f"model {NAME}: not on this machine, and the Hub does not give it: " in last


def test_who_asks_for_no_hub_is_reminded_of_it(no_hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="the Hugging Face Hub is not asked, since HF_HUB_OFFLINE is set"):
        hub_config(NAME)
    assert constants.HF_HUB_OFFLINE


def cache_of(files: dict[str, bytes], tmp_path: Path) -> Path:
    """The cache that a download of these files leaves: blobs with hashes for names, and links to them."""
    place = tmp_path / "cache" / f"models--{NAME.replace('/', '--')}"
    snapshot = place / "snapshots" / ("0" * 40)
    for directory in (snapshot, place / "blobs", place / "refs"):
        directory.mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    for name, content in files.items():
        as_git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
        digest = hashlib.sha256(content) if name.endswith(".safetensors") else as_git
        (place / "blobs" / digest.hexdigest()).write_bytes(content)
        (snapshot / name).symlink_to(place / "blobs" / digest.hexdigest())
    return snapshot


@pytest.fixture
def files(store, tmp_path) -> dict[str, bytes]:
    """A model with the tokenizer of `store`, as the files of a repository."""
    tiny_model("llama", tmp_path / "made")
    made = {file.name: file.read_bytes() for file in (tmp_path / "made").iterdir()}
    return made | {name: (store / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}


@pytest.mark.parametrize("damaged", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_download_that_is_not_what_the_hub_has_is_refused(no_hub, tmp_path, files, damaged):
    """The length is right: no library looks further."""
    snapshot = cache_of(files, tmp_path)
    asked = {"evaluated": lambda: find_model(NAME, tmp_path / "evals")}
    if damaged != "tokenizer.json":
        asked |= {"model": lambda: hub.load(NAME), "slices": lambda: slices.describe(NAME)}
    if damaged != "model.safetensors":
        asked |= {"tokenizer": lambda: find_tokenizer(Path(NAME))}
    for ask in asked.values():
        ask()
    blob = (snapshot / damaged).resolve()
    content = bytearray(blob.read_bytes())
    content[-4] ^= 1
    blob.write_bytes(content)
    for ask in asked.values():
        with pytest.raises(UserError, match=f"{NAME}.*: {damaged} is not what the Hub has") as caught:
            ask()
        assert str(blob) in str(caught.value)


def test_half_a_download_is_not_taken_for_all_there_is(no_hub, tmp_path, files, store):
    """Its config.json alone, as `hub_commit` leaves it, does not say that a model has no tokenizer."""
    cache_of({"config.json": files["config.json"]}, tmp_path)
    compared = "teacher T", NAME, open_store(store)
    setting = {"setting": "teacher.assume_same_tokenizer"}
    for ask in (
        lambda: find_tokenizer(Path(NAME)),
        lambda: find_model(NAME, tmp_path / "evals"),
        lambda: check_model_tokenizer(*compared, **setting),
    ):
        with pytest.raises(UserError, match=r"not among earlier downloads .* cannot be reached"):
            ask()
    assert check_model_tokenizer(*compared, assume=True, **setting).ids == 0


@pytest.mark.slow  # the library asks again and again
def test_an_error_of_the_hub_does_not_make_half_a_download_whole(tmp_path):
    """It answers, but with errors: the library then returns what was downloaded before, whatever that is."""

    class Broken(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(200 if self.path == "/" else 500)

        def do_GET(self):
            self.send_error(500)

        def log_message(self, *_):
            pass

    cache_of({"config.json": b"{}"}, tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Broken) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
        }
        script = (
            "from pathlib import Path; from tutelage.data.tokenizer import find_tokenizer; "
            f"find_tokenizer(Path({NAME!r}))"
        )
        command = [sys.executable, "-c", script]
        done = subprocess.run(
            command, env=os.environ | where, capture_output=True, text=True, check=False, cwd=tmp_path
        )
        server.shutdown()
    last = done.stderr.strip().splitlines()[-1]
    assert (
        f"tokenizer.path = {NAME}: not on this machine, and the Hub does not give it: Server error '500"
        in last
    )
