"""Give every reader of the package hostile input, in one process with a bound on its memory.

`python fuzzed_input.py CASES [SEED]` tries about so many cases, without a seed the same ones each time, and
prints one line of JSON: cases of each family, refused ones, the growth of memory, and what fell over.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "COLUMNS": "120"}

import torch
from fuzz_case import Tried, hang, peak
from fuzz_models import models_of
from fuzz_records import manifests_of
from fuzz_rows import rows_of
from fuzz_settings import settings_of
from hypothesis import HealthCheck, Phase, seed, settings
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tutelage.config.data_config import StoreConfig, TokenizerConfig
from tutelage.config.teacher_config import TeachConfig
from tutelage.data.build import build_store
from tutelage.teachers.cache.cache_writer import write_cache

BYTES = 2**30


def prepare(folder: Path) -> None:
    """Make the intact store, cache, models and tokenizer that the cases spoil."""
    text = "\n\n".join(f"Paragraph {i} says that {i * i} is a square." for i in range(600))
    (folder / "words.txt").write_text(text)
    config = StoreConfig(
        name="s",
        sources=({"kind": "files", "paths": (str(folder / "words.txt"),)},),
        tokenizer=TokenizerConfig(vocab_size=300),
        validation=0.1,
        test=0.1,
    )
    build_store(config, folder / "made").rename(folder / "store")
    shutil.copytree(
        folder / "store",
        folder / "chat",
        ignore=shutil.ignore_patterns("*.bin*", "*.idx*", "*.bytes*", "manifest.json", "checksums.json"),
    )
    named = json.loads((folder / "chat" / "tokenizer_config.json").read_text())
    named["chat_template"] = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    (folder / "chat" / "tokenizer_config.json").write_text(json.dumps(named))
    teach = TeachConfig(store=folder / "store", teacher={"kind": "unigram"}, output=folder / "caches")
    write_cache(teach).rename(folder / "cache")
    sizes = {"vocab_size": 300, "bos_token_id": None, "eos_token_id": None}
    llama = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        **sizes,
    )
    LlamaForCausalLM(llama).save_pretrained(folder / "llama")
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32, **sizes)).save_pretrained(
        folder / "gpt2"
    )
    for name in ("llama", "gpt2"):
        shutil.copyfile(folder / "chat" / "tokenizer.json", folder / name / "tokenizer.json")


_SHARES = {
    "settings": 6,
    "yaml": 3,
    "overrides": 3,
    "rows": 3,
    "model configs": 2,
    "manifests of store": 2,
    "manifests of cache": 2,
}


def main(cases: int, number: int | None) -> None:
    """Try about `cases` cases and print what became of them."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGPROF, lambda *_: hang())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.chdir(folder)
        prepare(folder)
        tried = Tried(folder)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2 * BYTES, used + 2 * BYTES))
        families: dict[str, Any] = {}
        for make in (settings_of, rows_of, manifests_of, models_of):
            families |= make(tried)
        whole = sum(_SHARES.get(family, 1) for family in families)
        for family, test in families.items():
            many = -(-cases * _SHARES.get(family, 1) // whole)
            limits = settings(
                max_examples=many,
                deadline=None,
                derandomize=number is None,
                database=None,
                phases=[Phase.explicit, Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            limits(test if number is None else seed(number)(test))()
        grown = peak() - tried.began
    print(
        json.dumps(
            {"cases": tried.cases, "refused": tried.refused, "grown": grown, "failures": tried.failures}
        )
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
