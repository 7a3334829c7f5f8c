"""Students taught from caches of every format, on real text: loss and calibration, paired by seed.

The claim tested (arXiv 2503.16870, in direction): renormalised top-k hurts loss and calibration, unbiased
samples do as well as the whole distribution. alpha is 1, where the difference shows most. The seeds of one
format train together as a cohort; every format sees the same batches.

    python benchmarks/studies/cache_study.py OUTPUT [--seeds 3] [--tokens 700K] [--bytes 4000000] \
        [--vocabulary 2048]

A cache covers all of the text, of which the students read `--tokens`; so `--bytes` should not be far above.

Everything lands below OUTPUT; the same command goes on after a stop, and prints the table again when done.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scipy import stats

from tutelage.config.data_config import StoreConfig
from tutelage.config.load import validate
from tutelage.config.run_config import RunConfig
from tutelage.config.teacher_config import TeachConfig
from tutelage.data.build import build_store
from tutelage.run import run, run_cohort
from tutelage.teachers.cache.cache_writer import write_cache

if TYPE_CHECKING:
    from tutelage.run_directory import RunDirectory

LENGTH = 128
DENSE = "dense (hidden, float32)"
FORMATS: dict[str, tuple[dict[str, Any], str]] = {
    DENSE: ({"kind": "hidden", "dtype": "float32"}, "none"),
    "min-variance, 12 ids": ({"kind": "sample_min_variance", "ids": 12}, "none"),
    "50 draws": ({"kind": "sample_multinomial", "draws": 50}, "none"),
    "top 12, renormalised": ({"kind": "topk", "k": 12}, "renormalise"),
    "top 50, renormalised": ({"kind": "topk", "k": 50}, "renormalise"),
    "top 12, other bucket": ({"kind": "topk", "k": 12}, "other_bucket"),
}
METRICS = ("bits_per_byte", "ece")


def base(store: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Settings that all runs share."""
    return {
        "model": {"shape": "nano-150k"},
        "data": {"store": str(store), "sequence_length": LENGTH},
        "tokens": arguments.tokens,
        "global_batch_tokens": 1024,
        "eval": {
            "domains": [{"name": "speeches", "store": str(store), "role": "in_domain"}],
            "max_documents": 40,
            "max_tokens": 2048,
        },
        "runtime": {"device": "cpu", "threads": arguments.threads, "log_every": 50},
        "output": str(arguments.output / "runs"),
    }


def measured(directory: RunDirectory) -> dict[str, float]:
    """Test scores of a run."""
    rows = [json.loads(line) for line in directory.scores.read_text(encoding="utf-8").splitlines()]
    return {row["metric"]: row["value"] for row in rows if row["split"] == "test"}


def train_all(arguments: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Scores by format, one entry per seed."""
    text = '{"name": "sotu", "sources": [{"kind": "corpus", "name": "sotu"}], '
    text += f'"tokenizer": {{"vocab_size": {arguments.vocabulary}}}, "test": 0.1, '
    text += f'"max_bytes": {arguments.bytes}}}'
    store = build_store(StoreConfig.model_validate_json(text), arguments.output / "stores")
    common = base(store, arguments)
    taught = {"name": "teacher", "seed": 42, "model": {"shape": "nano-350k"}}
    taught["tokens"] = arguments.teacher_tokens
    teacher = run(validate(RunConfig, common | taught, "teacher"))
    print(f"teacher: {measured(teacher)['bits_per_byte']:.4f} bits per byte", flush=True)
    seeds = range(43, 43 + arguments.seeds)
    alone = [validate(RunConfig, common | {"name": f"alone-s{seed}", "seed": seed}, "run") for seed in seeds]
    found = {"no teacher": [measured(directory) for directory in run_cohort(alone)]}
    for number, (name, (kept, tail)) in enumerate(FORMATS.items()):
        teach = {
            "store": str(store),
            "teacher": {"kind": "run", "run": teacher.id},
            "context_length": LENGTH,
            "format": kept,
            "threads": arguments.threads,
            "runs": str(arguments.output / "runs"),
            "output": str(arguments.output / "caches"),
        }
        cache = write_cache(validate(TeachConfig, teach, name))
        size = sum(file.stat().st_size for file in (cache / "shards").iterdir())
        students = [
            common
            | {
                "name": f"format{number}-s{seed}",
                "seed": seed,
                "teacher": {"kind": "cache", "path": str(cache)},
                "objective": {"alpha": arguments.alpha, "tail": tail},
            }
            for seed in seeds
        ]
        runs = run_cohort([validate(RunConfig, student, name) for student in students])
        found[name] = [measured(directory) | {"bytes": size} for directory in runs]
        print(f"{name}: done", flush=True)
    return found


def against(found: list[float], reference: list[float]) -> str:
    """Mean paired difference with its 95% t interval."""
    differences = [a - b for a, b in zip(found, reference, strict=True)]
    mean = statistics.mean(differences)
    if len(differences) == 1:
        return f"{mean:+.4f}"
    width = stats.t.ppf(0.975, len(differences) - 1) * statistics.stdev(differences) / len(differences) ** 0.5
    return f"{mean:+.4f} ± {width:.4f}"


def main() -> None:
    """Train what is not trained, print a markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", default="700K")
    parser.add_argument("--bytes", type=int, default=4_000_000, help="of text")
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--teacher-tokens", default="2M")
    parser.add_argument("--alpha", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    found = train_all(arguments)
    print(f"\nalpha {arguments.alpha}, {arguments.tokens} tokens, {arguments.seeds} seeds, paired")
    print("| targets | bits per byte | against dense | ECE | against dense |\n|---|---|---|---|---|")
    for name, rows in found.items():
        cells = [name]
        for metric in METRICS:
            values, dense = ([row[metric] for row in part] for part in (rows, found[DENSE]))
            cells += [f"{statistics.mean(values):.4f}", against(values, dense) if name != DENSE else ""]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
