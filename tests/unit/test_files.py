from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

from tutelage.errors import DiskError, Stopped, UserError
from tutelage.files import (
    LockedError,
    atomic_directory,
    atomic_write,
    lock,
    lock_when_free,
    make_directory,
    write_json,
    write_text,
)
from tutelage.run_directory import RunDirectory

HOST = socket.gethostname()


def test_text_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_directory_appears_only_when_complete(tmp_path):
    path = tmp_path / "d"

    def fail():
        with atomic_directory(path) as partial:
            (partial / "x").write_text("1")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []
    leftover = tmp_path / ".partial-d-killed"
    leftover.mkdir()
    with atomic_directory(path) as partial:
        (partial / "x").write_text("2")
    assert [p.name for p in tmp_path.iterdir()] == ["d"]
    assert (path / "x").read_text() == "2"


@pytest.fixture
def order(monkeypatch):
    """Names of what is flushed to the disk and what is renamed, in that order."""
    steps = []
    fsync, replace = os.fsync, os.replace

    def flushed(number):
        steps.append(("flush", os.path.realpath(f"/proc/self/fd/{number}")))
        fsync(number)

    def renamed(old, new, **kwargs):
        steps.append(("rename", str(new)))
        replace(old, new, **kwargs)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "rename", renamed)
    monkeypatch.setattr(os, "replace", renamed)
    return steps


def test_a_disk_that_fills_up_while_a_directory_is_copied_is_named(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").touch()

    def refused(_, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    with (
        pytest.raises(DiskError, match="b: no space left on the device"),
        atomic_directory(tmp_path / "b") as partial,
    ):
        shutil.copytree(tmp_path / "a", partial, dirs_exist_ok=True, copy_function=refused)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_that_is_longer_than_allowed_is_one_line(tmp_path):
    """As by `ulimit -f`, or on a disk whose files may have 4 GB."""

    def refused(_, path):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), path)

    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").touch()
    with (
        pytest.raises(UserError, match=r"b: cannot be written \(File too large\)"),
        atomic_directory(tmp_path / "b") as partial,
    ):
        shutil.copytree(tmp_path / "a", partial, dirs_exist_ok=True, copy_function=refused)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_content_reaches_the_disk_before_its_name_and_the_name_before_the_return(tmp_path, order):
    write_text(tmp_path / "a", "1")
    assert [kind for kind, _ in order] == ["flush", "rename", "flush"]
    assert order[-1] == ("flush", str(tmp_path))

    order.clear()
    with atomic_directory(tmp_path / "d") as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "x").write_text("2")
        (partial / "y").write_text("3")
        temporary = str(partial)
    before = order.index(("rename", str(tmp_path / "d")))
    flushed = {path for kind, path in order[:before] if kind == "flush"}
    assert flushed == {temporary, f"{temporary}/sub", f"{temporary}/sub/x", f"{temporary}/y"}
    assert order[before + 1 :] == [("flush", str(tmp_path))]


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o664), (0o027, 0o640)])
def test_files_of_libraries_get_the_permissions_of_the_user(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "a", "1")
        with atomic_directory(tmp_path / "d") as partial:
            save_file({"x": torch.zeros(1)}, partial / "x.safetensors")
        with atomic_write(tmp_path / "y.safetensors") as partial:
            save_file({"x": torch.zeros(1)}, partial)
    finally:
        os.umask(before)
    for name in ("a", "d/x.safetensors", "y.safetensors"):
        assert (tmp_path / name).stat().st_mode & 0o777 == mode


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_links_are_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "lock").symlink_to(victim)
    with pytest.raises(UserError, match="symbolic links"), lock(tmp_path / "lock", "it"):
        pass
    (tmp_path / "a").symlink_to(victim)
    write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new"
    assert victim.read_text() == "mine"
    (tmp_path / "metrics.jsonl").symlink_to(victim)
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written .*symbolic links"):
        RunDirectory(tmp_path).append_metrics({"step": 1})
    assert victim.read_text() == "mine"


