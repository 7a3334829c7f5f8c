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
    "entropy": "{} entropy (nats)",
    "entropy contrast": "highest minus lowest",
    "right": "first choice right",
    "right contrast": "teacher minus {}",
    "closer": "probability of the token",
    "closer contrast": "closer minus not",
}
"""Above the cells of a grouping, or in place of a difference's longer label."""
CHANCE = (
    "Sorting tokens by the baseline also sorts by its luck: tokens on which it was unlucky improve with any "
    "other model, an untaught one too. Sort them by a third model (--sorter)."
)
"""What to keep in mind where the baseline makes the cells: regression to the mean."""
SORTED = "Tokens are sorted by a third model, not by the baseline, whose luck would sort them too."


def sorting(found: Mechanism) -> str:
    """By whom tokens are sorted, and what that means."""
    return CHANCE if found.sorter is None else SORTED


def untaught(found: Mechanism) -> str:
    """`baseline`, or `sorter` if there is one: who stands for an untaught model in the cells."""
    return "baseline" if found.sorter is None else "sorter"


def print_mechanism(found: Mechanism, console: Console) -> None:
    """Print the gain overall and in every cell but those by position, with 95% intervals."""
    table = Table(
        title=Text(f"Where the student gains: {found.text}, {found.tokens:,} tokens of {found.documents:,} "
                   "documents"),
        caption=Text(
            "nats per token; gain: cross-entropy of the baseline less that of the student, lead: less that "
            f"of the teacher; 95% intervals over documents. {sorting(found)}"
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
        heading, is_cell = _HEADINGS[key[0]].format(untaught(found)), not key[0].endswith("contrast")
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
