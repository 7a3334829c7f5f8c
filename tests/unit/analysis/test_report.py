import html
import re
import shutil
import subprocess
import sys

import polars as pl
import pytest
from make_study import write_study

from tutelage.analysis.report import build_report
from tutelage.errors import UserError

FIGURES = ("heat", "alpha", "trade-off", "domains", "calibration", "learning", "cost")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return build_report(write_study(tmp_path_factory.mktemp("whole") / "study"))


def text_of(path):
    return path.read_text(encoding="utf-8")


def visible(page):
    """The words of a page: no style, no tags, single spaces."""
    page = re.sub(r"<style>.*?</style>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


def test_the_page_says_answer_numbers_and_limits_in_this_order(report):
    words = visible(text_of(report))
    parts = [
        "Does a teacher help this student? Out of domain yes, but no more than smoothing does",
        "weak 0.4 -1.20% -1.45 to -0.95 +3.30% +3.05 to +3.55 helps out of domain, hurts",
        "in domain weak-to-strong 1.768 bits per byte (+6.0%) a teacher",
        "strong 0.2 +1.00% +0.75 to +1.25 +1.40% +1.15 to +1.65 t, 3 seeds helps in and out of domain",
        "Bars are 95% intervals (n = 3 seeds; paired t over seeds)",
        "fables out of domain 3.203 +2.8% +1.6% +2.9%",
        "student of weak 6 2M 4.56e+12 1.14e+12 100 20K",
        "What these numbers can and cannot show The seed is the replicate",
        "commit 0123abc with uncommitted changes device cpu",
        "Nothing: every planned run is done and every result file could be read.",
    ]
    places = [words.find(part) for part in parts]

    assert -1 not in places, parts[places.index(-1)]
    assert places == sorted(places)


def test_the_page_needs_nothing_from_outside(report):
    page = text_of(report)
    links = re.findall(r'(?:href|src)="([^"]*)"', page)

    assert set(links) <= {"data:,", *(f"#{name}" for name in re.findall(r'id="([^"]+)"', page))}
    assert "<script" not in page
    assert "@import" not in page
    assert "url(" not in page


def test_ids_are_unique(report):
    ids = re.findall(r'\sid="([^"]+)"', text_of(report))

    assert len(ids) == len(set(ids))


def test_tables_and_figures_are_accessible(report):
    page = text_of(report)

    assert page.count("<th scope=") == len(re.findall(r"<th[ >]", page))
    assert len(re.findall(r'role="img" aria-label="[^"]{20,}"', page)) == len(FIGURES)
    assert re.findall(r"<h(\d)", page)[0] == "1"


def test_figures_are_files_with_their_numbers(report):
    folder = report.parent / "figures"

    assert {file.name for file in folder.iterdir()} == {
        f"{n}.{s}" for n in FIGURES for s in ("svg", "png", "csv")
    }
    for name in FIGURES:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert text_of(folder / f"{name}.svg") in text_of(report)
    alpha = pl.read_csv(folder / "alpha.csv")
    cell = alpha.filter(teacher="weak", side="out of domain", alpha=0.4)
    assert cell["gain"].item() == pytest.approx(3.3)
    assert pl.read_csv(folder / "domains.csv").height == 5 * 3
    assert pl.read_csv(folder / "cost.csv")["flops"].max() == pytest.approx(6 * 380_000 * 2_000_000)


def test_figures_take_the_colour_of_the_page(report):
    for name in FIGURES:
        svg = text_of(report.parent / "figures" / f"{name}.svg")
        fills = set(re.findall(r"<text[^>]*fill=\"([^\"]+)\"", svg))
        assert fills <= ({"currentColor", "#111"} if name == "domains" else {"currentColor"})


def test_the_same_files_give_the_same_page(report, tmp_path):
    copy = shutil.copytree(report.parent, tmp_path / "elsewhere")
    before = {file.name: file.read_bytes() for file in (copy / "figures").iterdir()}

    again = build_report(copy)

    assert again.read_bytes() == report.read_bytes()
    assert {file.name: file.read_bytes() for file in (copy / "figures").iterdir()} == before


def test_what_a_user_wrote_is_escaped(tmp_path):
    evil = "<script>alert('x')</script>"
    page = text_of(build_report(write_study(tmp_path / "study", seeds=(43,), title=evil, description=evil)))

    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(&#39;x&#39;)") == 2 + 3  # title and heading, three descriptions


def test_an_unfinished_study_says_what_is_missing(tmp_path):
    path = write_study(tmp_path / "study")
    (path / "runs" / "student-weak-0.2-44" / "scores.jsonl").write_text("?\n")
    (path / "runs" / "student-strong-0.4-45" / "state.json").write_text(
        '{"status": "failed", "error": "loss is\\n not <finite>"}'
    )
    for run in (path / "runs").glob("student-unigram-*"):
        shutil.rmtree(run)
    shutil.rmtree(path / "runs" / "teacher-weak-42")

    words = visible(text_of(build_report(path)))

    assert "Incomplete: 5 of 20 planned runs are not done. 1 result file left out." in words
    assert "student-strong-0.4-45 failed loss is not <finite>" in words
    assert "student-unigram-0.2-43 not started" in words
    assert "student-weak-0.2-44: scores.jsonl, line 1" in words
    assert "hurts in domain not measured a teacher" in words
    assert "unigram no student of this teacher is finished control a teacher" in words
    # seeds 43 and 45: gains -0.6 and -0.7, t(1, 0.975) = 12.706, half 12.706 * 0.05
    assert "weak 0.2 -0.65% -1.29 to -0.01" in words


def test_a_study_without_curves_has_no_learning_curves(tmp_path):
    path = write_study(tmp_path / "study", seeds=(43,))
    for run in (path / "runs").iterdir():
        (run / "metrics.jsonl").unlink()

    report = build_report(path)

    assert not (path / "figures" / "learning.svg").exists()
    assert "Learning curves" not in visible(text_of(report))


def test_no_finished_student_writes_nothing(tmp_path):
    path = write_study(tmp_path / "study", seeds=(43,))
    for run in (path / "runs").glob("student-*"):
        shutil.rmtree(run)

    with pytest.raises(UserError, match="no student run is finished and scored"):
        build_report(path)
    assert not (path / "report.html").exists()


def test_a_report_needs_no_torch():
    code = "import sys, tutelage.analysis.report; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def chromium(page, profile, *flags):
    """Open `page` in a headless Chromium with an empty profile."""
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("chromium is not on PATH")
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--enable-logging=stderr", f"--user-data-dir={profile}", *flags, page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)


@pytest.mark.browser
def test_a_browser_draws_the_page(report, tmp_path):
    done = chromium(report, tmp_path / "profile", "--dump-dom")
    dom = done.stdout

    assert "CONSOLE" not in done.stderr
    drawings = re.findall(r'<svg [^>]*class="marks".*?</svg>', dom, flags=re.DOTALL)
    assert len(drawings) == len(FIGURES)
    for drawing in drawings:
        assert drawing.count("<path") + drawing.count("<line") > 10
        assert "currentColor" in drawing
    anchors = re.findall(r'href="#([^"]+)"', dom)
    assert len(anchors) >= 6
    assert all(f'id="{anchor}"' in dom for anchor in anchors)


@pytest.mark.browser
def test_a_browser_would_show_console_errors(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<script>console.error('broken')</script>")

    assert "CONSOLE" in chromium(page, tmp_path / "profile", "--dump-dom").stderr
