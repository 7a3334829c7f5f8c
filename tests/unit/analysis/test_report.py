import html
import itertools
import json
import re
import shutil
import socket
import subprocess
import sys

import polars as pl
import pytest
from rich.console import Console
from synthetic_study import GAINS, write_study
from token_files import write as write_comparison

from tutelage.analysis.claims.judge import judge_study
from tutelage.analysis.report.html import build_report
from tutelage.analysis.report.text import print_verdicts
from tutelage.errors import UserError
from tutelage.records import read_sealed, write_sealed
from tutelage.study.results import load_results

FIGURES = ("heat", "alpha", "trade-off", "domains", "calibration", "learning", "cost")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return report_of(write_study(tmp_path_factory.mktemp("whole") / "study"))


def report_of(path):
    return build_report(judge_study(load_results(path)), path)


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
        "weak helps out of domain, hurts in domain n = 3 0.4 -1.20% -1.45 to -0.95 +3.30% +3.05 to +3.55",
        "+1.65% +1.40 to +1.90 weak-to-strong 1.768 bits per byte (+6.0%) by size and tokens weak-to-strong",
        "strong 0.2 helps in and out of domain +1.00% +0.75 to +1.25 +1.40% +1.15 to +1.65 +0.70%",
        "+0.45 to +0.95 -4.61 to +7.41",
        "without one text: +0.9% to +1.9% t, 3 seeds, one teacher",
        "Bars are 95% intervals (n = 3 seeds; paired t over seeds)",
        "fables out of domain 3.203 +2.8% +1.4% +1.6% +0.8% +2.9% +0.0%",
        "tiny 2M from weak 0.4 +3.30% +3.05 to +3.55 +1.65% +1.40 to +1.90",
        "tiny 2M from weak 0.4 -1.20% -1.45 to -0.95 +3.30% +3.05 to +3.55 1.25 0.34 none none",
        "tiny 2M 3 1.652 0.10% 3.403 0.10%",
        "student of weak 6 2M 4.56e+12 1.14e+12 100 20K",
        "Claims that were not announced (3)",
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


def outline_of(page):
    """(Levels of headings in order, names of regions by `aria-label` or heading, headings of columns)."""
    headings = [(int(level), name) for level, name in re.findall(r"<h(\d)[^>]*>(.*?)</h", page, re.DOTALL)]
    ids = dict(re.findall(r'id="([^"]+)">([^<]*)</h', page))
    regions = [ids[name] for name in re.findall(r'<section aria-labelledby="([^"]+)"', page)]
    regions += re.findall(r'role="region" aria-label="([^"]*)"', page)
    return [level for level, _ in headings], regions, re.findall(r'<th scope="col"[^>]*>(.*?)</th>', page)


def assert_outlined(page):
    levels, regions, columns = outline_of(page)

    assert all(below <= above + 1 for above, below in itertools.pairwise(levels)), levels
    assert len(regions) == len(set(regions)), regions
    assert all(columns)
    assert page.count("<svg") == page.count('<div aria-hidden="true"><svg')


def test_a_reader_of_one_student_finds_every_part_by_its_own_name(report):
    assert_outlined(text_of(report))


def test_a_reader_of_several_students_finds_every_part_by_its_own_name(several):
    assert_outlined(text_of(several))


def test_many_warnings_of_runs_fold_away(tmp_path):
    study = write_study(tmp_path / "study")
    warned = sorted(path for path in (study / "runs").iterdir())
    for run in warned:
        state = json.loads((run / "state.json").read_text())
        (run / "state.json").write_text(json.dumps(state | {"warning": "a loss spike"}))
    page = text_of(report_of(study))

    assert f"<summary>Warnings of runs ({len(warned)})</summary>" in page


