"""Types and constants that several packages share: batches, targets, losses, scores.

Shape suffixes on tensor names: B batch, T time (tokens in a sequence), D hidden width, V vocabulary,
K kept teacher ids, N flattened tokens (B*T). Losses travel as *sums* over valid tokens in nats; the
one division, by the global number of valid tokens, happens in `tutelage.train.step`.

This module imports no torch, so that the analysis and the command line can use it for free.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

COPYING = "copying"
"""Name in the `domain` field of scores of copying in context."""

RECALL = "recall"
"""Name in the `domain` field of scores of facts of the training text."""

RECALL_BINS = (
    ("held_out", "held out"),
    ("0", "not read"),
    ("1", "read once"),
    ("2-3", "read 2 or 3 times"),
    ("4-9", "read 4 to 9 times"),
    ("10+", "read 10 times or more"),
)
"""Ends of the metrics of recall, by how often a run has read the facts; in words."""

IGNORE_INDEX = -100
"""Label value of a position that carries no loss (the convention of torch and transformers)."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
)
"""Files that may belong to a tokenizer of the Hugging Face format."""

Role = Literal["in_domain", "out_of_domain"]
ScoreRole = Role | Literal["downstream", "probe"]
Split = Literal["train", "validation", "test"]


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids and the ids to predict. Labels are shifted when a batch is made and nowhere else.

    Attributes:
        tokens_BT: int64 input ids.
        labels_BT: int64 next-token ids; `IGNORE_INDEX` where nothing is to be predicted.
        starts: for each row, the place of its first token in the split, the key of a teacher cache.
        positions_BT: int64 place of each token in its document, from 0; a token is to see its own document
            only. None: every token sees the whole row before it.
    """

    tokens_BT: Tensor
    labels_BT: Tensor
    starts: tuple[int, ...]
    positions_BT: Tensor | None = None

    def to(self, device: object) -> Batch:
        """The same batch on `device`; from pinned memory without waiting for the copy."""
        pinned = self.tokens_BT.is_pinned()
        return self._each(lambda tensor: tensor.to(device, non_blocking=pinned))  # type: ignore[call-overload]

    def pinned(self) -> Batch:
        """The same batch in page-locked memory, which a GPU reads while the CPU goes on."""
        return self._each(lambda tensor: tensor.pin_memory())

    def rows(self, rows: slice) -> Batch:
        """Return some of its sequences."""
        return replace(self._each(lambda tensor: tensor[rows]), starts=self.starts[rows])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        positions_BT = None if self.positions_BT is None else change(self.positions_BT)
        return Batch(change(self.tokens_BT), change(self.labels_BT), self.starts, positions_BT)


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """Scale and softcap that a model family applies to its logits after the head.

    Attributes:
        scale: factor on the logits (Cohere's `logit_scale`, the inverse of Granite's `logits_scaling`).
        softcap: c in c tanh(x / c), applied after the scale (Gemma 2); None for none.

    Raises:
        ValueError: the scale or the softcap is not a finite number above 0.
    """

    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        given: dict[str, object] = {"scale": self.scale, "softcap": self.softcap}
        for field, value in given.items():
            if value is None and field == "softcap":
                continue
            if not isinstance(value, Real) or not 0 < float(value) < float("inf"):
                raise ValueError(f"logit transform {field} {value!r}: must be a finite number above 0")


PLAIN = LogitTransform()
"""Logits as the head gives them."""


def transformed(logits: Tensor, transform: LogitTransform) -> Tensor:
    """Scale, then softcap c tanh(x / c)."""
    if transform.scale != 1.0:
        logits = logits * transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * (logits / transform.softcap).tanh()
    return logits


Rows: TypeAlias = "slice | Tensor"
"""Which tokens: consecutive ones, or an int64 vector of their places."""


@dataclass(frozen=True, slots=True)
class DenseTargets:
    """A teacher's full next-token distribution, as softmax(hidden @ head.T + bias), never materialised whole.

    Attributes:
        hidden_NE: teacher hidden states for N tokens, of the teacher's own width E.
        head_VE: the teacher's output embedding.
        transform: applied to its logits; None: they are as the head gives them.
        bias_V: the bias of its head (Phi, GPT-J); None for none.
    """

    hidden_NE: Tensor
    head_VE: Tensor
    transform: LogitTransform | None = None  # no object, which torch.compile could not build by itself
    bias_V: Tensor | None = None

    @property
    def rows_of_head(self) -> int:
        """Entries of the vocabulary, padding included."""
        return self.head_VE.shape[0]

    def rows(self, rows: Rows) -> DenseTargets:
        """The targets of some tokens."""
        return replace(self, hidden_NE=self.hidden_NE[rows])

    def without_padding(self, vocab_size: int) -> DenseTargets:
        """The same targets over the first `vocab_size` rows of the head, the real vocabulary."""
        bias_V = None if self.bias_V is None else self.bias_V[:vocab_size]
        return replace(self, head_VE=self.head_VE[:vocab_size], bias_V=bias_V)


@dataclass(frozen=True, slots=True)
class MeanTargets:
    """The mean of several teachers' probabilities, of which each has its own head; never materialised whole.

    Its logits are log p with p = 1/n (p_1 + ... + p_n) at T=1; a temperature divides these.

    Attributes:
        parts: the teachers' distributions for the same tokens.

    Raises:
        TypeError: `parts` is no tuple or list, the likely mistake being the targets of one teacher.
    """

    parts: tuple[DenseTargets, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.parts, tuple | list):
            raise TypeError(
                f"parts is a {type(self.parts).__name__}: give a tuple with the DenseTargets of each teacher"
            )

    @property
    def rows_of_head(self) -> int:
        """Entries of the smallest vocabulary."""
        return min(part.rows_of_head for part in self.parts)

    def without_padding(self, vocab_size: int) -> MeanTargets:
        """The same targets over the first `vocab_size` entries, the real vocabulary."""
        return MeanTargets(tuple(part.without_padding(vocab_size) for part in self.parts))


@dataclass(frozen=True, slots=True)
class LogitTargets:
    """A teacher's logits, for callers that have them already. They are read and never written to.

    Attributes:
        logits_NV: after the teacher's own transform; log-probabilities will do, probabilities will not.
    """

    logits_NV: Tensor

    def rows(self, rows: Rows) -> LogitTargets:
        """The targets of some tokens."""
        return LogitTargets(self.logits_NV[rows])


@dataclass(frozen=True, slots=True)
class SparseTargets:
    """A few token ids per position with their teacher probabilities.

    Slots come in any order. A slot of probability 0 is unused, whatever id of the vocabulary it holds: that
    id is not kept. Of an id that stands in several slots the probabilities are added.

    Attributes:
        ids_NK: int64, at least one per position.
        probs_NK: float32. Probabilities of the ids (top-k, top-p), or unbiased weights (samples).
        tail_N: float32 teacher mass outside the ids; 0 for samples.
        gold_logp_N: float32 log-probability the teacher gives to the label, at T=1.
        temperature: T at which the probabilities were taken.
    """

    ids_NK: Tensor
    probs_NK: Tensor
    tail_N: Tensor
    gold_logp_N: Tensor
    temperature: float = 1.0

    def rows(self, rows: Rows) -> SparseTargets:
        """The targets of some tokens."""
        return self._each(lambda tensor: tensor[rows])

    def to(self, device: object) -> SparseTargets:
        """The same targets on `device`."""
        return self._each(lambda tensor: tensor.to(device))  # type: ignore[call-overload]

    def _each(self, change: Callable[[Tensor], Tensor]) -> SparseTargets:
        ids_NK, probs_NK = change(self.ids_NK), change(self.probs_NK)
        return SparseTargets(
            ids_NK, probs_NK, change(self.tail_N), change(self.gold_logp_N), self.temperature
        )

    @staticmethod
    def cat(parts: Sequence[SparseTargets]) -> SparseTargets:
        """The tokens of several targets, one after the other.

        Raises:
            ValueError: they are of several temperatures.
        """
        import torch  # noqa: PLC0415 - this module is free to import

        temperatures = sorted({part.temperature for part in parts})
        if len(temperatures) > 1:
            raise ValueError(f"temperatures {temperatures}: must be one, since the tokens share it")
        return SparseTargets(
            torch.cat([part.ids_NK for part in parts]),
            torch.cat([part.probs_NK for part in parts]),
            torch.cat([part.tail_N for part in parts]),
            torch.cat([part.gold_logp_N for part in parts]),
            parts[0].temperature,
        )


WholeTargets = DenseTargets | MeanTargets
"""What live teachers give: distributions over the whole vocabulary."""

Targets = WholeTargets | LogitTargets | SparseTargets


@dataclass(frozen=True, slots=True)
class TokenLosses:
    """Losses of each of the N tokens, in nats, without gradients; 0 where a token has no label.

    Attributes:
        loss_N: the mixed objective, the token's weight in it.
        ce_N: cross-entropy of the student on the label.
        kd_N: T^2 times the divergence from the teacher, as in `LossSums`.
        teacher_ce_N: cross-entropy of the teacher on the label at T=1; 0 without a teacher.
        effective_alpha_N: alpha times the gate.
        entropy_N: entropy of the student's distribution at T=1.
    """

    loss_N: Tensor
    ce_N: Tensor
    kd_N: Tensor
    teacher_ce_N: Tensor
    effective_alpha_N: Tensor
    entropy_N: Tensor


@dataclass(frozen=True, slots=True)
class LossSums:
    """Sums over valid tokens as 0-d tensors on the training device, float32 or wider; losses in nats.

    Attributes:
        loss: the mixed objective, weights of tokens, label smoothing and z-loss included; the only one that
            carries a gradient.
        ce: cross-entropy of the student on the labels.
        kd: T^2 times the divergence from the teacher (T^2 only if the objective asks for it). A KL of two
            distributions only where targets are not samples: see `tutelage.config.teacher_config.kd_name`.
        teacher_ce: cross-entropy of the teacher on the labels at T=1; 0 without a teacher.
        effective_alpha: alpha times the gate; over the number of tokens, the mean effective alpha.
        tokens: the same for each token; None unless asked for.
    """

    loss: Tensor
    ce: Tensor
    kd: Tensor
    teacher_ce: Tensor
    effective_alpha: Tensor
    tokens: TokenLosses | None = None


@dataclass(frozen=True, slots=True)
class StepReport:
    """Measurements of one optimizer step, per valid token and still on the device.

    Reading a field as a number waits for the device, so the loop does it only on log steps.
    """

    loss: Tensor
    ce: Tensor
    kd: Tensor
    teacher_ce: Tensor
    grad_norm: Tensor
    alpha: Tensor
    lr: float


SCORING_VERSION = 2
"""Raised when the same model and text give another number: which tokens are scored, what they see, what
counts as a byte. It leads the version of every score; scores of another one are never shown beside these.
1: every document was scored from an end-of-text mark."""

FIRST_WINDOWS = "first_window_excess"
"""Metric: loss of the first windows of documents minus that of their further windows, in nats per token."""

CHANGED_TEXT = "changed_documents"
"""Metric: share of a split's documents whose text the tokenizer changes; only where there are any."""


