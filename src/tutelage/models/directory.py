"""Check the files of a Hugging Face model directory before a library reads them, and identify its weights.

No torch is imported.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutelage.checksums import refuse_damage
from tutelage.errors import UserError, check_visible
from tutelage.files import regular
from tutelage.hub_access import reading_hub
from tutelage.records import LARGEST_JSON, parse_json, read_object

if TYPE_CHECKING:
    from collections.abc import Iterator

_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "head_dim", "max_position_embeddings"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("n_embd", "n_layer", "n_head", "n_positions", "n_ctx"),
    *("n_layers", "n_heads", "d_model", "max_seq_len"),
    *("num_layers", "num_heads", "context_length", "state_size"),
)
"""Fields that count something, under the names of the families."""

_IMPLEMENTATIONS = tuple(
    f"{prefix}{what}_implementation{suffix}"
    for what in ("attn", "experts")
    for prefix in ("", "_")
    for suffix in ("", "_internal")
)
"""Fields that choose how transformers computes; a name with a slash makes it load a kernel from the Hub."""

_ADAPTER = "adapter_config.json"
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_NO_COMPUTATION = ("transformers_version", "_name_or_path", "use_cache", "torch_dtype", *_SPECIAL_IDS)
"""Config fields that do not change what a model computes from given ids."""

_ROPE_OF_OLD = ("rope_theta", "rope_scaling", "rope_local_base_freq", "rotary_emb_base", "rotary_pct")
_LENGTH_BYTES = 8


def check_directory(directory: Path) -> None:
    """Refuse a directory that cannot be a causal language model with plain weights, or has been damaged.

    Raises:
        UserError: naming the file, the field and its value.
    """
    refuse_damage(directory)
    config = read_config(directory)
    check_config(config, str(directory / "config.json"))
    tensors = sum(_header_entries(path) for path in weight_files(directory))
    for section in _sections(config):
        for field in _LAYERS:
            layers = section.get(field)
            if isinstance(layers, int) and layers > tensors:
                raise UserError(
                    f"{directory / 'config.json'}: {field} = {layers:,}, but the weights are {tensors:,} "
                    "tensors; every layer has at least one"
                )


def is_local(path_or_hub_name: str | Path) -> bool:
    """Whether a name is a local model directory; False if it can only be a Hub name."""
    name = str(path_or_hub_name)
    if Path(name).exists():
        check_directory(Path(name))
        return True
    check_visible(Path(name))
    if isinstance(path_or_hub_name, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{name}: no such directory")
    return False


def hub_commit(name: str, revision: str | None = None) -> str:
    """Resolve `revision` (default: the main branch) to a commit on the Hub.

    If the Hub cannot be reached, this is the commit that was downloaded before.

    Raises:
        UserError: there is no such model, or the Hub cannot be reached and nothing was downloaded before.
    """
    return _hub_config_file(name, revision).parent.name  # files lie in snapshots/<commit>/


def hub_config(name: str, revision: str | None = None) -> dict[str, Any]:
    """Read `config.json` of a model on the Hub; nothing else is downloaded.

    Raises:
        UserError: as `hub_commit`, or it holds no JSON object.
    """
    return read_object(_hub_config_file(name, revision))


def _hub_config_file(name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download  # noqa: PLC0415 - only for models on the Hub
    from huggingface_hub.errors import EntryNotFoundError  # noqa: PLC0415 - as above

    with reading_hub(f"model {name}"):
        with contextlib.suppress(EntryNotFoundError):  # as it should be; or there is no Hub to ask
            hf_hub_download(name, _ADAPTER, revision=revision)
            raise _adapted(name)
        return Path(hf_hub_download(name, "config.json", revision=revision))


def _adapted(name: str) -> UserError:
    """What to say of an adapter, and of a model with one beside it: where PEFT is installed it is added."""
    return UserError(
        f"{name}: {_ADAPTER}: it is an adapter: merge it into its model (PEFT's merge_and_unload) and save "
        "the whole, or, to use the model without it, remove the file"
    )


def read_config(directory: Path) -> dict[str, Any]:
    """Read `config.json` of a model directory.

    Raises:
        UserError: it is missing or holds no JSON object, or the directory holds an adapter.
    """
    path = directory / "config.json"
    if (directory / _ADAPTER).is_file():
        raise _adapted(str(directory))
    if not path.is_file():
        instead = ""
        if (directory / "model" / "config.json").is_file():
            instead = f"; it is a run, whose model is {directory / 'model'}"
        raise UserError(f"{directory}: no config.json, so this is no Hugging Face model directory{instead}")
    return read_object(path)


def check_config(config: dict[str, Any], where: str) -> None:
    """Check the fields of a config.json that every family shares; `where` begins the message.

    Raises:
        UserError: a size is no positive integer, the weights are quantized, attention or experts are to be
            computed by code on the Hub, or the model is an encoder-decoder.
    """
    for section in _sections(config):
        for field in _SIZES:
            value = section.get(field)
            if value is None or isinstance(value, list):  # a list has one size per layer
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"{where}: {field} = {value!r}: must be an integer of at least 1")
        if (quantization := section.get("quantization_config")) is not None:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            raise UserError(
                f"{where}: quantization_config.quant_method = {method!r}: quantized weights cannot be used "
                "here; give a model whose weights are plain floating-point numbers"
            )
    for field in _IMPLEMENTATIONS:
        for value in _values_of(config, field):
            if "/" in json.dumps(value):
                raise UserError(
                    f"{where}: {field} = {value!r}: names code on the Hub, which is never run; remove it"
                )
    if config.get("is_encoder_decoder") is True:
        raise UserError(f"{where}: is_encoder_decoder = true: it is no causal language model")


def _values_of(part: object, field: str) -> Iterator[object]:
    """The values of `field` in a config and in all its sections."""
    if isinstance(part, dict):
        if field in part:
            yield part[field]
        for inner in part.values():
            yield from _values_of(inner, field)


def _sections(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the config and, of a multimodal model, its section about text."""
    text = config.get("text_config")
    return [config, text] if isinstance(text, dict) else [config]


