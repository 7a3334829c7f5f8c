"""Gradient error against bytes per token, for every cache format and for the formats of other projects.

A pretrained teacher reads real text. Each format writes its targets and reads them back; what comes back is
compared with the teacher's full distribution through the gradient it gives a student that knows token
frequencies and nothing else. Two errors, both relative to the dense gradient: of one position's logits, and
of the head's gradient summed over all positions, where unbiased errors average out and biased ones stay.

    python benchmarks/models/pretrained.py smollm2
    python benchmarks/targets.py --model smollm2 [--positions 2048] [--figure docs/figures]

Other projects' bytes are what their own code writes per token (LAB.md says how each was found); their errors
are those of the same ids with the same treatment of the tail.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import altair as alt
import polars as pl
import torch
from pydantic import TypeAdapter

from tutelage.analysis.figures.style import GREY, INK, PALETTE, Figure, inline, save_all
from tutelage.config.data_config import StoreConfig
from tutelage.config.teacher_config import Format
from tutelage.data.build import build_store
from tutelage.data.store import open_store
from tutelage.models import hub
from tutelage.objective.products import dense_logits
from tutelage.teachers.cache.codec import CodecSettings, HiddenRows
from tutelage.teachers.cache.formats import make_codec
from tutelage.teachers.live import OnlineTeacher
from tutelage.types import Batch, DenseTargets, SparseTargets

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

CONTEXT, CHUNK = 256, 128
OURS: dict[str, list[dict[str, Any]]] = {
    "min-variance": [{"kind": "sample_min_variance", "ids": k} for k in (4, 6, 8, 12, 16, 24, 32, 64)],
    "multinomial": [{"kind": "sample_multinomial", "draws": n} for n in (12, 25, 50, 100)],
    "top-k, other bucket": [{"kind": "topk", "k": k} for k in (12, 16, 50, 128)],
    "top-k, renormalised": [{"kind": "topk", "k": k} for k in (12, 16, 50, 128)],
    "hidden states": [{"kind": "hidden", "dtype": d} for d in ("int8", "float16", "float32")],
}
PEERS = {
    "DistillKit, 50 ids": ({"kind": "topk", "k": 50}, "top-k, other bucket", 114.0),
    "DistillKit, 128 ids": ({"kind": "topk", "k": 128}, "top-k, other bucket", 312.0),
    "Megatron-LM, 64 ids, zstd": ({"kind": "topk", "k": 64}, "top-k, other bucket", 218.0),
    "MaxText, 128 ids": ({"kind": "topk", "k": 128}, "top-k, renormalised", 832.0),
}
LEAST_SHOWN = 0.01
"""Errors below are left out of the figure, whose axis is logarithmic."""
REDRAWN = 8
"""Draws of a sample where two formats are compared closely."""
RS_KD_BYTES = 3
"""Random-sampling KD stores 24 bits per distinct id (arXiv 2503.16870)."""


@dataclass(frozen=True)
class Problem:
    """The teacher on N positions, and the student.

    Attributes:
        targets: dense.
        labels_N: next tokens.
        student_V: the student's distribution, the same everywhere.
        vocab_size: V.
    """

    targets: DenseTargets
    labels_N: Tensor
    student_V: Tensor
    vocab_size: int

    def teacher(self) -> Iterator[tuple[slice, Tensor]]:
        """The dense distribution, a chunk of rows at a time."""
        for start in range(0, len(self.labels_N), CHUNK):
            rows = slice(start, start + CHUNK)
            yield rows, dense_logits(self.targets, rows, self.vocab_size).softmax(-1)


@torch.no_grad()
def make_problem(model: Path, positions: int) -> Problem:
    """State of the Union addresses, read by the teacher in contexts of `CONTEXT` tokens."""
    with tempfile.TemporaryDirectory() as folder:
        text = '{"name": "sotu", "sources": [{"kind": "corpus", "name": "sotu"}], "max_bytes": 2000000, '
        text += f'"tokenizer": {{"path": "{model.absolute()}"}}}}'
        store = open_store(build_store(StoreConfig.model_validate_json(text), Path(folder)))
        tokens = torch.from_numpy(store.split("train").tokens.astype("int64"))
    teacher = OnlineTeacher(hub.load(str(model), dtype=torch.float32), 0.0)
    inputs, labels = tokens[:positions].view(-1, CONTEXT), tokens[1 : positions + 1].view(-1, CONTEXT)
    batches = [Batch(inputs[i : i + 1], labels[i : i + 1], (i * CONTEXT,)) for i in range(len(inputs))]
    dense = [teacher.targets(batch) for batch in batches]
    hidden = torch.cat([one.hidden_NE for one in dense])
    counts = torch.bincount(tokens, minlength=store.vocab_size).float() + 1
    targets = DenseTargets(hidden, dense[0].head_VE, dense[0].transform)
    return Problem(targets, labels.flatten(), counts / counts.sum(), store.vocab_size)


def effective(sparse: SparseTargets, rows: slice, student_V: Tensor, tail: str) -> Tensor:
    """What the targets amount to as a distribution [rows, V]: the logit gradient is student - this."""
    ids, probs = sparse.ids_NK[rows], sparse.probs_NK[rows]
    weights = torch.zeros(len(ids), len(student_V)).scatter_add_(1, ids, probs)
    if tail == "top-k, renormalised":
        return weights / weights.sum(-1, keepdim=True)
    rest = student_V.expand(len(ids), -1).masked_fill(weights > 0, 0.0)
    return weights + sparse.tail_N[rows].unsqueeze(1) * rest / rest.sum(-1, keepdim=True)


def measure(problem: Problem, settings: dict[str, Any], treatment: str, seed: int = 0) -> dict[str, float]:
    """Bytes per token and both errors of one format; samples are drawn with `seed`."""
    n, width = problem.targets.hidden_NE.shape
    config = TypeAdapter(Format).validate_python(settings)
    codec = make_codec(config, CodecSettings(problem.vocab_size, width, temperature=1.0, seed=seed))
    blobs = codec.encode(problem.targets, problem.labels_N, 0, CONTEXT)
    decoded = [codec.decode(blob, CONTEXT) for blob in blobs]
    unique = math.nan
    if isinstance(decoded[0], HiddenRows):
        hidden = torch.cat([rows.hidden_NE.float() for rows in decoded])
        other = DenseTargets(hidden, problem.targets.head_VE, problem.targets.transform)
    else:
        other = join(decoded)
        unique = float((other.probs_NK > 0).sum()) / n
    squared = dense_squared = 0.0
    gradient, error = torch.zeros(problem.vocab_size, width), torch.zeros(problem.vocab_size, width)
    for rows, p in problem.teacher():
        if isinstance(other, DenseTargets):
            found = dense_logits(other, rows, problem.vocab_size).softmax(-1)
        else:
            found = effective(other, rows, problem.student_V, treatment)
        off, right = found - p, problem.student_V - p
        squared += float((off**2).sum())
        dense_squared += float((right**2).sum())
        hidden_rows = problem.targets.hidden_NE[rows]
        error.addmm_(off.T, hidden_rows)
        gradient.addmm_(right.T, hidden_rows)
    return {
        "bytes": sum(map(len, blobs)) / n,
        "ids": unique,
        "position": math.sqrt(squared / dense_squared),
        "batch": float(error.norm() / gradient.norm()),
    }


def join(parts: list[Any]) -> SparseTargets:
    """Blocks of sparse targets as one, padded to the widest; unused slots repeat the first id."""
    widest = max(part.ids_NK.shape[1] for part in parts)
    ids, probs = [], []
    for part in parts:
        missing = widest - part.ids_NK.shape[1]
        ids.append(torch.cat([part.ids_NK, part.ids_NK[:, :1].expand(-1, missing)], 1))
        probs.append(torch.nn.functional.pad(part.probs_NK, (0, missing)))
    tail, gold = torch.cat([part.tail_N for part in parts]), torch.cat([part.gold_logp_N for part in parts])
    return SparseTargets(torch.cat(ids), torch.cat(probs), tail, gold)


def all_rows(problem: Problem) -> pl.DataFrame:
    """Every format of ours and of others."""
    rows = []
    for series, variants in OURS.items():
        for settings in variants:
            found = measure(problem, settings, series)
            value = next(value for key, value in settings.items() if key != "kind")
            rows.append({"series": series, "name": f"{series} {value}", "peer": False} | found)
            if series == "multinomial":
                name = f"RS-KD, {value} draws"
                packed = {"bytes": RS_KD_BYTES * found["ids"]}
                rows.append({"series": "other projects", "name": name, "peer": True} | found | packed)
            print(rows[-1]["name"], flush=True)
    for name, (settings, treatment, size) in PEERS.items():
        found = measure(problem, settings, treatment) | {"bytes": size}
        rows.append({"series": "other projects", "name": name, "peer": True} | found)
    return pl.DataFrame(rows)


def redrawn(problem: Problem, settings: dict[str, Any]) -> dict[str, float]:
    """`measure` of samples, drawn `REDRAWN` times over: bytes, ids and the root of the mean square error."""
    found = [measure(problem, settings, "", seed) for seed in range(REDRAWN)]
    means = {key: sum(one[key] for one in found) / REDRAWN for key in ("bytes", "ids")}
    return means | {"position": math.sqrt(sum(one["position"] ** 2 for one in found) / REDRAWN)}


def equal_variance(problem: Problem) -> list[str]:
    """At 50 multinomial draws, the fewest ids with which min-variance samples are no noisier.

    Between two neighbouring numbers of ids the error of one draw decides by chance, so both are drawn often.
    """
    theirs = redrawn(problem, {"kind": "sample_multinomial", "draws": 50})
    size = RS_KD_BYTES * theirs["ids"]
    lines = [f"RS-KD, 50 draws, {REDRAWN} times: {size:.1f} bytes, error {theirs['position']:.3%}"]
    for ids in range(14, 65):
        ours = redrawn(problem, {"kind": "sample_min_variance", "ids": ids})
        lines.append(
            f"min-variance {ids}: {ours['bytes']:.1f} bytes = {ours['bytes'] / size:.2f} x, "
            f"error {ours['position']:.3%}"
        )
        if ours["position"] <= theirs["position"]:
            break
    return lines


def equal_bytes(table: pl.DataFrame) -> list[str]:
    """At each number of draws, the variance of the largest min-variance samples that take no more bytes."""
    ours = table.filter(pl.col("series") == "min-variance")
    lines = []
    for row in table.filter(pl.col("name").str.starts_with("RS-KD")).iter_rows(named=True):
        fitting = ours.filter(pl.col("bytes") <= row["bytes"])
        if fitting.is_empty():
            lines.append(f"{row['name']}, {row['bytes']:.1f} bytes: none of ours is that small")
            continue
        best = fitting.sort("bytes").row(-1, named=True)
        lines.append(
            f"{row['name']}, {row['bytes']:.1f} bytes: {best['name']} take {best['bytes']:.1f} and have "
            f"{(best['position'] / row['position']) ** 2:.2f} x the variance"
        )
    return lines


def figure(table: pl.DataFrame, n: int) -> Figure:
    """Both errors against bytes per token."""
    series = [*OURS, "other projects"]
    scale = alt.Scale(domain=series, range=[*PALETTE[: len(OURS)], GREY])
    lift = [7, -7, 7, -7, 7]  # labels turn and turn about above and below their points
    names = ["RS-KD, 50 draws", *PEERS]
    shown = table.filter(pl.col("batch") >= LEAST_SHOWN, pl.col("position") >= LEAST_SHOWN)
    panels = []
    for column, title in (
        ("batch", f"error of the gradient summed over {n:,} positions"),
        ("position", "error of one position's gradient"),
    ):
        y_scale = alt.Scale(type="log", domain=[LEAST_SHOWN, 1.0], nice=False)
        base = alt.Chart(inline(shown)).encode(
            x=alt.X("bytes:Q", title="bytes per token", scale=alt.Scale(type="log", domain=[8, 1500])),
            y=alt.Y(f"{column}:Q", title=title, scale=y_scale, axis=alt.Axis(format=".0%", tickCount=5)),
            color=alt.Color("series:N", title=None, scale=scale, legend=alt.Legend(columns=3)),
        )
        lines = base.transform_filter("!datum.peer").mark_line()
        points = base.mark_point(filled=True, size=50, opacity=1).encode(
            shape=alt.Shape("peer:N", legend=None, scale=alt.Scale(range=["circle", "diamond"]))
        )
        labels = [
            base.transform_filter(alt.datum.name == name)
            .mark_text(align="left", dx=5, dy=dy, fontSize=9)
            .encode(text="name:N", color=alt.value(INK))
            for name, dy in zip(names, lift, strict=True)
        ]
        panels.append(alt.layer(lines, points, *labels).properties(width=420, height=320))
    return Figure(
        name="targets",
        title="What a byte of cache buys",
        caption=f"Gradient error against size for {n:,} positions of real text; lower left is better. Hidden "
        f"states as float16 and float32 are exact to within {LEAST_SHOWN:.0%} and off the figure.",
        spoken="Summed over positions, min-variance samples have the least error per byte, and truncated "
        "targets keep a bias; at a single position truncated targets are nearer.",
        chart=alt.hconcat(*panels),
        data=table,
    )


def main() -> None:
    """Measure, print a markdown table, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory of the teacher")
    parser.add_argument("--positions", type=int, default=2048, help=f"a multiple of {CONTEXT}")
    parser.add_argument("--figure", type=Path, help="write targets.svg, .png and .csv below this directory")
    arguments = parser.parse_args()
    problem = make_problem(arguments.model, arguments.positions)
    with torch.no_grad():
        table = all_rows(problem)
        equal = equal_variance(problem)
    print("\n| format | ids | bytes per token | error, one position | error, all positions |")
    print("|---|---|---|---|---|")
    for row in table.iter_rows(named=True):
        ids = "" if math.isnan(row["ids"]) else f"{row['ids']:.1f}"
        errors = f"{row['position']:.3%} | {row['batch']:.3%}"
        print(f"| {row['name']} | {ids} | {row['bytes']:.1f} | {errors} |")
    print("\n".join(["", *equal, "", *equal_bytes(table)]))
    if arguments.figure:
        save_all([figure(table, arguments.positions)], arguments.figure / "targets")
        print(f"figure   {arguments.figure / 'targets'}")


if __name__ == "__main__":
    main()
