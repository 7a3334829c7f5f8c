"""Signals that end a block of work."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from tutelage.cli.main import main
from tutelage.stopping import interruptible


class SignalledWhenDeleted:
    """The signal comes while Python ignores what is raised."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __del__(self) -> None:
        os.kill(os.getpid(), self._number)
        time.sleep(0.001)  # the handler runs here


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_ends_the_block_even_while_an_object_is_deleted(number, capfd):
    def delete_and_wait():
        with interruptible():
            one = SignalledWhenDeleted(number)
            del one
            time.sleep(5)

    hook, start = sys.unraisablehook, time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        delete_and_wait()
    assert time.monotonic() - start < 2
    assert sys.unraisablehook is hook
    assert "ignored" not in capfd.readouterr().err


def test_other_errors_of_deleted_objects_are_told_as_before(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: told.append(found.exc_type))

    class Broken:
        def __del__(self) -> None:
            raise OSError

    with interruptible():
        one = Broken()
        del one
    assert told == [OSError]


def test_a_signal_before_a_command_has_begun_is_no_traceback(monkeypatch, capsys):
    def signalled(_app: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr("typer.main.get_command", signalled)  # what is made of the command line first
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert capsys.readouterr().err.strip() == "stopped; run the same command again to resume"
