"""Print verdicts, scores and token comparisons in a terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rich.table import Column as TerminalColumn
from rich.table import Table
from rich.text import Text

from tutelage.analysis import words
from tutelage.analysis.report import headline
from tutelage.analysis.report.accuracy_rows import ACCURACY_CAPTION, short_accuracies
from tutelage.analysis.report.claim_rows import answer_table
from tutelage.analysis.report.report_rows import few_verdicts, short_verdicts

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from rich.console import Console

    from tutelage.analysis.claims.judge import JudgedStudy
    from tutelage.analysis.verdicts import Findings
    from tutelage.study.results import Results
    from tutelage.study.token_tables import TokenComparison
    from tutelage.types import Score

_ROWS = {
    "{metric}": "{domain}",
    "{metric}_temperature": "  temperature fitted",
    "{metric}_unigram": "  and unigram mixed in",
    "{metric}_temperature_in_domain": "  temperature fitted in domain",
    "ece": "  calibration error",
}
"""Metrics of a domain in the order shown, and the label of each row."""

_WORTH_A_NOTE = 0.01
_UNFINISHED_NAMED = 3
_AT_A_TIME = 4
"""Models side by side, at most."""


def print_scores(rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, str], console: Console) -> None:
    """Print models by domains, the best of each row marked, and what was found in the training text.

    Args:
        rows: scores, as in `scores.jsonl`; only those of test splits are shown.
        metrics: the metric to show, by domain.
        console: where to.
    """
    test = {(row["run"], row["domain"], row["metric"]): row for row in rows if row["split"] == "test"}
    models = list(dict.fromkeys(row["run"] for row in rows))
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    caption = "Bits per byte of test text, calibration error; less is better; 95% interval over documents" + (
        "; * best of the models scored on the same text in the same windows" if len(models) > 1 else ""
    )
    lines: list[tuple[list[str], list[Text]]] = []
    for domain in domains:
        metric = metrics.get(domain, "bits_per_byte")
        name = domain if metric == "bits_per_byte" else f"{domain} ({metric})"
        for version in dict.fromkeys(row["version"] for row in test.values() if row["domain"] == domain):
            for pattern, label in _ROWS.items():
                shown = [test.get((model, domain, pattern.format(metric=metric))) for model in models]
                found = [row if row is not None and row["version"] == version else None for row in shown]
                if any(found):
                    lines.append(([label.format(domain=name)], _cells(found)))
    _print(["domain"], models, lines, caption + _fit_errors(test.values()), console)
    for line in _apart_notes((row["run"], row["domain"], row["version"]) for row in test.values()):
        console.print(line, soft_wrap=True)
    for line in _overlap_notes(test, models, domains):
        console.print(line, soft_wrap=True)


def print_tasks(scores: Sequence[Score], what: str, unit: str, console: Console) -> None:
    """Print models by tasks or probes, value and standard error, the best of each row marked.

    Args:
        scores: of role "downstream" or "probe".
        what: heads the first column.
        unit: what n and the standard error count, in the plural.
        console: where to.
    """
    found = {(score.run, score.domain, score.metric, score.version): score for score in scores}
    models = list(dict.fromkeys(score.run for score in scores))
    caption = f"Value ± standard error over n {unit}" + (
        f"; * best of the models that got the same {unit}" if len(models) > 1 else ""
    )
    lines = []
    for domain, metric, version in dict.fromkeys((s.domain, s.metric, s.version) for s in scores):
        row = [found.get((model, domain, metric, version)) for model in models]
        lines.append(([domain, metric], [_task_cell(score, row) for score in row]))
    _print([what, "metric"], models, lines, caption, console)
    for line in _apart_notes((score.run, score.domain, score.version) for score in scores):
        console.print(line, soft_wrap=True)


def _apart_notes(scored: Iterable[tuple[str, str, str]]) -> list[str]:
    """What stands in rows of its own because it was not measured alike: by run, domain and version."""
    groups: dict[str, dict[str, list[str]]] = {}
    for run, domain, version in dict.fromkeys(scored):
        groups.setdefault(domain, {}).setdefault(version, []).append(run)
    return [
        f"{domain}: not side by side, because of other documents, windows or settings: "
        + "; ".join(", ".join(dict.fromkeys(runs)) for runs in versions.values())
        for domain, versions in groups.items()
        if len({run for runs in versions.values() for run in runs}) > 1 and len(versions) > 1
    ]


def _print(
    heads: Sequence[str],
    models: Sequence[str],
    lines: Sequence[tuple[Sequence[str], Sequence[Text]]],
    caption: str,
    console: Console,
) -> None:
    """A table of models, or several below each other where there are more than a terminal has room for."""
    labelled = sum(
        2 + max(map(len, [head, *(labels[column] for labels, _ in lines)]))
        for column, head in enumerate(heads)
    )
    widest = 2 + max(*map(len, models), *(len(cell) for _, cells in lines for cell in cells), 0)
    beside = max(1, min(_AT_A_TIME, (console.width + 2 - labelled) // widest))
    for start in range(0, len(models), beside):
        some = slice(start, start + beside)
        # Long names are broken, not cut: their ends tell them apart.
        columns = (TerminalColumn(head, overflow="fold") for head in [*heads, *models[some]])
        table = Table(*columns, box=None, pad_edge=False, caption_justify="left")
        for labels, cells in lines:
            table.add_row(*labels, *cells[some])
        table.caption = caption if some.stop >= len(models) else None
        console.print(table)
        if table.caption is None:
            console.print()


def _task_cell(score: Score | None, row: Sequence[Score | None]) -> Text:
    if score is None:
        return Text("-")
    rivals = [other.value for other in row if other is not None]
    best = score.value == (max if score.higher_is_better else min)(rivals) and len(set(rivals)) > 1
    noise = "" if math.isnan(score.stderr) else f" ± {score.stderr:.3f}"
    return Text(f"{score.value:.3f}{noise} (n={score.n}){' *' if best else ''}", "bold green" if best else "")


def _cells(found: Sequence[Mapping[str, Any] | None]) -> list[Text]:
    """One row's values, all of one version; the best is marked where it has competition."""
    cells = []
    for row in found:
        if row is None:
            cells.append(Text("-"))
            continue
        rivals = [other["value"] for other in found if other is not None]
        best = row["value"] == min(rivals) and len(set(rivals)) > 1
        interval = "" if row["low"] is None else f" [{row['low']:.3f}, {row['high']:.3f}]"
        cells.append(
            Text(f"{row['value']:.3f}{interval}{' *' if best else ''}", "bold green" if best else "")
        )
    return cells


