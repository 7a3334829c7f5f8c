"""A wrong address of a Ray cluster is an error in seconds; Ray itself would try for minutes."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time

import pytest

from tutelage.errors import UserError
from tutelage.study.engines.ray import RayEngine

pytest.importorskip("ray")


@pytest.fixture
def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def listener():
    """A server that says something else than Ray, or nothing, to whoever comes."""
    server = socket.create_server(("127.0.0.1", 0))
    kept = []

    def serve(answer):
        def talk():
            connection, _ = server.accept()
            kept.append(connection)
            if answer is not None:
                connection.recv(64)
                connection.sendall(answer)
                connection.close()

        threading.Thread(target=talk, daemon=True).start()
        return server.getsockname()[1]

    yield serve
    for one in (*kept, server):
        one.close()


def refused(address):
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        RayEngine(address, None, "cpu")
    assert time.monotonic() - began < 15
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "localhost:{}"])
def test_nobody_listens(form, closed_port):
    address = form.format(closed_port)
    said = refused(address)
    assert said.startswith(f"--ray-address {address}: ")
    assert "refused" in said


@pytest.mark.parametrize("address", ["no-such-host.invalid:6379", "ray://no-such-host.invalid:1"])
def test_the_host_is_not_known(address):
    assert "nothing that is Ray answers" in refused(address)


@pytest.mark.parametrize(
    "address",
    ["localhost", "a:b", ":6379", "host:99999", "host:-1", "http://host:80", "ray://", "[::1", "a b"],
)
def test_what_is_no_address(address):
    assert "write HOST:PORT" in refused(address)


@pytest.mark.parametrize(
    "answer", [None, b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9.6\r\n"]
)
def test_something_else_listens(answer, listener, monkeypatch):
    monkeypatch.setattr("tutelage.study.engines.ray._ANSWER_SECONDS", 1.0)
    said = refused(f"127.0.0.1:{listener(answer)}")
    assert "not Ray" in said or "nothing that is Ray" in said


def test_the_environment_is_checked_too(closed_port, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{closed_port}")
    assert refused(None).startswith("RAY_ADDRESS 127.0.0.1")


def test_on_the_command_line(closed_port, tmp_path):
    began = time.monotonic()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tutelage", "study", "run", "demo", "--output", str(tmp_path / "st")),
            *("--engine", "ray", "--ray-address", f"127.0.0.1:{closed_port}"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert time.monotonic() - began < 60
    assert done.returncode == 2
    assert done.stderr.startswith("error: --ray-address 127.0.0.1")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "st").exists()


def test_a_cluster_that_is_started_here_needs_a_short_path(tmp_path, monkeypatch):
    """Job systems give directories with longer ones than sockets may have."""
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # what the engine sets, to be restored
    with pytest.raises(UserError, match=r"no cluster can be started here .*RAY_TMPDIR=/tmp"):
        RayEngine("local", 1, "cpu").__enter__()
