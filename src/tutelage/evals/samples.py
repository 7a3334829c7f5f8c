"""Let models write: from held-out text, for people to read, and from prompts that somebody gives."""

from __future__ import annotations

import contextlib
import itertools
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GenerationConfig

from tutelage.checksums import checked_write
from tutelage.errors import UserError, one_line, shown
from tutelage.evals.evaluated_model import check_tokenizer, load_evaluated, padded_ids
from tutelage.evals.lm_eval_prompts import chosen_template
from tutelage.evals.score_files import version_of
from tutelage.models.export import all_ends
from tutelage.models.hub import pick_device
from tutelage.progress import NullProgress, staged
from tutelage.records import UnreadableError, read_sealed, write_sealed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from transformers import PreTrainedModel

    from tutelage.data.store import Store
    from tutelage.data.tokenizer import TextTokenizer
    from tutelage.evals.evaluated_model import EvaluatedModel
    from tutelage.progress import Progress

_PROMPTS, _DRAWS = 4, 2
_SEEDS = "by prompt"
_PROMPT_TOKENS, _NEW_TOKENS = 48, 64
_SHOWN_PROMPT = 60


@dataclass(frozen=True, slots=True)
class Sampling:
    """How models go on from prompts.

    Attributes:
        tokens: to write at most; fewer where a model's context or an end of text comes first.
        temperature: divides the logits; 0 takes the most probable token each time.
        top_p: draw among the fewest most probable tokens whose probabilities reach this (arXiv 1904.09751).
        draws: continuations of each prompt.
        seed: of the first draw; every draw of every prompt has one of its own, the same for all models.
        chat: put each prompt into the model's chat template, as a user's turn.
    """

    tokens: int = _NEW_TOKENS
    temperature: float = 1.0
    top_p: float = 1.0
    draws: int = 1
    seed: int = 0
    chat: bool = False


@dataclass(frozen=True, slots=True)
class Continuation:
    """What a model writes after a prompt.

    Attributes:
        model: its id.
        prompt: the prompt as it was given.
        seed: of the draw; None: the most probable tokens.
        text: what it wrote, with the token that ends it if it ended.
        at_context: whether it stopped where the sequences end that the model was trained on.
    """

    model: str
    prompt: str
    seed: int | None
    text: str
    at_context: bool


def sample(
    models: Sequence[EvaluatedModel],
    prompts: Sequence[str],
    sampling: Sampling,
    device: str = "auto",
    progress: Progress | None = None,
) -> list[Continuation]:
    """Let models go on from prompts, which begin a document as training does; nothing is written to disk.

    Args:
        models: in turn; one is in memory at a time.
        prompts: texts. Special tokens that they spell are letters; in a chat template they are meant.
        sampling: how.
        device: auto, cpu, cuda or mps.
        progress: told of every continuation; None shows nothing.

    Returns:
        The continuations, by model, prompt and draw.

    Raises:
        UserError: a prompt has no tokens, or leaves no room in a model's context; a model has no chat
            template, or it refuses a prompt; draws without chance. Before any model is loaded.
    """
    if sampling.draws > 1 and not sampling.temperature:
        raise UserError(f"--draws {sampling.draws}: at --temperature 0 all are the same; draw once")
    chosen, progress = pick_device(device), progress or NullProgress()
    asked = [_given(one, prompts, chat=sampling.chat) for one in models]
    found = []
    for evaluated, (tokenizer, given) in zip(models, asked, strict=True):
        model = load_evaluated(evaluated, chosen, progress)
        ends = all_ends(model.generation_config.eos_token_id, tokenizer.eos_id)
        model.generation_config = GenerationConfig()  # a directory's own may penalise what was said before
        fixed: dict[str, Any] = {
            "suppress_tokens": padded_ids(model, tokenizer.vocab_size),
            "eos_token_id": ends,
        }
        if sampling.temperature:
            fixed |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
        decoder = Tokenizer.from_str(tokenizer.json)
        seeds = iter(range(sampling.seed, sampling.seed + len(prompts) * sampling.draws))
        stage = f"{evaluated.id}: continuations", len(prompts) * sampling.draws, "continuations"
        with staged(progress, *stage) as told:
            for prompt, ids in zip(prompts, given, strict=True):
                new = min(sampling.tokens, evaluated.context - len(ids))
                for seed in itertools.islice(seeds, sampling.draws):
                    drawn = seed if sampling.temperature else None
                    written = _written(model, ids, new, drawn, fixed, told)
                    cut = len(written) == new < sampling.tokens and written[-1] not in ends
                    text = _text(decoder, ids, written)
                    found.append(Continuation(evaluated.id, prompt, drawn, text, cut))
    return found


def _given(
    evaluated: EvaluatedModel, prompts: Sequence[str], *, chat: bool
) -> tuple[TextTokenizer, list[list[int]]]:
    """A model's tokenizer, and the ids of every prompt with what stands in front of it."""
    tokenizer = check_tokenizer(evaluated)
    if chat:
        given = _asked(evaluated, prompts)
    else:
        given = [np.frombuffer(ids, tokenizer.dtype).tolist() for ids in tokenizer.encoder()(prompts)]
    begin = [*tokenizer.begin_ids]
    given = [ids if begin == ids[: len(begin)] else begin + ids for ids in given]  # templates may write it
    for prompt, ids in zip(prompts, given, strict=True):
        if not ids:
            raise UserError(f"--prompt {shown(prompt, _SHOWN_PROMPT)}: no tokens; give some text")
        if len(ids) >= evaluated.context:
            raise UserError(
                f"--prompt {shown(prompt, _SHOWN_PROMPT)}: {len(ids)} tokens, and {evaluated.id} was trained "
                f"on sequences of {evaluated.context}, so there is no room to go on; shorten it"
            )
    return tokenizer, given


