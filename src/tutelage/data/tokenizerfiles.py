"""Where a tokenizer's files lie: on this machine, or on the Hugging Face Hub."""

from __future__ import annotations

import contextlib
from pathlib import Path

from tutelage.errors import UserError

_NAME_PARTS = 2


def find_tokenizer(path: Path) -> Path:
    """`path` itself, or the directory into which the tokenizer of that name on the Hub was downloaded.

    What is there on this machine is preferred to a Hub name that is spelled the same.

    Raises:
        UserError: there is neither, or the Hub cannot be reached and nothing was downloaded before.
    """
    if path.exists() or path.is_absolute() or len(path.parts) != _NAME_PARTS or ".." in path.parts:
        return path
    from huggingface_hub import hf_hub_download  # noqa: PLC0415 - only for what is not on this machine
    from huggingface_hub.errors import EntryNotFoundError  # noqa: PLC0415

    name = path.as_posix()
    try:
        file = hf_hub_download(name, "tokenizer.json")
        for beside in ("tokenizer_config.json", "chat_template.jinja"):
            with contextlib.suppress(EntryNotFoundError):  # not every tokenizer has them
                hf_hub_download(name, beside)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:400]
        raise UserError(
            f"tokenizer.path = {name}: no such file or directory here, and not found on the Hub: {reason}"
        ) from None
    return Path(file).parent
