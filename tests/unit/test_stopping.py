"""Signals that end a block of work."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import pytest

from tutelage.cli.main import main
from tutelage.errors import UserError
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


def test_a_signal_that_is_raised_again_too_early_is_raised_once_more(monkeypatch, capfd):
    start = threading.Timer.start

    def slow(timer: threading.Timer) -> None:  # as on a busy machine
        start(timer)
        started.append(timer)
        if len(started) == 1:
            time.sleep(0.1)

    started: list[threading.Timer] = []
    monkeypatch.setattr(threading.Timer, "start", slow)

    def delete_and_wait():
        with interruptible():
            one = SignalledWhenDeleted(signal.SIGTERM)
            del one
            time.sleep(5)

    with pytest.raises(KeyboardInterrupt):
        delete_and_wait()
    assert len(started) > 1
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


def test_a_command_that_a_signal_ends_says_so(command, monkeypatch):
    def signalled(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr("tutelage.cli.doctor.examine", signalled)
    code, _, told = command("doctor")
    assert code == 130
    assert told.strip() == "stopped; run the same command again to resume"


class SignalledInClass:
    """The signal comes while a class is made, where Python 3.11 wraps what is raised."""

    def __set_name__(self, owner: type, name: str) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)


def test_a_signal_while_something_is_imported_is_no_traceback(monkeypatch, capsys):
    def imported(_app: object) -> None:
        try:
            type("Imported", (), {"field": SignalledInClass()})
        except RuntimeError as error:
            message = "a library could not be read"
            raise OSError(message) from error

    monkeypatch.setattr("typer.main.get_command", imported)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert capsys.readouterr().err.strip() == "stopped; run the same command again to resume"


def test_what_fails_in_cleaning_up_after_a_signal_is_told(monkeypatch, capsys):
    def cleaned(_app: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except KeyboardInterrupt:
            message = "the last checkpoint could not be written"
            raise UserError(message)  # noqa: B904 - as a block that cleans up does

    monkeypatch.setattr("typer.main.get_command", cleaned)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: the last checkpoint could not be written\n"