def test_unwritable_places_are_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for action in (lambda: make_directory(file / "below"), lambda: write_text(file / "x", "y")):
        with pytest.raises(UserError, match=r"cannot be written \(.*\); use a directory where you may"):
            action()


def _hold(path, ready, leave):
    with lock(path, "it"):
        ready.set()
        leave.wait(30)


def test_claim_is_exclusive_and_freed_by_death(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, leave = context.Event(), context.Event()
    path = tmp_path / "lock"
    other = context.Process(target=_hold, args=(path, ready, leave))
    other.start()
    assert ready.wait(30)
    with pytest.raises(UserError, match=f"process {other.pid} on {HOST} is already"), lock(path, "it"):
        pass
    other.kill()
    other.join()
    with lock(path, "it"):
        pass
    assert not path.exists()


def test_claims_that_come_and_go_are_never_held_by_two(tmp_path):
    """Threads lock like processes here, since each opens the file for itself."""
    path, holders, seen = tmp_path / "lock", [], []

    def work(name):
        for _ in range(300):
            try:
                with lock(path, "it"):
                    holders.append(name)
                    seen.append(len(holders))
                    holders.remove(name)
            except LockedError:
                pass

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    assert set(seen) == {1}
    assert not path.exists()


WITHOUT_LOCKS = """
import errno, sys, time
from pathlib import Path
from tutelage import files

def refuse(_fd, *, blocking):
    raise OSError(errno.ENOLCK, "No locks available")

files.lock_descriptor = refuse
with files.lock(Path(sys.argv[1]), "it"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def no_locks(monkeypatch):
    """A file system whose server gives no locks."""

    def refuse(_fd, *, blocking):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("tutelage.files.lock_descriptor", refuse)


@pytest.mark.usefixtures("no_locks")
def test_without_locks_the_file_is_the_lock_until_its_process_is_gone(tmp_path):
    path = tmp_path / "lock"
    with subprocess.Popen(
        [sys.executable, "-c", WITHOUT_LOCKS, str(path)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match=f"process {other.pid} on {HOST} is already"), lock(path, "it"):
            pass
        other.kill()
    with lock(path, "it"):
        assert str(os.getpid()) in path.read_text()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_locks")
@pytest.mark.parametrize(
    ("record", "holder"),
    [
        ("4711\nelsewhere\n", "process 4711 on elsewhere"),  # it may be dead or busy: nobody here can tell
        ("", "process unknown on unknown"),  # it was killed before it wrote who it is
    ],
)
def test_without_locks_a_holder_elsewhere_stays_until_a_person_removes_it(tmp_path, record, holder):
    path = tmp_path / "lock"
    path.write_text(record)
    with pytest.raises(LockedError, match=rf"^it: {holder} is already .*delete {path}\)$"), lock(path, "it"):
        pass
    path.unlink()
    with lock(path, "it"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_a_holder_on_another_machine_left_is_taken_over_where_its_lock_is_free(tmp_path):
    path = tmp_path / "lock"
    path.write_text("\n4711\nelsewhere\n")
    with lock(path, "it"):
        assert path.read_text().split() == [str(os.getpid()), HOST]
    assert not path.exists()


def test_an_error_of_locking_that_says_nothing_about_locks_is_not_swallowed(tmp_path, monkeypatch):
    def refuse(_fd, *, blocking):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("tutelage.files.lock_descriptor", refuse)
    with pytest.raises(OSError, match="Input/output"), lock(tmp_path / "lock", "it"):
        pass


def test_a_held_lock_is_waited_for_until_it_is_free_or_the_waiter_gives_up(tmp_path):
    path = tmp_path / "lock"
    with contextlib.ExitStack() as other:
        other.enter_context(lock(path, "it"))
        with pytest.raises(Stopped), lock_when_free(path, "it", lambda: True):
            pass
        with lock_when_free(path, "it", lambda: other.close() is not None):
            assert path.exists()
    assert not path.exists()


def test_a_lock_in_a_directory_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match=rf"{tmp_path / 'gone' / 'lock'}: cannot be written"):
        lock(tmp_path / "gone" / "lock", "it").__enter__()
