"""What is published of a study: its archive gives every number of the page and of the tables again."""

import functools
import shutil
import tarfile
from pathlib import Path

import polars as pl
import publish
import pytest
from synthetic_study import write_study
from tiny_study import TINY, run_tiny, tiny_study

from tutelage.analysis.claims.judge import judge_study
from tutelage.analysis.claims.noise import default_noise, measure_noise
from tutelage.errors import UserError
from tutelage.study.plan import load_plan
from tutelage.study.results import load_results
from tutelage.study.token_tables import runs_to_compare

ROOT = Path(__file__).parents[3]
PUBLISHED = sorted(path.parent for path in (ROOT / "docs" / "results").glob("*/results.tar.xz"))
OLD = "mini"
"""Of an older version, which alone reads its archive (docs/results.md)."""
NAMES = ("answer", "claims", "teachers", "arms", "spread", "power", "noise", "origin", "constants_by_pair")
PAGE = (
    "# By hand\n\n" + "\n\n".join(f"{name}:\n<!-- numbers: {name} -->\n<!-- end -->" for name in NAMES) + "\n"
)


@functools.cache
def judged(target):
    """A published study, judged anew."""
    return publish.judged_archive(target / publish.ARCHIVE)


def test_an_archive_gives_every_number_again(tmp_path):
    study = write_study(tmp_path / "study", claims=[1, 2, 16])
    template = tmp_path / "template.md"
    template.write_text(f"{PAGE}\n![Heat](results/one/heat.png)\n")
    page = tmp_path / "docs" / "results.md"
    target = page.parent / "results" / "one"
    publish.publish(study, target, template, page)
    text = page.read_text()
    assert text.startswith("# By hand\n")
    assert "helps out of domain.<br>gain out of domain, best alpha: above 0 | supported | +3.30% |" in text
    assert "Of 3 announced claims: 2 supported (1 and 16)" in text
    assert "with commit 0123abc+ (+: with uncommitted changes)." in text
    assert {path.name for path in target.iterdir()} == {"results.tar.xz", "report.html", "tables", "heat.png"}
    shutil.rmtree(study)  # the archive alone is enough
    assert publish.check(target, page) == []

    page.write_text(text.replace("+3.30%", "+3.40%"))
    wrong = publish.check(target, page)
    assert wrong
    assert all("+3.40%" in line and "+3.30%" in line for line in wrong)
    page.write_text(text)
    table = target / "tables" / "gains.csv"
    table.write_text(table.read_text().replace("weak", "week", 1))
    assert publish.check(target, page) == [f"{table}: not the table of the archive"]


def test_archives_are_the_same_bytes_and_name_no_directory_of_the_machine(tmp_path):
    study = write_study(tmp_path / "study")
    record = study / "runs" / "baseline-43" / "provenance.json"
    command = f'["{tmp_path}/bin/tutelage", "study", "run", "x.yaml", "--output", "{tmp_path}/study"]'
    record.write_text(record.read_text().replace('"tutelage demo"', command))
    first, second = tmp_path / "a.tar.xz", tmp_path / "b.tar.xz"
    publish.pack(study, first)
    publish.pack(study, second)
    assert first.read_bytes() == second.read_bytes()
    unpacked = publish.unpack(first, tmp_path / "again")
    text = (unpacked / "runs" / "baseline-43" / "provenance.json").read_text()
    assert str(tmp_path) not in text
    assert load_results(unpacked).provenance["baseline-43"].command[0] == "tutelage"
    assert load_results(unpacked).scores.equals(load_results(study).scores)


def test_an_unfinished_study_and_a_page_without_a_place_are_refused(tmp_path):
    study = write_study(tmp_path / "study")
    judged = judge_study(load_results(study))
    with pytest.raises(UserError, match="no place for numbers"):
        publish.filled("no place", judged)
    with pytest.raises(UserError, match="no numbers are called 'gain'"):
        publish.filled("<!-- numbers: gain -->\n<!-- end -->", judged)
    page = tmp_path / "page.md"
    page.write_text(f"{PAGE}\n![Cold](target/cold.png)\n")
    with pytest.raises(UserError, match=r"no figure cold\.png; alpha\.png"):
        publish.publish(study, tmp_path / "target", page, page)
    shutil.rmtree(study / "runs" / "baseline-43")
    with pytest.raises(UserError, match="1 planned runs are not done"):
        publish.publish(study, tmp_path / "target", tmp_path / "page.md", tmp_path / "page.md")


