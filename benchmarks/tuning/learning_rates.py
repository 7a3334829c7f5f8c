"""Tune the no-teacher run of each rung of the demo, and show that the choice is stable across seeds.

Prints bits per byte on the *validation* split, mean and standard deviation over seeds; the best rate per rung
is marked. The rungs' `lr` come from here (see LAB.md). Runs are kept, so an interrupted sweep goes on.

    python benchmarks/tuning/learning_rates.py --output lr-sweep --tokens 1.5M --seeds 3
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import polars as pl

from tutelage.config import RunConfig
from tutelage.configio import validate
from tutelage.console import StudyTable
from tutelage.data.store import build_store
from tutelage.identity import run_id
from tutelage.models.flops import training_flops
from tutelage.models.ladder import rung
from tutelage.settings import parse_tokens
from tutelage.study.grid import Node
from tutelage.study.presets import demo_study
from tutelage.study.runner import default_workers, run_all

RUNGS = ("nano-50k", "nano-150k", "nano-350k")
RATES = (2e-3, 4e-3, 6e-3, 8e-3, 1.2e-2)


def node(common: dict[str, object], name: str, rate: float, seed: int) -> Node:
    """One no-teacher run."""
    config = validate(
        RunConfig,
        common
        | {
            "name": f"{name}-lr{rate:g}-s{seed}",
            "seed": seed,
            "model": {"rung": name},
            "optim": {"lr": rate},
        },
        "sweep",
    )
    cost = parse_tokens(config.tokens) * training_flops(rung(name), 512, config.data.sequence_length)
    return Node(run_id(config), "baseline", None, None, seed, config, (), cost)


def main() -> None:
    """Run the sweep and print its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("lr-sweep"))
    parser.add_argument("--tokens", default="1.5M")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rungs", nargs="+", default=RUNGS)
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    arguments = parser.parse_args()
    study = demo_study(1, arguments.tokens, quick=False)
    store = build_store(study.corpus, arguments.output / "data")
    cells = [(name, rate) for name in arguments.rungs for rate in arguments.rates]
    nodes = {}
    for name, rate in cells:
        for seed in range(43, 43 + arguments.seeds):
            common = study.run | {
                "data": study.run["data"] | {"store": str(store), "seed": seed},
                "tokens": arguments.tokens,
                "output": str(arguments.output / "runs"),
                "eval": {"domains": [{"name": "speeches", "store": str(store), "role": "in_domain"}]},
            }
            nodes[name, rate, seed] = node(common, name, rate, seed)
    with StudyTable() as table:
        run_all(list(nodes.values()), default_workers(), table)
    print(f"{arguments.tokens} tokens, {arguments.seeds} seeds, validation bits per byte")
    for name in arguments.rungs:
        results = {}
        for rate in arguments.rates:
            found = [
                score(arguments.output / "runs" / nodes[name, rate, seed].id)
                for seed in range(43, 43 + arguments.seeds)
            ]
            results[rate] = (statistics.mean(found), statistics.stdev(found) if len(found) > 1 else 0.0)
        best = min(results, key=lambda rate: results[rate][0])
        for rate, (mean, deviation) in results.items():
            print(
                f"{name:<12} lr {rate:<8g} {mean:.4f} +- {deviation:.4f}{'  <- best' if rate == best else ''}"
            )


def score(directory: Path) -> float:
    """Validation bits per byte of a finished run."""
    scores = pl.read_ndjson(directory / "scores.jsonl")
    value: float = scores.filter(split="validation", metric="bits_per_byte")["value"].item()
    return value


if __name__ == "__main__":
    main()
