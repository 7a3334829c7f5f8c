"""Publish a finished study: archive, report and CSV tables in a directory, and a page with its numbers.

    python benchmarks/studies/publish.py STUDY docs/results/NAME --page TEMPLATE --to docs/results.md
    python benchmarks/studies/publish.py --check docs/results/NAME --page docs/results.md

A page is Markdown by hand; what stands between `<!-- numbers: NAME -->` and `<!-- end -->` is filled in from
the archive alone. `--check` unpacks the archive into an empty directory and complains of every number of the
page and of every table that it does not give again. NAME is one of `answer`, `claims`, `teachers`, `arms`,
`spread`, `power`, `noise`, `origin`, and of a tournament `policies`, `policies_by_pair`, `constants`,
`constants_by_pair` and `steadiness`. Pictures of the report that the page shows are copied.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl
import tournament
from polars.testing import assert_frame_equal

from tutelage.analysis import words
from tutelage.analysis.claims.judge import judge_study
from tutelage.analysis.claims.noise import measure_noise
from tutelage.analysis.report import claim_rows, headline, report_rows
from tutelage.analysis.report.csv_tables import tables_of
from tutelage.analysis.report.html import build_report
from tutelage.analysis.report.report_table import Column, ReportTable
from tutelage.analysis.report.text import markdown
from tutelage.errors import UserError
from tutelage.files import write_text
from tutelage.records import read_sealed, sealed
from tutelage.study.results import load_results

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tutelage.analysis.claims.judge import JudgedStudy
    from tutelage.analysis.verdicts import Verdict

ARCHIVE = "results.tar.xz"
OF_RUNS = ("state.json", "provenance.json", "scores.jsonl", "documents.parquet", "metrics.jsonl")
OF_COMPARISONS = ("comparison.json", "summary.parquet")
BLOCK = re.compile(r"(<!-- numbers: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Publish, or check what was published."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("study", type=Path, nargs="?", help="directory of the finished study")
    parser.add_argument("target", type=Path, help="directory of what is published")
    parser.add_argument("--page", type=Path, required=True, help="Markdown with places for numbers")
    parser.add_argument("--to", type=Path, help="where the page is written; default: where it is")
    parser.add_argument("--check", action="store_true", help="compare what was published with its archive")
    asked = parser.parse_args()
    try:
        if asked.check:
            wrong = check(asked.target, asked.page)
            sys.exit("\n".join(wrong) or 0)
        if asked.study is None:
            parser.error("name the study and the directory, or --check and the directory")
        publish(asked.study, asked.target, asked.page, asked.to or asked.page)
    except UserError as error:
        sys.exit(f"error: {error}")


def publish(study: Path, target: Path, template: Path, page: Path) -> None:
    """Write archive, report and tables of a study to `target`, and its page.

    Raises:
        UserError: a planned run is not done, or results cannot be read.
    """
    left = load_results(study).unfinished.height
    if left:
        raise UserError(f"{study}: {left} planned runs are not done; publish a finished study")
    target.mkdir(parents=True, exist_ok=True)
    pack(study, target / ARCHIVE)
    with tempfile.TemporaryDirectory() as scratch:
        place = unpack(target / ARCHIVE, Path(scratch))
        judged = judge_study(load_results(place))
        text = filled(template.read_text(encoding="utf-8"), judged)
        shutil.copy(build_report(judged, place), target)
        shutil.copytree(place / "tables", target / "tables", dirs_exist_ok=True)
        for name in re.findall(rf"{re.escape(target.name)}/([\w.-]+\.png)", text):
            if not (place / "figures" / name).exists():
                raise UserError(f"{template}: no figure {name}; {', '.join(_pictures(place))}")
            shutil.copy(place / "figures" / name, target)
    write_text(page, text)
    print(f"{page}: numbers of {len(judged.announced)} claims and {len(judged.results.plan.runs)} runs")


def _pictures(study: Path) -> list[str]:
    return sorted(path.name for path in (study / "figures").glob("*.png"))


def _is_of(table: pl.DataFrame, path: Path) -> bool:
    """Whether a file has the rows of a table; another processor rounds sums otherwise in the last digits."""
    try:
        again = pl.read_csv(io.StringIO(table.write_csv()), infer_schema_length=None)
        found = pl.read_csv(path, schema_overrides=again.schema)
        assert_frame_equal(found, again, rel_tol=1e-12, abs_tol=1e-13)
    except (AssertionError, pl.exceptions.PolarsError):
        return False
    return True


def check(target: Path, page: Path) -> list[str]:
    """What of a page and of published tables its archive does not give again, a line each."""
    return differences(judged_archive(target / ARCHIVE), target, page)


def judged_archive(archive: Path) -> JudgedStudy:
    """Judge the study in an archive."""
    with tempfile.TemporaryDirectory() as scratch:
        return judge_study(load_results(unpack(archive, Path(scratch))))


def differences(judged: JudgedStudy, target: Path, page: Path) -> list[str]:
    """What of a page and of published tables a judged study does not give, a line each."""
    text = page.read_text(encoding="utf-8")
    again = filled(text, judged)
    lines = zip(text.splitlines(), again.splitlines(), strict=False)
    wrong = [f"{page}: {was!r}, but the archive says {now!r}" for was, now in lines if was != now]
    if not wrong and text != again:
        wrong = [f"{page}: the archive gives other lines"]
    for name, table in tables_of(judged).items():
        path = target / "tables" / f"{name}.csv"
        if not table.is_empty() and not _is_of(table, path):
            wrong.append(f"{path}: not the table of the archive")
    return wrong


def filled(text: str, study: JudgedStudy) -> str:
    """A page with the numbers of a study between its marks.

    Raises:
        UserError: there is no such block, or none at all.
    """
    blocks = dict(numbers(study))

    def block(found: re.Match[str]) -> str:
        if found[2] not in blocks:
            raise UserError(f"page: no numbers are called {found[2]!r}; choose from {', '.join(blocks)}")
        return f"{found[1]}{blocks[found[2]].strip()}\n{found[3]}"

    page, count = BLOCK.subn(block, text)
    if not count:
        raise UserError("page: no place for numbers; write <!-- numbers: claims --> and <!-- end -->")
    return page


def numbers(study: JudgedStudy) -> Iterator[tuple[str, str]]:
    """Everything that a page can show, as Markdown."""
    results, findings = study.results, study.findings
    yield "answer", "\n\n".join([headline.tally(study.claims), *headline.headline(findings, study.claims)])
    yield "claims", claim_rows.answer_table(study.announced).markdown()
    yield "teachers", markdown(findings)
    several = [verdict for verdict in findings.verdicts if verdict.judged]
    yield "arms", _arms(several).markdown()
    yield "spread", report_rows.spread_table(results).markdown()
    yield "power", " ".join(claim_rows.found_power(study))
    yield "noise", f"```json\n{measure_noise(study).model_dump_json(indent=2)}\n```"
    yield "origin", origin(study)
    gains = tournament.gains_of(results)
    yield "steadiness", tournament.markdown(tournament.steadiness(gains))
    arms = tournament.judged(gains, constants=True)
    for name, constant in (("policies", False), ("constants", True)):
        rows = arms.filter(constant=constant).drop("constant")
        yield name, tournament.markdown(tournament.summed(rows))
        yield f"{name}_by_pair", tournament.markdown(rows)


def _arms(verdicts: Sequence[Verdict]) -> ReportTable:
    """Gains of arms in short, a row each."""
    columns = ("student", "teacher", "alpha", "n", "in domain", "out of domain", "out of domain, fitted")
    rows = [
        [
            v.student,
            v.teacher or words.NO_TEACHER,
            words.arm(v),
            str(v.n_seeds),
            *(
                "" if one is None else words.plus_minus(one)
                for one in (v.in_domain, v.out_of_domain, v.fitted)
            ),
        ]
        for v in verdicts
    ]
    return ReportTable("Every arm", tuple(map(Column, columns)), rows)


def origin(study: JudgedStudy) -> str:
    """Runs, seeds, commits and dates."""
    results = study.results
    records = [*results.provenance.values()]
    commits = sorted({(one.commit or "unknown")[:7] + ("+" if one.dirty else "") for one in records})
    times = sorted(one.time[:10] for one in records)
    seeds = f"{min(results.plan.seeds)} to {max(results.plan.seeds)}"
    dirty = " (+: with uncommitted changes)" if any(one.endswith("+") for one in commits) else ""
    return (
        f"{len(results.plan.runs)} runs, seeds {seeds}, trained {times[0]} to {times[-1]} with commit "
        f"{', '.join(commits)}{dirty}."
    )


def pack(study: Path, archive: Path) -> None:
    """Put a study's plan and small result files into one file, the same bytes for the same results."""
    files = {"plan.json": (study / "plan.json").read_bytes()}
    for run in sorted((study / "runs").iterdir()):
        for name in OF_RUNS:
            if (run / name).exists():
                files[f"runs/{run.name}/{name}"] = _content(run / name)
    for path in sorted(study.glob("token-comparisons/*/*/comparison.json")):
        for name in OF_COMPARISONS:
            where = path.with_name(name)
            files[str(where.relative_to(study))] = where.read_bytes()
    with tarfile.open(archive, "w:xz", preset=9) as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def _content(path: Path) -> bytes:
    """A file; of provenance.json the command without the directories of the machine that ran it."""
    if path.name != "provenance.json":
        return path.read_bytes()
    record = {key: value for key, value in read_sealed(path).items() if key != "seal"}
    if isinstance(record["command"], list):
        record["command"] = [
            Path(word).name if Path(word).is_absolute() else word for word in record["command"]
        ]
        record["command"][0] = "tutelage"
    record["sessions"] = []
    return sealed(record).encode()


def unpack(archive: Path, directory: Path) -> Path:
    """Unpack an archive into an empty directory."""
    with tarfile.open(archive, "r:xz") as tar:
        tar.extractall(directory, filter="data")
    return directory


if __name__ == "__main__":
    main()