@pytest.mark.parametrize(
    "target", [path for path in PUBLISHED if path.name != OLD], ids=lambda path: path.name
)
def test_published_pages_say_what_their_archives_say(target):
    pages = [target / "index.md", ROOT / "docs" / "results.md"]
    page = next(one for one in pages if one.exists() and "<!-- numbers" in one.read_text())
    assert publish.differences(judged(target), target, page) == []


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        ([("a", 1.0 + 1e-15, None)], True),  # another processor
        ([("a", 1.0 + 1e-6, None)], False),
        ([("b", 1.0, None)], False),
        ([("a", 1.0, 2)], False),
        ([("a", 1.0, None), ("a", 1.0, None)], False),
    ],
)
def test_a_table_is_compared_but_for_its_last_digits(tmp_path, changed, same):
    columns = ["word", "gain", "n"]
    table = pl.DataFrame([("a", 1.0, None)], schema=columns, orient="row")
    path = tmp_path / "table.csv"
    pl.DataFrame(changed, schema=columns, orient="row").write_csv(path)
    assert publish._is_of(table, path) is same
    path.write_text(path.read_text().replace("gain", "loss"))
    assert not publish._is_of(table, path)


def test_the_default_noise_is_that_of_a_published_study():
    noise = default_noise()
    measured = measure_noise(judged(ROOT / "docs" / "results" / noise.study))
    assert measured.model_dump() == noise.model_dump()


def test_every_seed_of_a_teacher_is_compared_sorted_by_the_next(tmp_path):
    plan = load_plan(write_study(tmp_path / "study"))
    found = runs_to_compare(plan, "weak", 0.4)
    assert [(one.student, one.teacher, one.baseline, one.sorter) for one in found] == [
        ("student-weak-0.4-43", "teacher-weak-42", "baseline-43", "baseline-44"),
        ("student-weak-0.4-44", "teacher-weak-42", "baseline-44", "baseline-45"),
        ("student-weak-0.4-45", "teacher-weak-42", "baseline-45", "baseline-43"),
    ]
    for teacher, alpha, complaint in (
        ("weak", None, "teacher weak has no tested_alpha"),
        ("weak", 0.5, "no students of weak at alpha 0.5 in two seeds"),
        ("week", 0.4, "did you mean 'weak'"),
    ):
        with pytest.raises(UserError, match=complaint):
            runs_to_compare(plan, teacher, alpha)
    assert runs_to_compare(plan, "unigram", 0.2) == []  # nobody to ask token by token


@pytest.mark.slow
def test_a_study_is_compared_token_by_token_and_published(tmp_path, command):
    """A real study: claim 8 is decided by two seeds, in the archive too, and twice is once."""
    students = TINY["students"] | {"main": TINY["students"]["main"] | {"tokens": "8K"}}
    study = tiny_study(seeds=[43, 44], teacher_seeds=[1043, 1044], students=students, claims=[8])
    run_tiny(study, tmp_path / "tiny", workers=2)
    asked = ("study", "tokens", "tiny", "--teacher", "weak=0.4", "--device", "cpu")
    code, output, _ = command(*asked)
    assert code == 0
    assert "2 students on 2 texts" in output
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "tiny" / "token-comparisons").rglob("*")}
    assert len([path for path in files if path.name == "summary.parquet"]) == 4
    assert command(*asked)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in files} == files
    code, _, complaint = command(*asked, "--text", "scriptures")
    assert "--text 'scriptures' is unknown; did you mean 'scripture'" in complaint

    page = tmp_path / "page.md"
    page.write_text(PAGE)
    publish.publish(tmp_path / "tiny", tmp_path / "out", page, page)
    with tarfile.open(tmp_path / "out" / "results.tar.xz") as tar:
        assert sum(name.endswith("summary.parquet") for name in tar.getnames()) == 4
    assert publish.check(tmp_path / "out", page) == []
    (eighth,) = [
        line
        for line in page.read_text().splitlines()
        if line.startswith("| 8 | The gain grows with the difficulty")
    ]
    assert "nats per token" in eighth