def test_figures_are_files_with_their_numbers(report):
    folder = report.parent / "figures"

    names = {f"{n}.{s}" for n in FIGURES for s in ("svg", "png", "csv")}
    assert {file.name for file in folder.iterdir()} == names | {".files.json"}
    for name in FIGURES:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert text_of(folder / f"{name}.svg") in text_of(report)
    alpha = pl.read_csv(folder / "alpha.csv")
    cell = alpha.filter(teacher="weak", side="out of domain", alpha=0.4)
    assert cell["gain"].item() == pytest.approx(3.3)
    assert pl.read_csv(folder / "domains.csv").height == 5 * 3 * 2  # cells, domains, raw and fitted
    assert pl.read_csv(folder / "cost.csv")["flops"].max() == pytest.approx(6 * 1_300_000 * 4_000_000)


def test_figures_take_the_colour_of_the_page(report):
    for name in FIGURES:
        svg = text_of(report.parent / "figures" / f"{name}.svg")
        fills = set(re.findall(r"<text[^>]*fill=\"([^\"]+)\"", svg))
        assert fills <= ({"currentColor", "#111"} if name in ("domains", "heat") else {"currentColor"})


def test_the_tables_lie_beside_the_page_as_csv(report):
    tables = {file.stem: pl.read_csv(file) for file in (report.parent / "tables").iterdir()}

    bits = tables["scores"].filter(run="baseline-43", domain="fables", metric="bits_per_byte")
    assert bits["value"].to_list() == pytest.approx([3.2])
    assert set(tables) == {"gains", "pairs", "claims", "scores"}  # constants alone are no tournament
    weak = (
        tables["gains"].filter(teacher="weak", alpha=0.4, fit="raw", side="out_of_domain").row(0, named=True)
    )
    assert weak["gain"] == pytest.approx(3.3)
    assert (weak["gain_low"], weak["gain_high"]) == pytest.approx((3.05, 3.55), abs=0.005)
    assert (weak["gain_n"], weak["interval"]) == (3, "seeds")
    pair = tables["pairs"].filter(teacher="strong").row(0, named=True)
    assert (pair["relation"], pair["best"]) == ("strong-to-weak", "alpha 0.4")
    first = tables["claims"].filter(claim=1, fit="raw").row(0, named=True)
    assert (first["statement"], first["effect_n"]) == ("above 0", 2)  # seed 43 chose the alpha
    assert (first["primary"], first["members"], first["beside"]) == (True, 1, False)


def test_the_same_files_give_the_same_page(report, tmp_path):
    copy = shutil.copytree(report.parent, tmp_path / "elsewhere")
    places = [copy / "figures", copy / "tables"]
    before = {file: file.read_bytes() for place in places for file in place.iterdir()}

    again = report_of(copy)

    assert again.read_bytes() == report.read_bytes()
    assert {file: file.read_bytes() for place in places for file in place.iterdir()} == before


def test_only_files_of_an_earlier_report_are_removed(report, tmp_path):
    copy = shutil.copytree(report.parent, tmp_path / "study")
    figures, tables = copy / "figures", copy / "tables"
    users = [figures / "mine.svg", figures / "paper" / "fig1.csv", figures / "alpha-edited.png"]
    users += [tables / "a.csv", copy / "outside.txt"]
    for file in users:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    (figures / "tokens-9-old.svg").write_text("of an earlier report")
    listed = ["tokens-9-old.svg", "alpha.svg", "../outside.txt", "", ".."]
    (figures / ".files.json").write_text(json.dumps(listed))

    report_of(copy)

    assert [file.read_text() for file in users] == ["mine"] * len(users)
    assert not (figures / "tokens-9-old.svg").exists()
    assert text_of(figures / "alpha.svg") == text_of(report.parent / "figures" / "alpha.svg")
    (figures / ".files.json").write_text("damaged")
    report_of(copy)
    assert (figures / ".files.json").read_bytes() == (report.parent / "figures" / ".files.json").read_bytes()


