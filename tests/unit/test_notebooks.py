"""A notebook, by a real kernel: rows in the output of a cell, and what goes wrong in one line."""

from __future__ import annotations

import threading

import pytest
from jupyter_client.manager import KernelManager

SETUP = """
import tutelage as tt
RUN = {run!r}
def train():
    with tt.RichProgress() as progress:
        return tt.run(RUN, progress=progress)
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(tmp_path_factory.mktemp("notebook")))
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    yield client, manager
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def in_cell(kernel, code, when=lambda _: False):
    """The messages of a cell, which is interrupted at the first for which `when` holds."""
    client, manager = kernel
    messages = []

    def receive(message):
        if message["msg_type"] not in ("status", "execute_input"):
            messages.append(message)
        if when(message) and not interrupted.is_set():
            interrupted.set()
            manager.interrupt_kernel()

    interrupted = threading.Event()
    client.execute_interactive(code, output_hook=receive, timeout=120)
    return messages


def texts(messages, kind):
    return [one["content"]["data"]["text/plain"] for one in messages if one["msg_type"] == kind]


def test_a_run_that_is_stopped_and_resumed_in_a_cell(kernel, make_config):
    config = make_config(tokens=4000 * 256).model_dump(mode="json", exclude_defaults=True)
    assert in_cell(kernel, SETUP.format(run=config)) == []

    def trains(message):
        return message["msg_type"] == "update_display_data" and "steps" in str(message["content"]["data"])

    stopped = in_cell(kernel, "train()", when=trains)
    rows = [one for one in stopped if one["msg_type"] in ("display_data", "update_display_data")]
    places = [one["content"].get("transient", {}).get("display_id") for one in rows]
    first, *later = texts(stopped, "update_display_data")
    assert len({place for place in places if place}) == 1  # the others are lines that stay
    assert texts(stopped, "display_data")[0].startswith("preparing")
    assert any("/4,000 steps" in text for text in (first, *later))
    assert later[-1] == ""
    (error,) = (one["content"] for one in stopped if one["msg_type"] == "error")
    (line,) = error["traceback"]
    assert line.startswith("stopped after step ")
    assert line.endswith(" of 4,000; run the cell again to resume")

    resumed = in_cell(kernel, "train()", when=trains)
    assert any(text.startswith("resuming after step ") for text in texts(resumed, "display_data"))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ('tt.run("no-such.yaml")', "UserError: no-such.yaml: no such file"),
        ('tt.find_run("no-such")', "UserError: run = no-such: no run is called so in"),
        ('tt.open_store("no-such")', "UserError: store = no-such: no store is called so in"),
    ],
)
def test_what_is_wrong_is_one_line_of_a_cell(kernel, call, said):
    (shown,) = in_cell(kernel, f"import tutelage as tt\n{call}")
    (line,) = shown["content"]["traceback"]
    assert line.startswith(said)


def test_a_cell_shows_controls_in_a_name_and_does_not_obey_them(kernel):
    code = 'progress = tt.RichProgress()\nprogress.start("a\\x1b[31mb", 2, "steps")\nprogress.__enter__()'
    shown = texts(in_cell(kernel, f"import tutelage as tt\n{code};"), "display_data")
    assert any(r"a\x1b[31mb" in text for text in shown), shown
    assert not any("\x1b" in text for text in shown)


def test_an_error_of_ours_keeps_its_traceback(kernel):
    (shown,) = in_cell(kernel, "1 / 0")
    assert len(shown["content"]["traceback"]) > 1
