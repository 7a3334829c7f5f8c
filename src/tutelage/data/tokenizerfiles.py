"""Where a tokenizer's files lie, on this machine or on the Hugging Face Hub, and its tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from tutelage.errors import UserError, one_line
from tutelage.types import TOKENIZER_FILES

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_WITHOUT_JSON = (("vocab.json", "merges.txt"), ("vocab.txt",), ("tokenizer.model",), ("spiece.model",))
"""Files that together are a tokenizer of an older kind, which transformers can convert."""

_SPECIAL = ("bos_token", "pad_token", "unk_token")
_NAME_PARTS = 2


def find_tokenizer(path: Path) -> Path:
    """`path` itself, or the directory into which the tokenizer of that name on the Hub was downloaded.

    What is there on this machine is preferred to a Hub name that is spelled the same.

    Raises:
        UserError: there is neither, or the Hub cannot be reached and nothing was downloaded before.
    """
    if path.exists() or path.is_absolute() or len(path.parts) != _NAME_PARTS or ".." in path.parts:
        return path
    found = download_tokenizer(f"tokenizer.path = {path.as_posix()}", path.as_posix(), None)
    if not has_tokenizer(found):
        raise UserError(f"tokenizer.path = {path}: the Hub's repository has no tokenizer")
    return found


def download_tokenizer(what: str, name: str, revision: str | None) -> Path:
    """The directory into which a Hub repository's tokenizer files (if it has any) and config were downloaded.

    `what` begins the message.

    Raises:
        UserError: there is no such repository, or the Hub cannot be reached and nothing was downloaded yet.
    """
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - only for what is not on this machine

    wanted = ["config.json", "generation_config.json", *TOKENIZER_FILES]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        reason = one_line(error)
        raise UserError(
            f"{what}: no such file or directory here, and not found on the Hub: {reason}"
        ) from None


def special_tokens(place: Path, tokenizer: Tokenizer) -> dict[str, str]:
    """Tokens that begin, pad and stand for unknown text, by their names in a tokenizer_config.json.

    Args:
        place: a tokenizer.json, which says nothing of them, or a directory.
        tokenizer: the one that lies there; tokens that it does not know are left out.

    Raises:
        UserError: a file is no JSON object.
    """
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = place / name
        if not place.is_dir() or not path.is_file():
            continue
        try:
            settings = json.loads(path.read_text(encoding="utf-8-sig"))
            tokens = {role: settings.get(role) for role in _SPECIAL}
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path}: not a JSON object ({error})") from None
        contents = {
            role: token.get("content") if isinstance(token, dict) else token for role, token in tokens.items()
        }
        found |= {role: token for role, token in contents.items() if isinstance(token, str)}
    return {role: token for role, token in found.items() if tokenizer.token_to_id(token) is not None}


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory holds a tokenizer.json, or what can be converted to one."""
    kinds = (("tokenizer.json",), *_WITHOUT_JSON)
    return any(all((directory / name).is_file() for name in kind) for kind in kinds)


def tokenizer_json(directory: Path) -> str:
    """The text of a directory's tokenizer.json, or of what its older files are converted to.

    Raises:
        UserError: there is none, it cannot be read, or the files cannot be converted.
    """
    file = directory / "tokenizer.json"
    if not file.is_file() and has_tokenizer(directory):
        return _converted(directory)
    try:
        return file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"tokenizer {file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"tokenizer {file}: not a tokenizer.json ({error})") from None


def _converted(directory: Path) -> str:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: PLC0415 - seconds, rarely needed

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - damaged files and missing packages show in any way
        reason = one_line(error)
        raise UserError(
            f"{directory}: there is no tokenizer.json, and its tokenizer cannot be converted: {reason}"
        ) from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"{directory}: has no tokenizer.json, and {type(tokenizer).__name__} cannot be converted to one"
        )
    backend: Tokenizer = tokenizer.backend_tokenizer
    text: str = backend.to_str()
    return text
