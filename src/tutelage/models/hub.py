"""Models as Hugging Face directories: build from a rung, load, save, and split at the hidden states.

A directory holds config.json, *.safetensors and the tokenizer, so everything that reads Hugging Face
models reads ours. No pickled weights are read and no code from a model directory is run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from tutelage.errors import UserError
from tutelage.files import new_directory
from tutelage.models.flops import Parameters
from tutelage.types import LogitTransform, transformed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from transformers import PreTrainedModel

    from tutelage.models.ladder import Rung

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

_FACTORS = ("logit_scale", "lm_head_multiplier")  # Cohere; Falcon-H1
_DIVISORS = ("logits_scaling",)  # Granite
_SOFTCAPS = (
    "final_logit_softcapping",
    "logits_soft_cap",
    "output_logit_soft_cap",
)  # Gemma 2; RecurrentGemma; xLSTM
"""Config fields of what a family does to its logits after the head; absent, None or 1 means nothing."""

_VOLATILE = ("transformers_version", "_name_or_path", "use_cache")
"""Config fields that do not change what a model computes."""


def build(rung: Rung, vocab_size: int, context: int, seed: int, device: str = "cpu") -> PreTrainedModel:
    """A model with fresh float32 weights, a function of `seed` alone and not of the device.

    Weights are drawn on the CPU (normal, standard deviation 0.02) and then moved. The global random
    state is left as it was. On device "meta" there are shapes and no weights.
    """
    config = rung.config(vocab_size, context)
    meta = device == "meta"
    with torch.random.fork_rng(devices=[]), torch.device("meta" if meta else "cpu"):
        torch.default_generator.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    return model if meta else model.to(device)


def load(
    path_or_hub_name: str | Path, revision: str | None = None, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """A causal language model from a local directory or the Hugging Face Hub, on the CPU, in eval mode.

    Args:
        path_or_hub_name: a directory is preferred to a Hub name that is spelled the same.
        revision: commit or tag on the Hub.
        dtype: of the weights; None keeps what was saved.

    Raises:
        UserError: nothing is there, it is no model, weights are pickled, damaged or incomplete, the
            Hub cannot be reached, or the logits are not a plain linear head of the hidden states.
    """
    name = str(path_or_hub_name)
    local = _is_local(path_or_hub_name)
    try:
        with _no_progress_bars() if local else contextlib.nullcontext():
            model, report = AutoModelForCausalLM.from_pretrained(
                name,
                revision=revision or "main",
                dtype=dtype or "auto",
                attn_implementation="sdpa",
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:400]
        if "trust_remote_code" in str(error):
            reason = "it needs code of its own, which tutelage does not run"
        raise UserError(f"{name}: cannot be loaded as a causal language model: {reason}") from None
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(f"{name}: {len(missing)} weights are missing, for example {missing[0]}")
    _check_logits(model, name)
    return model


def _is_local(path_or_hub_name: str | Path) -> bool:
    """Whether it is a model directory; False for what can only be a Hub name."""
    name = str(path_or_hub_name)
    if Path(name).exists():
        _check_directory(Path(name))
        return True
    if isinstance(path_or_hub_name, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{name}: no such directory")
    return False


def identify(path_or_hub_name: str, revision: str | None = None) -> tuple[str, str | None]:
    """What fixes the weights of a model, and the revision to load so that it stays so.

    Returns:
        The `weights_fingerprint` of a directory; for a Hub name, "name@commit" and the commit that
        `revision` (default: the main branch) stands for now, or stood for when it was downloaded.

    Raises:
        UserError: nothing is there, or the Hub cannot be reached and nothing was downloaded before.
    """
    if _is_local(path_or_hub_name):
        return weights_fingerprint(Path(path_or_hub_name)), None
    try:
        config = hf_hub_download(path_or_hub_name, "config.json", revision=revision)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:400]
        raise UserError(f"{path_or_hub_name}: not found on the Hub: {reason}") from None
    commit = Path(config).parent.name  # files lie in snapshots/<commit>/
    return f"{path_or_hub_name}@{commit}", commit


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Local files are quick, and a bar per file would tear the caller's own display."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _check_directory(directory: Path) -> None:
    """Say what is wrong with a local model directory before transformers does, at length."""
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory}: no config.json, so this is no Hugging Face model directory")
    if any(directory.glob("*.safetensors")):
        return
    if any(directory.glob("pytorch_model*.bin")):
        raise UserError(
            f"{directory}: pytorch_model.bin is a pickle, which can run code; if you trust it, convert it: "
            "AutoModelForCausalLM.from_pretrained(path, use_safetensors=False).save_pretrained(new_path)"
        )
    raise UserError(f"{directory}: no *.safetensors, so there are no weights to load")


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the first of cuda, mps, cpu that is there.

    Raises:
        UserError: torch does not see it.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available.get(name, False):
        raise UserError(f"device = {name}: torch sees no such device here; use 'auto' or 'cpu'")
    return torch.device(name)


def body_and_head(model: PreTrainedModel) -> tuple[nn.Module, nn.Linear]:
    """Split a model: the body gives `last_hidden_state` (B, T, D), the head maps it to logits (B, T, V).

    What the family does to its logits after the head is `logit_transform`.

    Raises:
        UserError: the head is more than a matrix, which losses per chunk rely on.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or len(list(head.parameters())) != 1:
        raise UserError(
            f"{type(model).__name__}: the head is no linear layer without bias; it cannot teach or learn here"
        )
    return model.get_decoder(), head


