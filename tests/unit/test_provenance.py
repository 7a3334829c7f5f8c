import functools
import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import pytest

from tutelage import provenance
from tutelage.config.data_config import StoreConfig
from tutelage.study.engines import StoreTask
from tutelage.study.engines.tasks import execute


@pytest.fixture
def checkout(tmp_path):
    """A git repository with one committed source file."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "code.py").write_text("x = 1\n")
    _git(tmp_path, "init", "--quiet")
    _git(tmp_path, "add", "src/code.py")
    _git(tmp_path, "commit", "--quiet", "--message", "first")
    return tmp_path


def _git(path, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", "-C", path, *identity, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_everything_is_json_and_present():
    before = datetime.now(UTC).replace(microsecond=0)
    found = provenance.collect("cpu")
    assert json.loads(json.dumps(found)) == found
    assert before <= datetime.fromisoformat(found["time"]) <= datetime.now(UTC)
    assert found["command"] == sys.argv
    assert found["versions"]["torch"] == version("torch")
    assert set(found["versions"]) == {"python", *provenance.PACKAGES}
    assert found["cpus"] == os.cpu_count()
    assert found["device"].startswith("cpu (")


def test_threads_are_torchs_own_once_torch_is_there():
    import torch  # the test is about the moment of import

    assert provenance.collect("cpu")["threads"] == torch.get_num_threads()


def test_collecting_does_not_import_torch():
    code = (
        "import sys; from tutelage.provenance import collect; found = collect('cuda');"
        "print(found['threads'], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None False"


def test_the_commit_is_that_of_the_checkout(checkout):
    head = _git(checkout, "rev-parse", "HEAD")
    assert provenance._commit(checkout / "src" / "code.py") == (head, False)
    (checkout / "src" / "notes.txt").write_text("untracked files are not part of the code")
    assert provenance._commit(checkout / "src" / "code.py") == (head, False)
    (checkout / "src" / "code.py").write_text("x = 2\n")
    assert provenance._commit(checkout / "src" / "code.py") == (head, True)


def test_the_commit_is_that_of_what_the_process_has_loaded(checkout, monkeypatch):
    monkeypatch.setattr(provenance, "__file__", str(checkout / "src" / "code.py"))
    monkeypatch.setattr(provenance, "_loaded_commit", functools.cache(provenance._loaded_commit.__wrapped__))
    first = provenance.collect("cpu")
    (checkout / "src" / "code.py").write_text("x = 2\n")
    assert [first[name] for name in ("commit", "dirty")] == [_git(checkout, "rev-parse", "HEAD"), False]
    assert provenance.collect("cpu")["dirty"] is False


def test_a_copy_in_somebody_elses_checkout_has_no_commit(checkout):
    copy = checkout / "venv" / "code.py"
    copy.parent.mkdir()
    shutil.copy(checkout / "src" / "code.py", copy)
    assert provenance._commit(copy) == (None, None)


def test_nothing_fails_without_git_or_with_an_odd_device(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(provenance, "_loaded_commit", provenance._loaded_commit.__wrapped__)
    found = provenance.collect("cuda:99")
    assert (found["commit"], found["dirty"]) == (None, None)
    assert found["device"].startswith("cuda:99 (")


def test_a_command_that_fails_gives_none():
    assert provenance._output("git", "no-such-subcommand") is None
    assert provenance._output("no-such-program-at-all") is None


def test_a_package_that_is_not_there_has_no_version():
    assert provenance.installed("tutelage-no-such-package") is None
    assert provenance.installed("numpy") == version("numpy")


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the processor's name is read from Linux")
def test_the_processor_is_as_the_system_names_it():
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    name = provenance.cpu_model()
    assert name is None or name in text or "model name" not in text


def test_code_is_one_line_with_versions_and_commit():
    commit = provenance.collect("cpu")["commit"]
    text = provenance.code()
    assert text.startswith(f"tutelage {version('tutelage')}, torch {version('torch')}, transformers ")
    assert ("commit" in text) == (commit is not None)
    assert commit is None or commit[:12] in text
    assert "\n" not in text


def test_what_is_secret_is_not_recorded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    shown = {
        "https://ann:word@host/x": "https://***@host/x",
        "a.api_key=1234": "a.api_key=***",
        "hf_abcdefghijklmnopqrstuv": "***",
        "store=/home/ann/s": "store=~/s",
        "/home/anna/s": "/home/anna/s",
        "tokens=200K": "tokens=200K",
    }
    assert {text: provenance.without_secrets(text) for text in shown} == shown
    monkeypatch.setattr("sys.argv", ["/home/ann/bin/tutelage", *shown])
    assert provenance.collect("cpu")["command"] == ["~/bin/tutelage", *shown.values()]


def test_a_name_that_is_no_text_is_recorded_as_one(monkeypatch):
    monkeypatch.setattr("sys.argv", ["tutelage", "\udcffx.yaml"])
    assert provenance.collect("cpu")["command"] == ["tutelage", "\\udcffx.yaml"]


def test_a_task_that_was_sent_has_the_command_that_asked_for_it(tmp_path, monkeypatch):
    """Not that of the process of Ray's, or of a launcher, which holds addresses and cannot be repeated."""
    asked = ["tutelage", "study", "run", "study.yaml"]
    monkeypatch.setattr(sys, "argv", [*asked, "token=abc"])
    nothing = StoreConfig(name="none", sources=({"kind": "corpus", "name": "nothing"},))
    task = StoreTask(config=nothing, directory=tmp_path).model_dump_json()
    assert "abc" not in task
    monkeypatch.setattr(sys, "argv", ["default_worker.py", "--gcs-address=10.0.0.1:6379"])
    execute(task)
    assert provenance.collect("cpu")["command"] == [*asked, "token=***"]
