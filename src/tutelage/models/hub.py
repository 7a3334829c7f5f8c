"""Build, load, save and take apart models in Hugging Face format.

A directory holds config.json, *.safetensors and the tokenizer, so everything that reads Hugging Face
models reads ours. No pickled weights are read and no code from a model directory is run.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import hf_hub_download
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging

from tutelage.checksums import CARD, write_checksums
from tutelage.errors import UserError, one_line
from tutelage.files import atomic_directory
from tutelage.hub_access import checked_snapshot, reading_hub
from tutelage.models.directory import check_config, computing, is_local
from tutelage.models.export import Base, check_tokenizer_files, complete
from tutelage.models.packed import body_of, trained_length
from tutelage.models.weight_names import check_names, check_tied, not_finite
from tutelage.objective.products import dense_logits, weight_and_bias
from tutelage.processes import cores
from tutelage.records import read_object
from tutelage.types import DenseTargets, LogitTransform, transformed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from torch import Tensor
    from transformers import PreTrainedModel

    from tutelage.models.shapes import ModelShape

_FACTORS = ("logit_scale", "lm_head_multiplier")  # Cohere; Falcon-H1
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")  # Granite; Inkling
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Gemma 2; RecurrentGemma; xLSTM
"""Config fields of what a family does to its logits after the head; absent, None or 1 means nothing."""

_COMPARED = 64
"""Tokens on which a written directory is compared with the model."""

_TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest logit, that rounding explains."""


