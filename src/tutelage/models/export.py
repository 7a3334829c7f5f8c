"""Complete an exported model directory: model card, tokenizer, special ids, fields for older readers.

Readers before transformers 5 take rotary positions from `rope_theta` and `rope_scaling` and know nothing of
`rope_parameters`; without those fields they silently compute other logits.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml
from tokenizers import Tokenizer

from tutelage.checksums import refuse_damage
from tutelage.errors import UserError
from tutelage.records import read_object
from tutelage.types import TOKENIZER_FILES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

_SCORES = "## Scores\n"
_MARKUP = re.compile(r"[\\`*\[\]|]")
_UNSCORED = "Not scored yet; `tutelage eval score` does it and writes the table here."


def card(
    title: str,
    front: Mapping[str, Any],
    summary: str,
    facts: Mapping[str, str],
    sources: Sequence[Sequence[str]],
    config: str,
) -> str:
    """Write the text of a model card without scores.

    Args:
        title: name of the model.
        front: metadata, as the Hub names it.
        summary: what the model is, in a paragraph of Markdown.
        facts: how it was made, by name.
        sources: text it was trained on: name, licence, documents.
        config: the run's config.yaml.
    """
    parts = [
        f"---\n{yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True)}---",
        f"# {title}",
        summary,
        "## Training",
        _table(("", ""), facts.items()),
        "## Data",
        _table(("source", "licence", "documents"), sources),
        "Whoever publishes this model chooses its licence (`license` above) with those of the data in mind.",
        f"## Config\n\n{_fenced(config.strip())}",
        f"{_SCORES}\n{_UNSCORED}",
    ]
    return "\n\n".join(parts) + "\n"


def with_scores(text: str, rows: Iterable[Mapping[str, Any]]) -> str:
    """Replace the table of scores of a model card.

    Args:
        text: of the card.
        rows: fields of `tutelage.types.Score`, all of the finished model.
    """
    before, heading, _ = text.rpartition(_SCORES)
    if not heading:
        return text
    cells = [
        (
            str(row["domain"]),
            str(row["split"]),
            str(row["metric"]),
            f"{row['value']:.4g}",
            "" if math.isnan(row["stderr"]) else f"{row['stderr']:.2g}",
        )
        for row in rows
    ]
    head = ("text or task", "split", "metric", "value", "standard error")
    return f"{before}{heading}\n{_table(head, cells) if cells else _UNSCORED}\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    line = " ".join(text.split())
    is_code = line.count("`") == 2 and line[0] == line[-1] == "`"  # noqa: PLR2004 - one at each end
    return line.replace("|", "\\|") if is_code else plain(line)


def plain(text: str) -> str:
    """Escape text so that Markdown shows it as it is: no HTML, links, code or emphasis."""
    return _MARKUP.sub(r"\\\g<0>", text).replace("&", "&amp;").replace("<", "&lt;")


def _fenced(text: str) -> str:
    """A block of YAML within a fence that nothing in it can close."""
    fence = max(("`" * 3, *(found + "`" for found in re.findall("`{3,}", text))), key=len)
    return f"{fence}yaml\n{text}\n{fence}"


_NEEDED = ("tokenizer.json", "tokenizer_config.json")
_SPECIAL = ("bos_token", "eos_token", "pad_token")
_CLASS = "PreTrainedTokenizerFast"
_TEMPLATE = "chat_template.jinja"
_TEMPLATES = "additional_chat_templates"
_GENERATION = "generation_config.json"
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


@dataclass(frozen=True, slots=True)
class Base:
    """Directory of the model that a student continues from.

    Attributes:
        directory: of the model, with generation_config.json if it has one.
        tokenizer: whether its tokenizer is the export's too.
    """

    directory: Path
    tokenizer: bool


def check_tokenizer_files(source: Path) -> None:
    """Refuse a token store or model directory without the files that a tokenizer is loaded from.

    Raises:
        UserError: naming the missing file.
    """
    for name in _NEEDED:
        if not (source / name).is_file():
            raise UserError(f"{source}: no {name}; without its tokenizer a model is of no use")


def complete(directory: Path, store: Path, base: Base | None, context: int | None, rows: int) -> None:
    """Add everything but weights to a directory that transformers has just written.

    Args:
        directory: holds config.json and weights.
        store: directory with the tokenizer that the model was trained with.
        base: directory of the model it was initialised from.
        context: longest sequence in tokens; None if unbounded.
        rows: of the model's head.

    Raises:
        UserError: a tokenizer file is missing or damaged.
    """
    for source in (store, *([base.directory] if base is not None and base.tokenizer else [])):
        refuse_damage(source, *TOKENIZER_FILES)
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, directory / name)
        if (source / _TEMPLATES).is_dir():
            shutil.copytree(source / _TEMPLATES, directory / _TEMPLATES)
    _begin_as_stored(directory / "tokenizer.json", store / "tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    except Exception as error:  # noqa: BLE001 - the library raises plain Exception for bad JSON
        raise UserError(f"{source / 'tokenizer.json'}: not a tokenizer.json ({error})") from None
    settings = _tokenizer_settings(directory, store, context, tokenizer)
    (directory / "tokenizer_config.json").write_text(_text(settings), encoding="utf-8")
    _say_the_same(directory / "special_tokens_map.json", settings)
    ids = _special_ids(tokenizer, settings)
    path = directory / "config.json"
    config = read_object(path)
    path.write_text(_text(for_older_readers(config) | _model_ids(config, ids, rows)), encoding="utf-8")
    named = set(tokenizer.get_vocab(with_added_tokens=True).values())
    nameless = [index for index in range(rows) if index not in named]
    generation = _generation(None if base is None else base.directory / _GENERATION, ids, nameless)
    (directory / _GENERATION).write_text(_text(generation), encoding="utf-8")


def _begin_as_stored(path: Path, stored: Path) -> None:
    """Take the store's post-processor: a base's may add a closing token, which stores add themselves."""
    own, theirs = read_object(path), read_object(stored)
    if own.get("post_processor") != theirs.get("post_processor"):
        own["post_processor"] = theirs.get("post_processor")
        path.write_text(json.dumps(own, ensure_ascii=False, indent=2), encoding="utf-8")


def for_older_readers(config: dict[str, Any]) -> dict[str, Any]:
    """Add the fields from which transformers 4 reads rotary positions and dtype."""
    older = {
        name: for_older_readers(value) if name == "text_config" and isinstance(value, dict) else value
        for name, value in config.items()
    }
    if config.get("dtype") is not None:
        older["torch_dtype"] = config["dtype"]
    if "num_local_experts" in config:
        older["num_experts"] = config["num_local_experts"]
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return older
    if _GLOBAL in rope and _LOCAL in rope:  # one set per kind of layer
        family = str(config.get("model_type"))
        if family.startswith("gemma3"):
            older["rope_local_base_freq"] = rope[_LOCAL]["rope_theta"]
        elif family != "olmo3":  # whose kinds of layers have one theta
            return older  # transformers 4 knows no other such family, and 5 would prefer the older fields
        rope = rope[_GLOBAL]
    if "rope_theta" not in rope:
        return older
    older["rope_theta"] = rope["rope_theta"]
    older["rope_scaling"] = _older_scaling(rope, config.get("model_type"))
    share = rope.get("partial_rotary_factor")
    if share is not None:
        older["partial_rotary_factor"] = share
    if config.get("model_type") == "gpt_neox":
        older["rotary_emb_base"] = rope["rope_theta"]
        older["rotary_pct"] = 0.25 if share is None else share
    return older


def _older_scaling(rope: dict[str, Any], family: object) -> dict[str, Any] | None:
    """The `rope_scaling` that transformers 4 reads; None if positions are not scaled."""
    if rope.get("rope_type", "default") == "default":
        return None
    if family == "phi3":  # has the original length beside it, and refuses a field more
        factors = {name: rope[name] for name in ("short_factor", "long_factor") if name in rope}
        return {"type": rope["rope_type"]} | factors
    return {
        name: value for name, value in rope.items() if name not in {"rope_theta", "partial_rotary_factor"}
    }


def _text(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _tokenizer_settings(
    directory: Path, store: Path, context: int | None, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Write a tokenizer_config.json with pad token, trained length and, if there is one, chat template.

    A special token that the tokenizer does not know would get an id beyond the model's; it is left out.
    """
    settings = read_object(directory / "tokenizer_config.json")
    stored = read_object(store / "tokenizer_config.json")
    settings |= {name: value for name, value in stored.items() if settings.get(name) is None}
    # what a text ends with and how a chat is written are those of what it was trained on, not its base's
    settings |= {name: stored[name] for name in ("eos_token", "chat_template") if name in stored}
    if "chat_template" in stored:
        (directory / _TEMPLATE).write_text(stored["chat_template"], encoding="utf-8")
    for name in _SPECIAL:
        if settings.get(name) is not None and _id(tokenizer, settings[name]) is None:
            del settings[name]
    if settings.get("pad_token") is None:
        settings["pad_token"] = settings.get("eos_token")
    if (read_object(directory / "tokenizer.json").get("pre_tokenizer") or {}).get("add_prefix_space"):
        settings["add_prefix_space"] = True  # or transformers 4 turns it off
    if context is not None:
        settings["model_max_length"] = context
    _spell_for_older_readers(settings)
    _begin_as_encoded(settings, tokenizer)
    return settings