def _fit_errors(rows: Iterable[Mapping[str, Any]]) -> str:
    """What the fits add to the noise of the fitted rows, at most."""
    errors = [row["fit_error"] for row in rows if row["fit_error"] is not None]
    if not errors:
        return ""
    known = [error for error in errors if not math.isnan(error)]
    text = f"at most ±{max(known):.4f}" if len(known) == len(errors) else "unknown for fits on one document"
    return f"; error of the fits {text}"


def _overlap_notes(
    test: Mapping[tuple[str, str, str], Mapping[str, Any]], models: Iterable[str], domains: Iterable[str]
) -> list[str]:
    notes = []
    for model in models:
        for domain in domains:
            documents = test.get((model, domain, "overlap_documents"))
            grams = test.get((model, domain, "overlap_8grams"))
            shared = [row["value"] if row else 0.0 for row in (documents, grams)]
            if shared[0] > 0 or shared[1] >= _WORTH_A_NOTE:
                known = f"trained on {shared[0]:.1%} of its documents (left out); of the rest's"
                notes.append(
                    f"{model}, {domain}: {known if shared[0] > 0 else 'of its'} 8-grams of words "
                    f"{shared[1]:.1%} occur in the training text"
                )
    return notes


_HEADINGS = {
    "all": "",
    "entropy": "{} entropy (nats)",
    "entropy contrast": "highest minus lowest",
    "right": "first choice right",
    "right contrast": "teacher minus {}",
    "closer": "probability of the token",
    "closer contrast": "closer minus not",
}
"""Above the cells of a grouping, or in place of a difference's longer label."""