def weight_files(directory: Path) -> list[Path]:
    """List the files with the weights of a directory, as transformers does: one, or those its index names.

    Raises:
        UserError: there are none, or the index names one that is not there.
    """
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        return _indexed(index)
    if any(directory.glob("pytorch_model*.bin")):
        raise UserError(
            f"{directory}: pytorch_model.bin is a pickle, which can run code; if you trust it, convert it: "
            "AutoModelForCausalLM.from_pretrained(path, use_safetensors=False).save_pretrained(new_path)"
        )
    raise UserError(f"{directory}: no model.safetensors, and no index of several, so no weights to load")


def _indexed(index: Path) -> list[Path]:
    content = read_object(index)
    places = content.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{index}: weight_map is missing or empty, so no weights are named")
    for name, file in places.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{index}: weight_map.{name} = {file!r}: must be a file in the same directory")
        if not (index.parent / file).is_file():
            raise UserError(f"{index}: weight_map.{name} = {file!r}: there is no such file")
    if not isinstance(content.get("metadata"), dict):
        raise UserError(
            f"{index}: metadata is missing, and transformers asks for it; an empty one, {{}}, will do"
        )
    return [index.parent / file for file in sorted(set(places.values()))]


def _header_entries(path: Path) -> int:
    """Count the tensors of a safetensors file, and check its length against its header."""
    try:
        size = path.stat().st_size
        with open(path, "rb", opener=regular) as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES or length > min(LARGEST_JSON, size - _LENGTH_BYTES):
                raise UserError(f"{path}: damaged: {size:,} bytes are too few for its header")
            header = file.read(length)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        tensors = parse_json(header)
        tensors.pop("__metadata__", None)
        ends = [int(tensor["data_offsets"][1]) for tensor in tensors.values()]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise UserError(f"{path}: damaged: its header is no list of tensors") from None
    expected = _LENGTH_BYTES + length + max(ends, default=0)
    if size != expected:
        raise UserError(f"{path}: damaged: it has {size:,} bytes, its header says {expected:,}")
    return len(ends)


def identify(path_or_hub_name: str, revision: str | None = None) -> tuple[str, str | None]:
    """Identify the weights of a model, and pin the revision to load.

    Returns:
        The `weights_fingerprint` of a directory; for a Hub name, "name@commit" and the commit that
        `revision` (default: the main branch) stands for now, or stood for when it was downloaded.

    Raises:
        UserError: nothing is there, or the Hub cannot be reached and nothing was downloaded before.
    """
    if is_local(path_or_hub_name):
        return weights_fingerprint(Path(path_or_hub_name)), None
    commit = hub_commit(path_or_hub_name, revision)
    return f"{path_or_hub_name}@{commit}", commit


def weights_fingerprint(directory: Path) -> str:
    """Return the SHA-256, in hexadecimal, of the weights and the computing config fields of a directory.

    Two directories with the same fingerprint compute the same function. Tokenizer files, and config
    fields that only record who wrote the file, do not count.

    Raises:
        UserError: the directory is no model directory.
    """
    check_directory(directory)
    config = read_config(directory)
    digest = hashlib.sha256(json.dumps(computing(config), sort_keys=True).encode())
    for path in sorted(directory.glob("*.safetensors")):
        with open(path, "rb", opener=regular) as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class ModelState:
    """Sizes, times and numbers of the files of a model: the same as long as nobody writes them."""

    directory: Path
    files: tuple[tuple[str, int, int, int], ...]

    @classmethod
    def of(cls, directory: Path) -> ModelState:
        """Look at the files that `weights_fingerprint` reads."""
        paths = [directory / "config.json", *sorted(directory.glob("*.safetensors"))]
        found = [(path.name, path.stat()) for path in paths if path.exists()]
        files = ((name, now.st_size, now.st_mtime_ns, now.st_ino) for name, now in found)
        return cls(directory, tuple(files))

    @property
    def weight_bytes(self) -> int:
        """Bytes of the files of weights."""
        return sum(size for name, size, *_ in self.files if name.endswith(".safetensors"))

    def refuse_change(self) -> None:
        """Refuse a model that was written between being identified and being loaded.

        Raises:
            UserError: naming the directory.
        """
        if ModelState.of(self.directory) != self:
            raise UserError(
                f"{self.directory}: its files were changed while they were read; run the same command again "
                "when nobody writes there"
            )


def computing(config: dict[str, Any]) -> dict[str, Any]:
    """Select the fields of a config.json that change what a model computes.

    Special ids count as unset, and rotary positions count once, as `rope_parameters`.
    """
    left_out = set(_NO_COMPUTATION) | ({"num_experts"} if "num_local_experts" in config else set())
    if config.get("rope_parameters") is not None:
        left_out |= set(_ROPE_OF_OLD) | {"partial_rotary_factor"}
    fields = {name: value for name, value in config.items() if name not in left_out}
    if isinstance(text := config.get("text_config"), dict):
        fields["text_config"] = computing(text)
    return fields | dict.fromkeys(_SPECIAL_IDS)