def logit_transform(model: PreTrainedModel) -> LogitTransform:
    """The scale and softcap of the model's family, read from its config."""
    settings = model.config.to_dict()
    scale = 1.0
    for field in _FACTORS:
        scale *= settings.get(field) or 1.0
    for field in _DIVISORS:
        scale /= settings.get(field) or 1.0
    caps = [settings[field] for field in _SOFTCAPS if settings.get(field)]
    return LogitTransform(scale, caps[0] if caps else None)


@torch.no_grad()
def _check_logits(model: PreTrainedModel, name: str) -> None:
    """Run four tokens both ways: a field we do not know must not give silently wrong probabilities."""
    try:
        body, head = body_and_head(model)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    tokens_BT = torch.arange(4, device=head.weight.device).unsqueeze(0) % head.weight.shape[0]
    ours = transformed(
        head(body(input_ids=tokens_BT, use_cache=False).last_hidden_state), logit_transform(model)
    )
    theirs = model(input_ids=tokens_BT, use_cache=False).logits
    if ours.shape != theirs.shape or not torch.allclose(
        ours.float(), theirs.float(), rtol=1e-3, atol=1e-5, equal_nan=True
    ):
        raise UserError(f"{name}: {type(model).__name__} computes its logits in a way not known here")


def count_parameters(model: PreTrainedModel) -> Parameters:
    """Count the weights of any causal language model; what is shared counts once."""
    total = sum(weight.numel() for weight in model.parameters())
    embeddings: Iterable[nn.Module] = (model.get_input_embeddings(), model.get_output_embeddings())
    unique = {id(weight): weight.numel() for module in embeddings for weight in module.parameters()}
    return Parameters(total, total - sum(unique.values()))


def forward_flops(model: PreTrainedModel, context: int) -> float:
    """Operations of a forward pass per token, as `flops.forward_flops` counts them, for any model.

    Every matrix outside the input embedding is taken to multiply every token: of a mixture of experts
    that is too much. Attention is left out where the config does not name its heads.
    """
    head, lookup = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    matrices = sum(weight.numel() for weight in model.parameters() if weight.ndim > 1)
    used = int(matrices if head is lookup else matrices - lookup.numel())
    config = model.config
    try:
        heads, layers = int(config.num_attention_heads), int(config.num_hidden_layers)
    except AttributeError:
        return 2.0 * used
    head_dim = int(config.to_dict().get("head_dim") or config.hidden_size // heads)
    return 2.0 * used + 2.0 * context * heads * head_dim * layers


def save(model: PreTrainedModel, directory: Path, tokenizer_files_from: Path) -> None:
    """Write a model directory in one step: config.json, model.safetensors and the tokenizer's files.

    Args:
        model: what to save, in the dtype it has.
        directory: appears when complete; an older one is replaced.
        tokenizer_files_from: token store (or model directory) whose tokenizer the model was trained with.

    Raises:
        UserError: a tokenizer file is missing, or the directory cannot be written.
    """
    for name in TOKENIZER_FILES:
        if not (tokenizer_files_from / name).is_file():
            raise UserError(f"{tokenizer_files_from}: no {name}; without its tokenizer a model is of no use")
    with new_directory(directory) as partial:
        with _no_progress_bars():
            model.save_pretrained(partial)
        for name in TOKENIZER_FILES:
            shutil.copyfile(tokenizer_files_from / name, partial / name)


def weights_fingerprint(directory: Path) -> str:
    """SHA-256, in hexadecimal, over the weights and the shape in a model directory.

    Two directories with the same fingerprint compute the same function. Tokenizer files, and config
    fields that only record who wrote the file, do not count.

    Raises:
        UserError: the directory is no model directory.
    """
    _check_directory(directory)
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{directory / 'config.json'}: not valid JSON: {error}") from None
    shape = {field: value for field, value in config.items() if field not in _VOLATILE}
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True).encode())
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