def _begin_as_encoded(settings: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Correct the fields that transformers believes before a post-processor: what begins and ends a text."""
    begin = tokenizer.encode("").tokens
    settings.pop("add_eos_token", None)
    if begin and begin != [_content(settings.get("bos_token"))]:
        settings.pop("add_bos_token", None)
    elif "add_bos_token" in settings or not (begin or settings.get("tokenizer_class") == _CLASS):
        settings["add_bos_token"] = bool(begin)  # some classes of transformers 4 add it unless told not to


def _spell_for_older_readers(settings: dict[str, Any]) -> None:
    """Say what version 5 of transformers takes for granted in the words that version 4 reads, too."""
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = _CLASS
    if isinstance(settings.get("extra_special_tokens"), list):  # to version 4 a dictionary
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    if settings.get("tokenizer_class") == _CLASS:
        # By itself version 4 gives token_type_ids too, which no causal model takes.
        settings.setdefault("model_input_names", ["input_ids", "attention_mask"])


def _say_the_same(older: Path, settings: dict[str, Any]) -> None:
    """Correct the older file that names special tokens, which comes first for transformers."""
    if older.is_file():
        named = read_object(older).items()
        kept = {name: settings.get(name) if name in _SPECIAL else value for name, value in named}
        older.write_text(_text({k: v for k, v in kept.items() if v is not None}), encoding="utf-8")


def _special_ids(tokenizer: Tokenizer, settings: dict[str, Any]) -> dict[str, int]:
    """The ids of the tokens that begin, end and pad a text, by their names in a config.json."""
    found = {f"{name}_id": _id(tokenizer, settings.get(name)) for name in _SPECIAL}
    return {name: index for name, index in found.items() if index is not None}


def _id(tokenizer: Tokenizer, token: object) -> int | None:
    """The id of a token."""
    content = _content(token)
    index: int | None = tokenizer.token_to_id(content) if isinstance(content, str) else None
    return index


def _content(token: object) -> object:
    """The text of a token, which is written as a string or as an object with its content."""
    return token.get("content") if isinstance(token, dict) else token


def _model_ids(config: dict[str, Any], ids: dict[str, int], rows: int) -> dict[str, Any]:
    """Choose the special ids of config.json: the tokenizer's, else the model's own.

    A pad id that is also the end-of-text id stays out: whoever trains the model further would freeze the
    embedding of the end of text.
    """
    found: dict[str, Any] = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        own = config.get(name)
        known = isinstance(own, int) and own < rows
        found[name] = ids.get(name, own if known else None)
    if found["pad_token_id"] == found["eos_token_id"]:
        found["pad_token_id"] = None
    return found


def _generation(base: Path | None, ids: dict[str, int], nameless: Sequence[int]) -> dict[str, Any]:
    """Write generation_config.json: the base's, if it has one, with the ids that end and pad a text.

    Rows of the head that are no token of the tokenizer took no part in training, and are not to be written.
    """
    settings = read_object(base) if base is not None and base.is_file() else {}
    if settings.get("_from_model_config"):
        settings = {}
    ends = all_ends(settings.get("eos_token_id"), ids.get("eos_token_id"))
    if ends:
        settings["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    for name in ("bos_token_id", "pad_token_id"):
        if name in ids:
            settings.setdefault(name, ids[name])
    if nameless:
        settings["suppress_tokens"] = sorted({*(settings.get("suppress_tokens") or ()), *nameless})
    return settings


def all_ends(known: int | list[int] | None, own: int | None) -> list[int]:
    """Return the ids that end a text: those `known` to a generation config, and the tokenizer's `own`."""
    ends = [*(known if isinstance(known, list) else [known]), own]
    return [index for index in dict.fromkeys(ends) if index is not None]