def scoring_version(version: str) -> int:
    """Parse the `SCORING_VERSION` from the `version` of a score; 1 if it has none."""
    leading, dash, _ = version.partition("-")
    return int(leading) if dash and leading.isdecimal() else 1


@dataclass(frozen=True, slots=True)
class Score:
    """One measured quantity of one model, as a row of `scores.jsonl`.

    Attributes:
        run: run id (directory name).
        step: optimizer steps the model had taken.
        tokens: training tokens it had seen.
        domain: name of the evaluated text, task or probe.
        role: whether the domain is the training distribution, or what else was measured.
        split: validation (choices are made on it) or test (results are reported on it).
        metric: for example "bits_per_byte" or "perplexity".
        value: the score.
        stderr: standard error over documents.
        n: number of documents (items of a task).
        higher_is_better: direction of the metric.
        version: identity of the evaluation data and settings, led by `SCORING_VERSION` and a dash; scores
            compare only within one version.
        low: lower end of the 95% bootstrap interval over documents; None if there is none.
        high: its upper end.
        fit_error: of a score with a fit, the root mean square error that the choice of the fit's documents
            adds to it; NaN for a fit on one document, None where nothing was fitted.
        code: versions and commit of the code that measured it; None where that was not recorded.
        summed_by: domain of the group of tasks whose score of this metric has this one in it; None: none.
    """

    run: str
    step: int
    tokens: int
    domain: str
    role: ScoreRole
    split: Split
    metric: str
    value: float
    stderr: float
    n: int
    higher_is_better: bool
    version: str
    low: float | None = None
    high: float | None = None
    fit_error: float | None = None
    code: str | None = None
    summed_by: str | None = None