def test_one_seed_is_shown_grey_and_not_judged_on_page_figures_and_tables(tmp_path):
    gains = GAINS | {("weak", "linear start 0.8 end 0.0"): (0.5, 2.5)}
    report = report_of(write_study(tmp_path / "study", seeds=(43,), gains=gains))
    page = text_of(report)
    words = visible(page)

    row = "weak 0.2 one seed: not judged -0.60% one seed +1.70% one seed +0.85% one seed"
    row += " one seed without one text: +1.2% to +2.2%"
    assert f"{row} none, 1 seed" in words
    assert "one seed: not judged" in words
    assert not re.search(r'class="(helps|hurts|unclear)"', page)
    judgement = re.search(
        r"helps? (out|in)|hurts (out|in)|no clear|as good: |smoothing alone|raw and fitted", words
    )
    assert judgement is None, judgement
    tables = {file.stem: pl.read_csv(file) for file in (report.parent / "tables").iterdir()}
    assert set(tables["gains"]["interval"]) == {"none"}
    assert set(tables["gains"]["words"]) == {"not judged"}
    assert tables["gains"]["gain_low"].null_count() == tables["gains"].height
    assert tables["gains"]["noise_low"].null_count() == 0
    assert set(tables["gains"]["gain_n"]) == {1}
    assert tables["pairs"]["as_good"].null_count() == tables["pairs"].height
    assert tables["policies"]["front"].null_count() == tables["policies"].height
    colours = {"#D55E00", "#0090D8", "#CC79A7", "#009E73", "#E69F00", "#56B4E9"}
    for name in ("heat", "alpha", "trade-off", "domains", "calibration"):
        figure = report.parent / "figures" / name
        assert not colours & set(re.findall(r"#[0-9A-Fa-f]{6}", text_of(figure.with_suffix(".svg")))), name
        assert "Grey: one seed, shown and not judged." in words
    assert (
        pl.read_csv(report.parent / "figures" / "alpha.csv").filter(pl.col("alpha") > 0)["low"].null_count()
        > 0
    )


def test_first_windows_that_are_much_worse_are_a_warning_on_page_and_terminal(tmp_path, capsys):
    study = write_study(tmp_path / "study")
    for run, excess in (("baseline-43", 0.5), ("baseline-44", 0.19), ("student-weak-0.4-43", 0.21)):
        path = study / "runs" / run / "scores.jsonl"
        first = next(row for row in map(json.loads, path.read_text().splitlines()) if row["split"] == "test")
        more = first | {"metric": "first_window_excess", "value": excess}
        path.write_text(path.read_text() + json.dumps(more) + "\n")
    sentence = (
        f"{first['domain']}: first windows of documents are worse than the others by more than 0.2 nats per "
        "token for baseline-43 (0.50), student-weak-0.4-43 (0.21):"
    )
    assert f"Warning: {sentence}" in visible(text_of(report_of(study)))
    print_verdicts(judge_study(load_results(study)), Console(width=1000))
    assert f"warning: {sentence}" in capsys.readouterr().out


