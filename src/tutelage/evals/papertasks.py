"""The paper's downstream tasks, with its shots and metrics; a metric it does not name is plain accuracy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PaperTask:
    """A task of the paper.

    Attributes:
        name: what lm-eval calls it.
        shots: worked examples before the question.
        metric: the one that the paper reports.
    """

    name: str
    shots: int
    metric: str = "acc"


PAPER_TASKS = (
    PaperTask("hellaswag", 0, "acc_norm"),
    PaperTask("winogrande", 5),
    PaperTask("arc_easy", 0, "acc_norm"),
    PaperTask("piqa", 0, "acc_norm"),
    PaperTask("boolq", 5),
    PaperTask("sciq", 0),
    PaperTask("mmlu", 5),
    PaperTask("mathqa", 5),
    PaperTask("openbookqa", 5, "acc_norm"),
    PaperTask("social_iqa", 0),
    PaperTask("commonsense_qa", 10),
    PaperTask("truthfulqa_mc1", 0),
    PaperTask("logiqa2", 10),
    PaperTask("race", 0),
    PaperTask("medmcqa", 10),
    PaperTask("anli_r1", 10),
)
"""Their data comes from the Hugging Face Hub. `paper` names all of them."""
