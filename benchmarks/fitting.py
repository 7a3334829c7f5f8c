"""How far does a fitted score depend on the text of the fit?

For each text: a temperature fitted on about so many tokens of the validation split, what the test split's
bits per byte are off by against a fit on all of them, the error that `tutelage eval` would state, and the
root mean square of fits on resampled validation documents.

    python benchmarks/fitting.py runs/RUN --domains kjv shakespeare wikipedia sotu
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
from scipy.interpolate import CubicSpline

from tutelage.evals.calibration import POWERS, CalibrationFit, fit, own_unigram
from tutelage.evals.domains import SUITES, domain_store, find_domain
from tutelage.evals.evaluated_model import find_model
from tutelage.evals.token_scores import TokenScores, score_tokens
from tutelage.evals.windows import read_documents
from tutelage.models.hub import load

SIZES = (4096, 32_768)
DRAWS = 24


def fitted(tokens: TokenScores, unigram_N: np.ndarray, chosen: np.ndarray) -> CalibrationFit:
    """The fit on some tokens."""
    return fit(tokens.powered_MK[chosen], unigram_N[chosen], tokens.document_N[chosen])


def main() -> None:
    """Score both splits at all powers once, then fit again and again."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--domains", nargs="+", default=["kjv", "shakespeare", "wikipedia", "sotu"])
    parser.add_argument("--output", type=Path, default=Path("evals"))
    arguments = parser.parse_args()
    evaluated = find_model(arguments.model, arguments.output)
    model = load(evaluated.model)
    random = np.random.default_rng(0)
    print("text, documents: tokens of the fit, off, stated, bootstrap (bits per byte, one temperature)")
    for name in arguments.domains:
        store = domain_store(name, find_domain(name), evaluated.model, arguments.output / "stores")
        splits = {}
        for split in ("validation", "test"):
            documents = read_documents(store, split, SUITES.max_documents, SUITES.max_tokens)
            scored = score_tokens(model, documents, store.vocab_size, evaluated.context, powers=POWERS)
            splits[split] = documents, scored
        _, tokens = splits["validation"]
        documents, test = splits["test"]
        per_byte = 1 / math.log(2) / sum(document.size for document in documents)
        spline = CubicSpline(np.log(POWERS), test.powered_MK.astype(np.float64), axis=1)

        def bits(found: CalibrationFit, curve: CubicSpline = spline, scale: float = per_byte) -> float:
            return -float(curve(-math.log(found.temperature)).sum()) * scale

        unigram_N = own_unigram(tokens.document_N, tokens.label_N, store.vocab_size)
        everything = np.arange(len(unigram_N))
        best = bits(fitted(tokens, unigram_N, everything))
        place_N = np.argsort(np.argsort(tokens.document_N, kind="stable"), kind="stable")
        members = [np.flatnonzero(tokens.document_N == d) for d in range(tokens.document_N.max() + 1)]
        for size in SIZES:
            every = max(1, len(everything) // size)
            some = everything[place_N % every == 0]
            found = fitted(tokens, unigram_N, some)
            stated = found.alone_noise.nats(len(documents)) * len(test.label_N) * per_byte
            drawn = [random.integers(0, len(members), len(members)) for _ in range(DRAWS)]
            kept = np.zeros(len(everything), bool)
            kept[some] = True
            resampled = [np.concatenate([members[d][kept[members[d]]] for d in draw]) for draw in drawn]
            again = [bits(fitted(tokens, unigram_N, chosen)) for chosen in resampled]
            spread = math.sqrt(float(np.mean((np.array(again) - best) ** 2)))
            off = bits(found) - best
            print(f"{name}, {len(members)}: {len(some):,}, {off:+.5f}, {stated:.5f}, {spread:.5f}")


if __name__ == "__main__":
    main()
