"""Where a student gains: a mechanism evaluation for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console

    from tutelage.study.mechanisms import Mechanism

_HEADINGS = {
    "all": "",
    "entropy": "baseline entropy (nats)",
    "entropy contrast": "highest minus lowest",
    "right": "first choice right",
    "right contrast": "teacher minus baseline",
    "closer": "probability of the token",
    "closer contrast": "closer minus not",
}
"""Above the cells of a grouping, or in place of a difference's longer label."""
CHANCE = (
    "Sorting tokens by who did well on them also sorts by luck: tokens on which the baseline was unlucky "
    "improve with any other model, so compare these cells with those of a baseline of another seed."
)
"""What to keep in mind where cells are made with the gold token: regression to the mean."""


def print_mechanism(found: Mechanism, console: Console) -> None:
    """Print the gain overall and in every cell but those by position, with 95% intervals."""
    table = Table(
        title=Text(f"Where the student gains: {found.text}, {found.tokens:,} tokens of {found.documents:,} "
                   "documents"),
        caption=Text(
            "nats per token; gain: cross-entropy of the baseline less that of the student, lead: less that "
            f"of the teacher; 95% intervals over documents. {CHANCE}"
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
        heading, is_cell = _HEADINGS[key[0]], not key[0].endswith("contrast")
        if heading and is_cell and key[0] != before:
            table.add_row(Text(heading, style="bold"))
        before = key[0]
        table.add_row(
            Text(("  " if heading else "") + (gain["label"] if is_cell else heading)),
            f"{gain['n'] / found.tokens:.1%}" if is_cell else "",
            f"{-losses[key]['mean']:.3f}" if is_cell else "",
            plus_minus(gain),
            plus_minus(leads[key]),
        )
    console.print(table)


def plus_minus(cell: dict[str, Any]) -> str:
    """`+0.123 ± 0.045`, or the mean alone where there is no interval."""
    if cell["high95"] is None:
        return f"{cell['mean']:+.3f}"
    return f"{cell['mean']:+.3f} ± {cell['high95'] - cell['mean']:.3f}"
