"""Tune the no-teacher run of each shape of the demo, and show that the choice is stable across seeds.

Prints bits per byte on the *validation* split, mean and standard deviation over seeds; the best rate of each
shape is marked. The shapes' `lr` come from here (see LAB.md). Runs are kept, so an interrupted sweep goes on.

    python benchmarks/tuning/learning_rates.py --output lr-sweep --tokens 1.5M --seeds 3
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

import polars as pl

from tutelage.cli.bars import RichProgress
from tutelage.config.load import validate
from tutelage.config.study_config import StudyConfig
from tutelage.data.build import build_store
from tutelage.data.store import open_store
from tutelage.study.engines.local import LocalEngine, default_workers
from tutelage.study.expand import expand
from tutelage.study.leases import Failures, Leases
from tutelage.study.nodes import Node, Stores, bind
from tutelage.study.presets import demo_study
from tutelage.study.runner import run_all

SHAPES = ["nano-50k", "nano-150k", "nano-350k"]
RATES = [2e-3, 4e-3, 6e-3, 8e-3, 1.2e-2]


def sweep(arguments: argparse.Namespace) -> list[Node]:
    """The demo's no-teacher run at every shape, rate and seed."""
    raw = demo_study(arguments.seeds, None, quick=False).model_dump(mode="json")
    grid = {"product": {"shape": arguments.shapes, "lr": arguments.rates}}
    raw |= {"teachers": {}, "students": {"sweep": {"tokens": arguments.tokens, "grid": grid}}}
    study = validate(StudyConfig, raw, "sweep")
    store = build_store(study.corpus, arguments.output / "data")
    stores = Stores(store, dict.fromkeys(study.domains, store), {}, {})
    nodes = bind(expand(study), stores, arguments.output / "runs", open_store(store).vocab_size)
    return [_in_domain_only(node) for node in nodes]


def _in_domain_only(node: Node) -> Node:
    """The same run, scored on the held-out speeches alone; what is scored is no part of a run's id."""
    evals = node.config.eval.model_copy(update={"domains": node.config.eval.domains[:1]})
    return replace(node, config=node.config.model_copy(update={"eval": evals}))


def main() -> None:
    """Run the sweep and print its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("lr-sweep"))
    parser.add_argument("--tokens", default="1.5M")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    arguments = parser.parse_args()
    nodes = sweep(arguments)
    engine = LocalEngine(default_workers(), [])
    with engine, Leases(arguments.output) as leases, RichProgress() as progress:
        run_all(nodes, engine, leases, Failures(arguments.output, 1), progress)
    print(f"{arguments.tokens} tokens, {arguments.seeds} seeds, validation bits per byte")
    for name in arguments.shapes:
        results = {}
        for rate in arguments.rates:
            cell = [node for node in nodes if node.cell.shape == name and node.config.optim.lr == rate]
            found = [score(arguments.output / "runs" / node.id) for node in cell]
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
