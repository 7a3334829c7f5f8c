"""Which files a path or a pattern names, and that what it names is read or refused."""

from __future__ import annotations

import os

import pytest

from tutelage.data.text_files import find
from tutelage.errors import UserError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("d[1]/a.txt", "d1/a.txt", "d1/b[2].txt", "d1/b2.txt", "d1/inner/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("d[1]/a.txt", ["d[1]/a.txt"]),
        ("d[1]/*.txt", ["d[1]/a.txt"]),
        ("d[0-9]/a.txt", ["d1/a.txt"]),
        ("d1/b[2].txt", ["d1/b[2].txt"]),
        ("d1/b[1-3].txt", ["d1/b2.txt"]),
        ("d1/*", ["d1/a.txt", "d1/b2.txt", "d1/b[2].txt"]),
        ("d1/**", ["d1/a.txt", "d1/b2.txt", "d1/b[2].txt", "d1/inner/c.txt"]),
        ("./d1/../d1/a.txt", ["d1/../d1/a.txt"]),
    ],
)
@pytest.mark.parametrize("is_absolute", [False, True])
def test_what_stands_there_goes_before_what_a_pattern_means(folder, pattern, names, is_absolute):
    base = f"{folder}/" if is_absolute else ""
    assert [str(path) for path in find([base + pattern])] == [base + name for name in names]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("d1", r"^d1: is a directory; name its files, for example d1/\*\.txt$"),
        ("", r"is a directory"),
        ("d1/i*", r"^d1/i\*: no such file$"),
        ("none*.txt", r"^none\*\.txt: no such file$"),
        ("d1/" + "a" * 300, r"a: cannot be read \(File name too long\)$"),
        ("gone.txt", r"^gone\.txt: no such file: a link to nowhere, which is not there$"),
        ("*.txt", r"^gone\.txt: no such file: a link to nowhere, which is not there$"),
        ("pipe", r"^pipe: is no file that can be read twice$"),
        ("p*", r"^pipe: is no file that can be read twice$"),
    ],
)
def test_what_cannot_be_read_is_named_and_never_passed_over(folder, pattern, message):
    (folder / "gone.txt").symlink_to("nowhere")
    os.mkfifo(folder / "pipe")
    with pytest.raises(UserError, match=message):
        find([pattern])
