"""What a model writes after excerpts from held-out documents: a page for people, not a score."""

from __future__ import annotations

import itertools
import json
import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import Tokenizer

from tutelage.evals.records import version_of
from tutelage.files import write_json, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tutelage.data.store import Store
    from tutelage.evals.subject import Subject

_PROMPTS, _DRAWS = 4, 2
_PROMPT_TOKENS, _NEW_TOKENS = 48, 64


def write_samples(model: PreTrainedModel, store: Store, subject: Subject) -> None:
    """Write `samples.json` and `samples.md`: prompts, how the text goes on, greedy and drawn continuations.

    Drawn continuations are seeded, at temperature 1 from the whole distribution over the tokenizer's ids. In
    front of a prompt the model sees what begins a document. Files of the same model, text and settings are
    left as they are.

    Args:
        model: the loaded model of `subject`.
        store: its test split gives the prompts; made with the model's tokenizer.
        subject: whose output directory the files go to.
    """
    room = subject.context - len(store.begin_ids)
    prompt = min(_PROMPT_TOKENS, room // 2)
    new = min(_NEW_TOKENS, room - prompt)
    version = version_of([store.fingerprint, subject.id, subject.step, prompt, new, _PROMPTS, _DRAWS])
    path = subject.output / "samples.json"
    if path.exists() and json.loads(path.read_text(encoding="utf-8"))["version"] == version:
        return
    tokenizer = Tokenizer.from_file(str(store.path / "tokenizer.json"))
    samples = []
    for tokens_N in _excerpts(store, prompt + new):
        ids = [
            tokens_N[:prompt],
            tokens_N[prompt:],
            *_continuations(model, [*store.begin_ids, *tokens_N[:prompt]], new, store),
        ]
        texts = [tokenizer.decode(list(part), skip_special_tokens=False) for part in ids]
        samples.append({"prompt": texts[0], "text": texts[1], "greedy": texts[2], "drawn": texts[3:]})
    title = f"{subject.id}, step {subject.step}"
    write_text(subject.samples, _page(title, samples))
    write_json(path, {"version": version, "model": subject.id, "step": subject.step, "samples": samples})


def padded_ids(model: PreTrainedModel, vocab_size: int) -> list[int] | None:
    """Ids that the head has and the tokenizer has not, as generation wants them: None if there are none."""
    return [*range(vocab_size, model.get_output_embeddings().weight.shape[0])] or None


def _excerpts(store: Store, length: int) -> list[list[int]]:
    """The middle of the first test documents that are long enough; beginnings are often all alike."""
    view = store.split("test")
    bounds = itertools.pairwise(view.offsets[:, 0].astype(np.int64).tolist())
    starts = [(start + end - length) // 2 for start, end in bounds if end - start > length]
    return [view.tokens[start : start + length].tolist() for start in starts[:_PROMPTS]]


def _continuations(model: PreTrainedModel, prompt: list[int], new: int, store: Store) -> list[list[int]]:
    """Greedy, then drawn; the global random state is left as it was."""
    tokens_BT = torch.tensor([prompt], device=model.device)
    fixed: dict[str, Any] = {
        "attention_mask": torch.ones_like(tokens_BT),
        "max_new_tokens": new,
        "eos_token_id": store.eos_id,
        "pad_token_id": store.eos_id,
        "suppress_tokens": padded_ids(model, store.vocab_size),
    }
    devices = [model.device] if model.device.type == "cuda" else []
    found = [model.generate(tokens_BT, do_sample=False, **fixed)]
    with torch.random.fork_rng(devices):
        for draw in range(_DRAWS):
            torch.manual_seed(draw)
            found.append(
                model.generate(tokens_BT, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **fixed)
            )
    return [tokens_BT[0, len(prompt) :].tolist() for tokens_BT in found]


def _page(title: str, samples: list[dict[str, Any]]) -> str:
    """Markdown; texts are indented, so that nothing in them is taken for markup."""
    parts = [f"# Samples of {title}"]
    for number, sample in enumerate(samples, 1):
        named = [
            ("Prompt", sample["prompt"]),
            ("The text goes on", sample["text"]),
            ("Greedy", sample["greedy"]),
        ]
        named += [(f"Drawn, seed {seed}", text) for seed, text in enumerate(sample["drawn"])]
        parts.append(f"## {number}")
        parts += [f"{name}:\n\n{textwrap.indent(text, '    ', lambda _: True)}" for name, text in named]
    return "\n\n".join(parts) + "\n"