def build(
    shape: ModelShape,
    vocab_size: int,
    context: int,
    seed: int,
    device: str = "cpu",
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Build a model with random float32 weights, which depend on `seed` and not on the device.

    Weights are drawn on the CPU (normal, standard deviation 0.02) and then moved. The global random
    state is left as it was. On device "meta" there are shapes and no weights.

    Raises:
        UserError: attention cannot be computed as asked for.
    """
    config = shape.config(vocab_size, context)
    meta = device == "meta"
    with torch.random.fork_rng(devices=[]), torch.device("meta" if meta else "cpu"):
        torch.default_generator.manual_seed(seed)
        with errors_of_loading(f"model.shape = {shape.name}", attn_implementation):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation=attn_implementation or "sdpa"
            )
    return model if meta else model.to(device)


def load(
    path_or_hub_name: str | Path,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Load a causal language model from a directory or the Hugging Face Hub, on the CPU, in eval mode.

    Args:
        path_or_hub_name: a directory is preferred to a Hub name that is spelled the same.
        revision: commit or tag on the Hub.
        dtype: of the weights; None keeps what was saved.
        attn_implementation: how attention is computed; None leaves the choice to transformers.

    Raises:
        UserError: nothing is there, it is no model, weights are pickled, damaged, incomplete or not finite,
            the Hub cannot be reached, or the logits are not a plain linear head of the hidden states.
    """
    name = str(path_or_hub_name)
    local = is_local(path_or_hub_name)
    chosen = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    access = contextlib.nullcontext() if local else reading_hub(f"model {name}", explains=False)
    with errors_of_loading(name, attn_implementation), access:
        snapshot = None
        if not local:
            file = Path(hf_hub_download(name, "config.json", revision=revision))
            check_config(read_object(file), f"{name}: config.json")
            snapshot = file.parent
        with _quietly(bars=not local), checked_snapshot(name, snapshot):
            model, report = AutoModelForCausalLM.from_pretrained(
                name,
                revision=revision or "main",
                dtype=dtype or "auto",
                use_safetensors=True,
                trust_remote_code=False,
                return_dict=True,
                output_loading_info=True,
                **chosen,
            )
    check_names(model, report["missing_keys"], report["unexpected_keys"], name)
    check_tied(model, name)
    for key, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise UserError(not_finite(name, key))
    check_logits(model, name)
    return model


def outline(path_or_hub_name: str, settings: dict[str, Any]) -> PreTrainedModel:
    """Make a model without weights, on the meta device, from its config.json, which is not read again.

    Args:
        path_or_hub_name: as in `load`; begins messages.
        settings: content of its config.json.

    Raises:
        UserError: it describes no causal language model whose head is a matrix and a bias.
    """
    check_config(settings, f"{path_or_hub_name}: config.json")
    with errors_of_loading(path_or_hub_name, None), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    body_and_head(model)
    return model


@contextlib.contextmanager
def errors_of_loading(name: str, attn_implementation: str | None) -> Iterator[None]:
    """Say in one line why transformers cannot load the model called `name` with attention as asked for.

    Raises:
        UserError: whatever the reason is.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - a wrong field of a config can raise anything
        told = error.__cause__ if isinstance(error, OSError) else None  # it blames names for a cut download
        reason = one_line(told if isinstance(told, Exception) else error)
        if attn_implementation is not None and "attention" in reason.lower():
            raise UserError(
                f"{name}: attn_implementation = {attn_implementation}: {reason.split('. ')[0].rstrip('.')}; "
                "remove the setting, and transformers chooses what the family has"
            ) from None
        if "trust_remote_code" in str(error):
            reason = "it needs code of its own, which tutelage does not run"
        elif "ignore_mismatched_sizes" in str(error):
            reason = (
                "weights in its files have other shapes than the sizes in config.json (vocab_size, ...) make"
            )
        elif "Unrecognized configuration class" in str(error):
            reason = (
                "transformers knows its model_type, but not as a model of text that is read left to right"
            )
        raise UserError(f"{name}: cannot be loaded as a causal language model: {reason}") from None


@contextlib.contextmanager
def _quietly(*, bars: bool) -> Iterator[None]:
    """Hide the reports of transformers (our checks say what matters) and its bars, but for downloads."""
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.set_verbosity_error()
    if not bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def pick_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" is the first available of cuda, mps, cpu.

    Torch is left no more threads than this process has cores: it does not know of a container's quota.

    Raises:
        UserError: torch does not see it.
    """
    if torch.get_num_threads() > cores():
        torch.set_num_threads(cores())
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available.get(name, False):
        raise UserError(f"device = {name}: torch sees no such device here; use 'auto' or 'cpu'")
    return torch.device(name)


def body_and_head(model: PreTrainedModel) -> tuple[PreTrainedModel, nn.Linear]:
    """Split a model: the body gives `last_hidden_state` (B, T, D), the head maps it to logits (B, T, V).

    `logit_transform` returns what the family applies to its logits after the head.

    Raises:
        UserError: the head is more than a matrix and a bias, which losses per chunk rely on.
    """
    head = model.get_output_embeddings()
    try:
        weight_and_bias(head)
    except ValueError as error:
        raise UserError(f"{type(model).__name__}: it cannot teach or learn here: {error}") from None
    return body_of(model), head


def head_logits(
    head: nn.Linear, hidden_ND: Tensor, transform: LogitTransform, vocab_size: int | None = None
) -> Tensor:
    """Compute a model's logits [N, V] from hidden states, without rows from `vocab_size` on.

    They are float32, or wider, and never rounded to the weights' half precision: two likely tokens would tie,
    and models that nearly agree would differ by the rounding.
    """
    weight_VD, bias_V = weight_and_bias(head)
    return dense_logits(DenseTargets(hidden_ND, weight_VD, transform, bias_V), slice(None), vocab_size)


def logit_transform(model: PreTrainedModel) -> LogitTransform:
    """Read scale and softcap of the logits from a model's config.

    Raises:
        UserError: they are no finite numbers above 0.
    """
    settings, scale = model.config.to_dict(), 1.0
    try:
        for field in _FACTORS:
            scale *= settings.get(field) or 1.0
        for field in _DIVISORS:
            scale /= settings.get(field) or 1.0
        if base := settings.get("dim_model_base"):  # MiniCPM 3
            scale *= base / settings["hidden_size"]
        caps = [settings[field] for field in _SOFTCAPS if settings.get(field)]
        return LogitTransform(scale, caps[0] if caps else None)
    except (TypeError, ValueError) as error:
        raise UserError(f"config.json of a {type(model).__name__}: {error}") from None


@torch.no_grad()
def check_logits(model: PreTrainedModel, name: str) -> None:
    """Run four tokens: an unknown config field must not give silently wrong probabilities.

    The head over the hidden states must give the model's own logits, and a token must not see the next. Where
    processes share the weights, all of them call this within a call of the sharded root.

    Raises:
        UserError: they are not, or the model needs more than tokens; begins with `name`.
    """
    family = type(model).__name__
    try:
        (body, head), transform = body_and_head(model), logit_transform(model)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    rows = head.weight.shape[0]
    # From the middle, because families treat ids at both ends differently, such as that of padding.
    tokens_BT = (torch.arange(4, device=head.weight.device) + rows // 2).unsqueeze(0) % rows
    other_BT = torch.cat([tokens_BT[:, :-1], tokens_BT[:, :1]], 1)
    try:
        hidden_BTD = body(input_ids=tokens_BT, use_cache=False).last_hidden_state
        theirs = model(input_ids=tokens_BT, use_cache=False).logits
        change_BTD = body(input_ids=other_BT, use_cache=False).last_hidden_state - hidden_BTD
    except Exception as error:  # noqa: BLE001 - what a family needs besides tokens shows in any way
        reason = one_line(error)
        raise UserError(f"{name}: {family} cannot be run on tokens alone: {reason}") from None
    known = hidden_BTD.shape[-1] == head.weight.shape[1]
    if known:
        logits = head(hidden_BTD.to(head.weight.dtype))
        ways = (logits, logits.float())  # a family scales and caps logits in half precision, or in float32
        ours = [transformed(way, transform).float() for way in ways]
        known = any(x.shape == theirs.shape and torch.allclose(x, theirs.float(), 1e-3, 1e-5) for x in ours)
    if not known:
        raise UserError(f"{name}: {family} computes its logits in a way not known here")
    rounding = 1e-5 if hidden_BTD.dtype.itemsize > 2 else 1e-2  # noqa: PLR2004 - bytes of half precision
    if change_BTD[:, :-1].float().norm() > rounding * hidden_BTD.float().norm():
        raise UserError(f"{name}: {family} lets tokens see later ones, so it is no causal language model")


def save(
    model: PreTrainedModel,
    directory: Path,
    store: Path,
    base: Base | None = None,
    card: str | None = None,
) -> float:
    """Write a model directory atomically, and read it back to check that it is the same model.

    It holds config.json, generation_config.json, model.safetensors and the tokenizer's files.

    Args:
        model: what to save, in the dtype it has.
        directory: appears when complete; an older one is replaced.
        store: token store (or model directory) with the tokenizer that the model was trained with.
        base: directory of the model it was initialised from.
        card: content of README.md.

    Returns:
        The largest difference between the logits of the directory and those of `model`, on 64 tokens.

    Raises:
        UserError: a tokenizer file is missing, the directory cannot be written, or what was written has
            another weight or computes other logits.
    """
    check_tokenizer_files(store)
    with atomic_directory(directory) as partial:
        own, model.generation_config = model.generation_config, GenerationConfig()  # a wrong one is refused
        try:
            with _quietly(bars=False):
                model.save_pretrained(partial)
        finally:
            model.generation_config = own
        rows = model.get_output_embeddings().weight.shape[0]
        complete(partial, store, base, trained_length(model.config), rows)
        if card is not None:
            (partial / CARD).write_text(card, encoding="utf-8")
        write_checksums(partial)
        return _difference(model, partial, directory)


@torch.no_grad()
def _difference(model: PreTrainedModel, written: Path, directory: Path) -> float:
    """Compare all weights with those written, to the bit; return the largest difference of logits."""
    try:
        again = load(written, attn_implementation=model.config._attn_implementation).to(model.device)  # noqa: SLF001
    except UserError as error:
        raise UserError(str(error).replace(str(written), f"{directory} (as it would be written)")) from None
    if (name := _changed_weight(model, again)) is not None:
        raise UserError(f"{directory}: what was written is not the model in memory: {name} has changed")
    length = min(_COMPARED, trained_length(model.config) or _COMPARED)
    rows = again.get_input_embeddings().num_embeddings
    tokens_BT = (torch.arange(length, device=model.device) * 7919).unsqueeze(0) % rows
    training = model.training
    logits = [each.eval()(input_ids=tokens_BT, use_cache=False).logits.float() for each in (model, again)]
    model.train(training)
    difference = float((logits[0] - logits[1]).abs().max())
    if not difference <= _TOLERANCE * max(1.0, float(logits[0].abs().max())):
        raise UserError(
            f"{directory}: what was written computes other logits than the model in memory (difference "
            f"{difference:.3g}): {_cause(model, again)}"
        )
    return difference


def _changed_weight(model: PreTrainedModel, again: PreTrainedModel) -> str | None:
    """Name the first weight that writing and reading changed."""
    own, read = model.state_dict(), again.state_dict()
    changed = (name for name in own if name not in read or not torch.equal(own[name], read[name]))
    return next(changed, None)


def _cause(model: PreTrainedModel, again: PreTrainedModel) -> str:
    """Name the first config field that writing and reading changed."""
    own, read = computing(model.config.to_dict()), computing(again.config.to_dict())
    for field in own:
        if own[field] != read.get(field):
            return f"{field} is {own[field]!r} in the model and {read.get(field)!r} in config.json"
    return "weights and config are equal, so the family keeps something that is in neither"
