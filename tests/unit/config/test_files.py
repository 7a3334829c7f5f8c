from __future__ import annotations

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest

from tutelage.errors import UserError
from tutelage.files import BusyError, claimed, make_directory, new_directory, write_json, write_text


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
        with new_directory(path) as partial:
            (partial / "x").write_text("1")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []
    leftover = tmp_path / ".partial-d-killed"
    leftover.mkdir()
    with new_directory(path) as partial:
        (partial / "x").write_text("2")
    assert [p.name for p in tmp_path.iterdir()] == ["d"]
    assert (path / "x").read_text() == "2"


def test_unwritable_places_are_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for action in (lambda: make_directory(file / "below"), lambda: write_text(file / "x", "y")):
        with pytest.raises(UserError, match="cannot be written"):
            action()


def _hold(path, ready, leave):
    with claimed(path, "it"):
        ready.set()
        leave.wait(30)


def test_claim_is_exclusive_and_freed_by_death(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, leave = context.Event(), context.Event()
    path = tmp_path / "lock"
    other = context.Process(target=_hold, args=(path, ready, leave))
    other.start()
    assert ready.wait(30)
    with pytest.raises(UserError, match=f"process {other.pid} is already"), claimed(path, "it"):
        pass
    other.kill()
    other.join()
    with claimed(path, "it"):
        pass
    assert not path.exists()


def test_claims_that_come_and_go_are_never_held_by_two(tmp_path):
    """Threads lock like processes here, since each opens the file for itself."""
    path, holders, seen = tmp_path / "lock", [], []

    def work(name):
        for _ in range(300):
            try:
                with claimed(path, "it"):
                    holders.append(name)
                    seen.append(len(holders))
                    holders.remove(name)
            except BusyError:
                pass

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    assert set(seen) == {1}
    assert not path.exists()