def print_token_comparison(found: TokenComparison, console: Console) -> None:
    """Print the gain overall and in every cell but those by position, with 95% intervals."""
    table = Table(
        title=Text(f"Where the student gains: {found.text}, {found.tokens:,} tokens of {found.documents:,} "
                   "documents"),
        caption=Text(
            "nats per token; gain: cross-entropy of the baseline less that of the student, lead: less that "
            f"of the teacher; 95% intervals over documents. {words.sorting(found)}"
        ),
        caption_justify="left",
        box=None,
        pad_edge=False,
    )  # fmt: skip
    table.add_column("tokens")
    for heading in ("share", "baseline CE", "gain", "teacher's lead"):
        table.add_column(heading, justify="right")
    gains, leads, losses = (
        {(row["grouping"], row["bin"]): row for row in found.of(*which, *_HEADINGS).iter_rows(named=True)}
        for which in (("gain", "student"), ("gain", "teacher"), ("gold_logp", "baseline"))
    )
    before = ""
    for key, gain in gains.items():
        heading, is_cell = _HEADINGS[key[0]].format(words.untaught(found)), not key[0].endswith("contrast")
        if heading and is_cell and key[0] != before:
            table.add_row(Text(heading, style="bold"))
        before = key[0]
        table.add_row(
            Text(("  " if heading else "") + (gain["label"] if is_cell else heading)),
            f"{gain['n'] / found.tokens:.1%}" if is_cell else "",
            f"{-losses[key]['mean']:.3f}" if is_cell else "",
            words.group_plus_minus(gain),
            words.group_plus_minus(leads[key]),
        )
    console.print(table)


def print_verdicts(study: JudgedStudy, console: Console) -> None:
    """Print the verdicts, the claims that the study announced, and the headline answer."""
    results, findings = study.results, study.findings
    short_verdicts(findings, results.plan.title).print_on(console, table_caption(findings))
    for paragraph in headline.headline(findings, study.claims):
        console.print(Text(paragraph))
    _print_claims(study, console)
    if (tasks := short_accuracies(study)).rows:
        tasks.print_on(console, ACCURACY_CAPTION)
    print_problems(results, console)


def print_problems(results: Results, console: Console) -> None:
    """Print what is missing or left out, and what to know about the scores."""
    for warning in headline.warnings_of_scores(results):
        console.print(Text(f"warning: {warning}"))
    for problem in results.problems:
        console.print(Text(f"left out: {problem}"))
    for warning in (*results.warnings, *results.run_warnings):
        console.print(Text(f"warning: {warning}"))
    if results.unfinished.height:
        some = results.unfinished.select("run", "status").rows()[:_UNFINISHED_NAMED]
        rest = results.unfinished.height - len(some)
        named = ", ".join(f"{run} ({status})" for run, status in some) + (f" and {rest} more" if rest else "")
        number = f"{results.unfinished.height} of {results.runs.height} planned runs are not done"
        console.print(Text(f"{number}: {named}"))


def table_caption(findings: Findings) -> str:
    """What the numbers of the table are."""
    shown = few_verdicts(findings)
    kinds = "; ".join(sorted({words.interval_name(v) for v in shown}))
    caption = (
        f"{words.GAIN_CAPTION} Measured: the teacher's own bits per byte in domain beside those of the "
        f"student alone. Intervals: {kinds}."
    )
    if len(shown) < len(findings.verdicts):
        caption += f" Best alpha of each pair; all {len(findings.verdicts)} rows are in the report."
    return caption


def markdown(findings: Findings) -> str:
    """The table of verdicts and its caption as Markdown, as the README shows them."""
    return f"{short_verdicts(findings, '').markdown()}\n{table_caption(findings)}\n"


def _print_claims(study: JudgedStudy, console: Console) -> None:
    if not study.announced:
        return
    caption = "p: two-sided, Holm over the announced claims; of several tests the one that decides"
    answer_table(study.announced).print_on(console, caption)
    console.print(Text(headline.tally(study.claims)))