def test_what_a_user_wrote_is_escaped(tmp_path):
    evil = "<script>alert('x')</script>"
    page = text_of(report_of(write_study(tmp_path / "study", seeds=(43,), title=evil, description=evil)))

    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(&#39;x&#39;)") == 2 + 3  # title and heading, three descriptions


def test_the_page_names_the_training_text(tmp_path):
    named = visible(text_of(report_of(write_study(tmp_path / "named", seeds=(43,), corpus="my-letters"))))
    assert "Training text: my-letters; its held-out part is called speeches here." in named
    older = visible(text_of(report_of(write_study(tmp_path / "older", seeds=(43,)))))
    assert "Training text: speeches." in older


def test_an_unfinished_study_says_what_is_missing(tmp_path):
    path = write_study(tmp_path / "study")
    (path / "runs" / "student-weak-0.2-44" / "scores.jsonl").write_text("?\n")
    (path / "runs" / "student-strong-0.4-45" / "state.json").write_text(
        '{"status": "failed", "error": "loss is\\n not <finite>"}'
    )
    for run in (path / "runs").glob("student-unigram-*"):
        shutil.rmtree(run)
    shutil.rmtree(path / "runs" / "teacher-weak-42")

    words = visible(text_of(report_of(path)))

    assert "Incomplete: 5 of 20 planned runs are not done. 1 result file left out." in words
    assert "student-strong-0.4-45 failed loss is not <finite>" in words
    assert "student-unigram-0.2-43 not started" in words
    assert "student-weak-0.2-44: scores.jsonl, line 1" in words
    assert "not measured by size and tokens weak-to-strong (0.34x parameters, 1x tokens)" in words
    assert "weak (teacher not measured, alpha 0.4) gains" in words
    assert "unigram no student of this teacher is finished control a teacher" in words
    # seeds 43 and 45: gains -0.6 and -0.7, t(1, 0.975) = 12.706, half 12.706 * 0.05
    assert "hurts in domain -0.65% -1.29 to -0.01" in words


def test_a_study_without_curves_has_no_learning_curves(tmp_path):
    path = write_study(tmp_path / "study", seeds=(43,))
    for run in (path / "runs").iterdir():
        (run / "metrics.jsonl").unlink()

    report = report_of(path)

    assert not (path / "figures" / "learning.svg").exists()
    assert "Learning curves" not in visible(text_of(report))


def test_no_finished_student_writes_nothing(tmp_path):
    path = write_study(tmp_path / "study", seeds=(43,))
    for run in (path / "runs").glob("student-*"):
        shutil.rmtree(run)

    with pytest.raises(UserError, match="no student run is finished and scored"):
        report_of(path)
    assert not (path / "report.html").exists()


def test_a_report_needs_no_torch():
    code = "import sys, tutelage.analysis.report.html; sys.exit('torch' in sys.modules)"

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


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """A study of two students with policies, a compute-matched student and claims."""
    names = ("weak", "strong", "unigram")
    gains = {("tiny 2M", t, a): (a, 3 * a - 4 * a * a) for t in names for a in (0.1, 0.2, 0.4, 0.6, 1.0)}
    gains |= {("wide 2M", t, a): (-a, 2 * a) for t in names[:2] for a in (0.2, 0.4)}
    gains |= {("tiny 2M", "weak", "linear start 0.8 end 0.0"): (0.5, 0.5)}
    gains |= {("tiny 2M", None, "compute of weak"): (1.0, 1.0)}
    path = tmp_path_factory.mktemp("several") / "study"
    sizes = {"wide 2M": (800_000, 2_000_000)}
    return report_of(write_study(path, gains=gains, sizes=sizes, claims=[1, 2, 11]))


def test_several_students_have_their_own_tables_and_figures(several):
    words = visible(text_of(several))

    assert "2 student settings, 3 teachers" in words
    assert "Of 3 announced claims: 0 supported, 1 contradicted (2), 2 undecided (1 and 11)" in words
    assert "Open: no runs with mixing keep_full_ce or keep_full_kd" in words
    first = (
        "2 A weaker teacher at alpha 1 hurts in domain. gain in domain, alpha 1: below 0 contradicted +1.00%"
    )
    heading = "claim statement answer effect 95% interval n p"
    places = [
        words.find(part) for part in ("Does a teacher help these students?", heading, first, "Every test of")
    ]
    assert -1 < places[0] < places[1] < places[2] < places[3] < words.find("in-domain gain")
    assert "Claims that were not announced" in words
    assert "tiny 2M, taught by weak (weak-to-strong)" in words or "linear start 0.8 end 0.0 +0.50%" in words
    names = {file.stem for file in (several.parent / "figures").glob("*.svg")}
    assert {"heat-tiny-2M", "heat-wide-2M", "trade-off-wide-2M", "cost"} <= names
    ids = re.findall(r'\sid="([^"]+)"', text_of(several))
    assert len(ids) == len(set(ids))
    policies = pl.read_csv(several.parent / "tables" / "policies.csv")
    schedule = policies.filter(arm="linear start 0.8 end 0.0").row(0, named=True)
    assert schedule["in_domain"] == pytest.approx(0.5)
    assert schedule["ahead"] == pytest.approx(1.0 - 1.06)  # of alpha 0.4, 0.56 and on recipes a point more


def test_teachers_of_one_seed_fold_away_where_others_have_several(tmp_path):
    """They are in the tables and in no figure; clouds of points name their front."""
    gains = {("weak", a): (a, 3 * a) for a in (0.1, 0.2, 0.4)} | {("strong", a): (-a, a) for a in (0.2, 0.4)}
    study = write_study(tmp_path / "study", gains=gains, claims=[1])
    for seed in (44, 45):
        for alpha in (0.2, 0.4):
            shutil.rmtree(study / "runs" / f"student-strong-{alpha}-{seed}")
    report = report_of(study)
    words = visible(text_of(report))
    assert "Teachers with one seed, shown and not judged (1)" in words
    assert "best of" not in words
    for figure in ("heat", "domains", "trade-off"):
        assert set(pl.read_csv(report.parent / "figures" / f"{figure}.csv")["teacher"]) == {"weak"}
    assert "strong" in set(pl.read_csv(report.parent / "tables" / "gains.csv")["teacher"])


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_never_scrolls_sideways(several, report, tmp_path, width):
    for number, page in enumerate((several, report)):
        frame = tmp_path / f"frame-{number}.html"
        frame.write_text(
            f'<iframe id="f" src="{page.as_uri()}" style="width:{width}px;height:900px"></iframe>'
            '<p id="o"></p>'
            "<script>document.getElementById('f').onload = () => { document.getElementById('o').textContent ="
            " 'wide ' + document.getElementById('f').contentDocument.documentElement.scrollWidth }</script>"
        )
        flags = ("--dump-dom", "--allow-file-access-from-files", "--virtual-time-budget=5000")
        dom = chromium(frame, tmp_path / f"profile-{number}", *flags).stdout

        assert int(re.findall(r"wide (\d+)", dom)[0]) <= width


@pytest.mark.browser
def test_a_browser_would_show_console_errors(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<script>console.error('broken')</script>")

    assert "CONSOLE" in chromium(page, tmp_path / "profile", "--dump-dom").stderr


def test_token_comparisons_left_in_the_study_are_shown_and_damaged_ones_named(tmp_path):
    study = write_study(tmp_path / "study")
    for name in ("good", "damaged"):
        folder = study / "token-comparisons" / "student--teacher--baseline" / name
        folder.mkdir(parents=True)
        write_comparison(folder)
    (folder / "summary.parquet").write_text("no parquet")
    (study / "mechanism").mkdir()
    page = text_of(report_of(study))
    words = visible(page)

    assert "Token comparison: on which tokens" in words
    assert page.count('aria-labelledby="tokens"') == 1
    assert (
        "kid-1 speeches, test split the baseline +0.170 ± 0.028 +0.170 ± 0.028 +0.170 ± 0.028 -1.170" in words
    )
    assert (study / "figures" / "tokens-1-entropy.csv").exists()
    problems = words[words.index("Result files that could not be used") :]
    assert "no finished token comparison" in problems
    assert "mechanism: token comparisons by an older version, which are not read" in problems


MARKUP = (
    '"><img src="http://127.0.0.1:{port}/i" onerror="document.title=1"></td></table></svg></title></style>'
    "<script>console.error(1); fetch('http://127.0.0.1:{port}/s')</script>"
    '<a href="javascript:console.error(2)">x</a>[y](javascript:1)\'); alert(1);//'
)


def spoiled(value, text, keys):
    """JSON with `text` after each string under one of `keys`."""
    if isinstance(value, dict):
        return {
            key: one + text if key in keys and isinstance(one, str) else spoiled(one, text, keys)
            for key, one in value.items()
        }
    return [spoiled(one, text, keys) for one in value] if isinstance(value, list) else value


def spoil(study, text):
    """Put `text` into all that a study says in words."""
    plan = json.loads(text_of(study / "plan.json"))
    free = {"title", "description", "shape", "student", "teacher", "group"}
    spoiled_plan = spoiled(plan, text, free)
    spoiled_plan["notes"] = [text]
    spoiled_plan.pop("seal", None)  # whoever is hostile makes another
    for kind in ("students", "teachers"):
        spoiled_plan[kind] = [one | {"name": one["name"] + text} for one in spoiled_plan[kind]]
    (study / "plan.json").write_text(json.dumps(spoiled_plan))
    for file in study.glob("runs/*/provenance.json"):
        record = json.loads(text_of(file))
        record.pop("seal", None)
        file.write_text(json.dumps(record | {"device": text, "command": [text], "commit": text}))


@pytest.mark.browser
def test_a_hostile_study_makes_a_page_that_runs_and_requests_nothing(tmp_path):
    study = write_study(tmp_path / "study")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        spoil(study, MARKUP.replace("{port}", str(server.getsockname()[1])))
        page = report_of(study)
        done = chromium(page, tmp_path / "profile", "--dump-dom", "--virtual-time-budget=3000")
        with pytest.raises(TimeoutError):
            server.accept()
    assert "CONSOLE" not in done.stderr  # nor was anything stopped by the policy alone
    assert not re.findall(r"<(?:script|img|a href=.javascript)", done.stdout)
    assert "default-src 'none'" in done.stdout


def test_names_that_a_terminal_obeys_are_refused(tmp_path):
    study = write_study(tmp_path / "study")
    spoil(study, "\x1b]0;owned\x07")
    with pytest.raises(UserError, match=r"plan\.json") as caught:
        report_of(study)
    assert "\x1b" not in str(caught.value)
    spoil(write_study(tmp_path / "other"), "\u2028")
    with pytest.raises(UserError, match=r"name = .* holds '\\u2028', which no figure can show"):
        report_of(tmp_path / "other")
    study = write_study(tmp_path / "third")
    plan = read_sealed(study / "plan.json")
    plan["runs"][-1]["arm_settings"] = {"alpha": 0.2, "optim.schedule": "a\u2029b"}
    write_sealed(study / "plan.json", plan)
    with pytest.raises(UserError, match=r"runs\.\d+\.arm_settings.* holds '\\u2029'"):
        report_of(study)


def test_a_table_alone_says_what_is_left_out_beside_it(command, tmp_path):
    path = write_study(tmp_path / "study")
    (path / "runs" / "teacher-weak-42" / "documents.parquet").unlink()
    code, out, complaints = command("report", path, "--markdown")
    assert code == 0
    assert "| weak | not measured |" in out
    assert "left out: teacher-weak-42: documents.parquet: no such file" in complaints


def test_ticks_of_the_teachers_sizes_are_not_rounded_to_other_sizes(tmp_path):
    """Two digits made 1.2M of 1.25M, and 3.7M of 3.75M."""
    teachers = {"a": (1.9, 54_400, 250_000), "b": (1.7, 102_000, 1_250_000), "c": (1.6, 213_000, 3_750_000)}
    gains = {(name, 0.2): (1.0, 1.0) for name in teachers}
    path = write_study(tmp_path / "study", teachers=teachers, gains=gains)
    report_of(path)
    drawn = (path / "figures" / "strength.svg").read_text(encoding="utf-8")
    assert {"54.4k", "102k", "213k", "250k", "1.25M", "3.75M"} <= set(
        re.findall(r">([\d.]+[kM])</text>", drawn)
    )


def test_a_tile_never_says_minus_zero(tmp_path):
    gains = {("weak", 0.2): (-0.04, 0.5), ("weak", 0.4): (-0.06, 2.25), ("unigram", 0.2): (0.04, -12.34)}
    path = write_study(tmp_path / "study", gains=gains, offsets={})
    report_of(path)
    for name in ("heat", "domains"):
        drawn = (path / "figures" / f"{name}.svg").read_text(encoding="utf-8")
        shown = re.findall(r">([+\u2212-][\d.]+)</text>", drawn)
        assert {"+0.0", "\u22120.1"} <= set(shown)
        assert "\u22120.0" not in shown
        if name == "domains":
            assert "\u221212.3" in shown