def _asked(evaluated: EvaluatedModel, prompts: Sequence[str]) -> list[list[int]]:
    """The ids of users' turns and of what begins the answers to them."""
    tokenizer = AutoTokenizer.from_pretrained(evaluated.model, trust_remote_code=False)
    tokenizer.chat_template = chosen_template(tokenizer.chat_template, None, evaluated.model)
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    try:
        ids: list[list[int]] = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_dict=False
        )
    except Exception as error:  # noqa: BLE001 - a template is a program, which can fail in any way
        raise UserError(f"{evaluated.id}: its chat template refuses a prompt ({one_line(error)})") from None
    return ids


def _text(decoder: Tokenizer, given: list[int], written: list[int]) -> str:
    """The text of what was written: what it adds to that of the prompt, with the space between them."""
    before, text = (decoder.decode(ids, skip_special_tokens=False) for ids in (given, given + written))
    if text.startswith(before):
        return text.removeprefix(before)
    return decoder.decode(written, skip_special_tokens=False)


def write_samples(
    model: PreTrainedModel, store: Store, evaluated: EvaluatedModel, progress: Progress
) -> None:
    """Write `samples.json` and `samples.md`: prompts, the text's own, greedy and drawn continuations.

    Drawn continuations are seeded, at temperature 1 from the whole distribution over the tokenizer's ids. A
    prompt follows the ids that begin a document. Files of the same model, text and settings are kept.

    Args:
        model: the loaded model of `evaluated`.
        store: its test split gives the prompts; made with the model's tokenizer.
        evaluated: the model and its output directory.
        progress: told of every continuation.
    """
    room = evaluated.context - len(store.begin_ids)
    prompt = min(_PROMPT_TOKENS, room // 2)
    new = min(_NEW_TOKENS, room - prompt)
    version = version_of(
        [store.fingerprint, evaluated.id, evaluated.step, prompt, new, _PROMPTS, _DRAWS, _SEEDS]
    )
    path = evaluated.output / "samples.json"
    with contextlib.suppress(UnreadableError):  # written again
        if read_sealed(path).get("version") == version:
            return
    tokenizer = store.tokenizer()
    model.generation_config = GenerationConfig()  # a directory's own may penalise what was said before
    fixed = {"suppress_tokens": padded_ids(model, store.vocab_size), "eos_token_id": store.eos_id}
    samples, excerpts = [], _excerpts(store, prompt + new)
    count = len(excerpts) * (1 + _DRAWS)
    with staged(progress, f"{evaluated.id}: samples", count, "continuations") as told:
        for number, tokens_N in enumerate(excerpts):
            given = [*store.begin_ids, *tokens_N[:prompt]]
            seeds = [None, *range(number * _DRAWS, (number + 1) * _DRAWS)]
            written = [_written(model, given, new, seed, fixed, told) for seed in seeds]
            texts = [
                tokenizer.decode(list(part), skip_special_tokens=False)
                for part in (tokens_N[:prompt], tokens_N[prompt:], *written)
            ]
            samples.append({"prompt": texts[0], "text": texts[1], "greedy": texts[2], "drawn": texts[3:]})
    title = f"{evaluated.id}, step {evaluated.step}"
    with checked_write(evaluated.samples) as partial:
        partial.write_text(_page(title, samples), encoding="utf-8")
    write_sealed(
        path, {"version": version, "model": evaluated.id, "step": evaluated.step, "samples": samples}
    )


def _excerpts(store: Store, length: int) -> list[list[int]]:
    """The middles of the first test documents that are long enough; beginnings are often alike."""
    view = store.split("test")
    bounds = itertools.pairwise(view.offsets[:, 0].astype(np.int64).tolist())
    starts = [(start + end - length) // 2 for start, end in bounds if end - start > length]
    return [view.tokens[start : start + length].tolist() for start in starts[:_PROMPTS]]


def _written(
    model: PreTrainedModel,
    given: list[int],
    new: int,
    seed: int | None,
    fixed: Mapping[str, Any],
    progress: Callable[[int], None],
) -> list[int]:
    """Ids that a model writes, drawn with a seed or the most probable.

    The global random state does not change. No two draws share a seed: a small model, which hardly looks at
    its prompt, would go on from every prompt alike.
    """
    tokens_BT = torch.tensor([given], device=model.device)
    settings: dict[str, Any] = {"do_sample": False} if seed is None else {"do_sample": True, "top_k": 0}
    ends = fixed["eos_token_id"]
    settings |= {"pad_token_id": ends if isinstance(ends, int) else ends[0], "max_new_tokens": new}
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed or 0)
        found_BT = model.generate(tokens_BT, attention_mask=torch.ones_like(tokens_BT), **settings, **fixed)
    progress(1)
    ids: list[int] = found_BT[0, len(given) :].tolist()
    return ids


def _page(title: str, samples: list[dict[str, Any]]) -> str:
    """The page in Markdown; texts are indented, so that nothing in them is read as markup."""
    parts = [f"# Samples of {title}"]
    for number, sample in enumerate(samples):
        kinds = {"Prompt": "prompt", "The text itself": "text", "Greedy": "greedy"}
        named = [(name, sample[kind]) for name, kind in kinds.items()]
        named += [(f"Drawn, seed {seed}", text) for seed, text in enumerate(sample["drawn"], number * _DRAWS)]
        parts.append(f"## {number + 1}")
        parts += [f"{name}:\n\n{textwrap.indent(text, '    ', lambda _: True)}" for name, text in named]
    return "\n\n".join(parts) + "\n"
