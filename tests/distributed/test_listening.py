"""Nothing that tutelage starts on one machine can be reached from another, as the kernel's tables say."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time

import pytest
import yaml
from listening import descendants, listening

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


def watched(command, seconds=200, **options):
    """Run a command; return every address that it or its children listened at, and what it printed."""
    seen, deadline = set(), time.monotonic() + seconds
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([sys.executable, *command], stdout=output, stderr=output, **options)
        while process.poll() is None and time.monotonic() < deadline:
            seen |= listening(descendants(process.pid))
            time.sleep(0.3)
        process.kill()
        status = process.wait()
        output.seek(0)
        text = output.read()
    assert status == 0, text
    return seen, text


def test_an_open_socket_is_seen():
    with socket.create_server(("", 0)) as anywhere, socket.create_server(("127.0.0.1", 0)) as here:
        found = listening({os.getpid()})
        assert {f"0.0.0.0:{anywhere.getsockname()[1]}", f"127.0.0.1:{here.getsockname()[1]}"} <= found


def test_processes_of_a_run_listen_on_loopback(make_config, tmp_path):
    config = make_config(tokens=256 * 20, checkpoint={"every": 256 * 5, "keep": 1})
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    seen, output = watched(["-m", "tutelage", "train", "--nproc", "2", str(file)])
    assert "model" in output
    assert len(seen) >= 3  # the store, and gloo in both
    assert {address.rpartition(":")[0] for address in seen} == {"127.0.0.1"}


ON_RAY = """
import sys
from pathlib import Path
from tutelage.config.run_config import RunConfig
from tutelage.run_directory import run_id
from tutelage.study.engines import RunTask
from tutelage.study.engines.ray import RayEngine

config = RunConfig.model_validate_json(sys.argv[1])
with RayEngine(None, 2, "cpu") as engine:
    engine.start("run", RunTask(configs=(config,), ids=(run_id(config),)))
    while not (ended := engine.wait(0.5)):
        pass
    print(ended)
"""


def test_ray_without_a_cluster_listens_on_loopback(make_config):
    pytest.importorskip("ray")
    config = make_config(tokens=256 * 20, parallel={"processes": 2})
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    seen, output = watched(["-c", ON_RAY, config.model_dump_json()], env=environment)
    assert "status='done'" in output
    assert len(seen) >= 6  # the driver, two servers, two workers, and those of the run
    assert {address.rpartition(":")[0] for address in seen} == {"127.0.0.1"}
