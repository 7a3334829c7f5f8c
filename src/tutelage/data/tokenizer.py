"""Turn text into token ids with a byte-level BPE trained here or a ready tokenizer in Hugging Face format.

Ids are passed on as little-endian bytes, ready for the disk, because a Python object per token would cost
more than the tokenisation itself.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tutelage.checksums import refuse_damage, write_checksums
from tutelage.errors import UserError, one_line
from tutelage.files import read_bytes, write_json
from tutelage.hub_access import INSTEAD, downloaded
from tutelage.names import completed
from tutelage.records import parse_json, read_object
from tutelage.types import TOKENIZER_FILES

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

END_OF_TEXT = "<|endoftext|>"
"""The end-of-text token of tokenizers trained here; its id is 0."""

_KNOWN_ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "<|eot_id|>")
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # by which byte fallback spells what it has no word for
_WORD_START = re.compile(r"(?= \S)")
_LONGEST_WORD = 1024
_LONG_WORD = re.compile(rf"\S{{{_LONGEST_WORD}}}|\s{{{_LONGEST_WORD}}}")
_CACHE_BYTES = 256_000_000
_BYTES_PER_WORD = 200  # of a dictionary entry, besides its characters
_WITHOUT_JSON = (("vocab.json", "merges.txt"), ("vocab.txt",), ("tokenizer.model",), ("spiece.model",))
"""Files that together are a tokenizer of an older kind, which transformers can convert."""

_SPECIAL = ("bos_token", "pad_token", "unk_token")
_NAMES = (*_SPECIAL, "eos_token", "sep_token", "cls_token", "mask_token")
_NAME_PARTS = 2


def find_tokenizer(path: Path) -> Path:
    """Return `path`, or the directory into which the tokenizer of that name on the Hub was downloaded.

    A path that exists on this machine is preferred to a Hub name that is spelled the same; its parts may be
    names (`tutelage.names`).

    Raises:
        UserError: there is neither, or the Hub cannot be reached and nothing was downloaded before.
    """
    path = completed(path, "tokenizer.path")
    no_name = path.is_absolute() or len(path.parts) > _NAME_PARTS or ".." in path.parts
    if path.exists() or no_name or path.suffix == ".json":
        return path
    found = download_tokenizer(f"tokenizer.path = {path.as_posix()}", path.as_posix(), None, needed=True)
    if not has_tokenizer(found):
        raise UserError(f"tokenizer.path = {path}: the Hub's repository has no tokenizer")
    return found


def download_tokenizer(
    what: str, name: str, revision: str | None, *, needed: bool, instead: str = INSTEAD
) -> Path:
    """Return the directory into which a Hub repository's config and tokenizer files (if any) were downloaded.

    `what` and `instead` as in `reading_hub`; `needed`: without a tokenizer the repository is of no use.

    Raises:
        UserError: there is no such repository; the Hub cannot be reached, and nothing that is needed was
            downloaded yet; or a file is damaged.
    """
    wanted = ("config.json", "generation_config.json", *TOKENIZER_FILES)
    return downloaded(what, name, revision, wanted, has_tokenizer if needed else Path.is_dir, instead)


def special_tokens(place: Path, tokenizer: TextTokenizer) -> dict[str, str]:
    """Return the tokens for beginnings, padding and unknown text, as `named_tokens`; those that it has."""
    vocabulary = Tokenizer.from_str(tokenizer.json).get_vocab(with_added_tokens=True)
    found = named_tokens(place)
    return {name: token for name, token in found.items() if name in _SPECIAL and token in vocabulary}


def named_tokens(place: Path) -> dict[str, str]:
    """Return special tokens by name, from both files of a directory's settings; a tokenizer.json names none.

    Raises:
        UserError: a file is no JSON object.
    """
    files = [read_settings(place / name) for name in ("special_tokens_map.json", "tokenizer_config.json")]
    found = {name: token_content(file[name]) for file in files for name in _NAMES if file.get(name)}
    return {name: token for name, token in found.items() if token is not None}


def read_settings(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of tokenizer settings; empty if there is no such file.

    Raises:
        UserError: it is no JSON object.
    """
    refuse_damage(path.parent, path.name)
    return read_object(path) if path.is_file() else {}


def token_content(token: object) -> str | None:
    """Return the text of a token, which settings write as a string or as an object with its content."""
    content = token.get("content") if isinstance(token, dict) else token
    return None if content is None else str(content)


def has_tokenizer(directory: Path) -> bool:
    """Return whether a directory holds a tokenizer.json, or what can be converted to one."""
    kinds = (("tokenizer.json",), *_WITHOUT_JSON)
    return any(all((directory / name).is_file() for name in kind) for kind in kinds)


def tokenizer_json(path: Path) -> str:
    """Return the text of a tokenizer.json, of the one in a directory, or of what older files convert to.

    Raises:
        UserError: there is none, it cannot be read, or the files cannot be converted.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    refuse_damage(file.parent, file.name)
    if not file.is_file() and has_tokenizer(path):
        return _converted(path)
    if path.is_dir() and not file.exists():
        own = f"; that of this run is in {path / 'model'}" if has_tokenizer(path / "model") else ""
        raise UserError(f"tokenizer {path}: there is no tokenizer.json in this directory{own}")
    try:
        return read_bytes(file).decode("utf-8-sig")
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


@dataclass(frozen=True, slots=True)
class TextTokenizer:
    """A tokenizer and what a store must know about it.

    Attributes:
        json: the text of its tokenizer.json, without what ends texts, cuts them short or pads them.
        end_of_text: the token that closes every document.
        vocab_size: one more than its largest id.
        eos_id: id of `end_of_text`.
        begin: the tokens that its post-processor puts in front of a text; they begin every document.
        begin_ids: their ids.
    """

    json: str
    end_of_text: str
    vocab_size: int
    eos_id: int
    begin: tuple[str, ...] = ()
    begin_ids: tuple[int, ...] = ()

    @property
    def sha256(self) -> str:
        """The SHA-256 of tokenizer.json; stores with equal checksums share their ids."""
        return hashlib.sha256(self.json.encode()).hexdigest()

    @property
    def dtype(self) -> np.dtype[np.uint16] | np.dtype[np.uint32]:
        """Little-endian type of the ids on disk: uint16 where every id fits, else uint32."""
        return np.dtype("<u2") if self.vocab_size <= 2**16 else np.dtype("<u4")

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The texts of its special tokens, with those that begin and close documents."""
        added = json.loads(self.json).get("added_tokens") or []
        special = (token["content"] for token in added if token["special"])
        return tuple(dict.fromkeys((*special, self.end_of_text, *self.begin)))

    def library(self, *, markup: bool) -> Tokenizer:
        """Return the library's tokenizer for text, or for `markup`, in which special tokens are meant.

        Text yields no special token except the one for unknown text: some vocabularies hold them as words,
        some have merges that make them, and some files name them without calling them special.
        """
        text = self.json if markup else _without_special_words(json.loads(self.json), self.special_tokens)
        tokenizer = Tokenizer.from_str(text)
        tokenizer.encode_special_tokens = not markup
        return tokenizer

    def save(self, directory: Path, named: Mapping[str, str] | None = None) -> None:
        """Write tokenizer.json as it is here, what transformers needs beside it to load it, and checksums.

        A single token that begins every text is named as `bos_token`, so that lm-eval begins with it too.

        Args:
            directory: where to.
            named: special tokens besides the end of text by their names, and the text's chat template.
        """
        (directory / "tokenizer.json").write_bytes(self.json.encode())
        write_json(
            directory / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": self.end_of_text,
                "clean_up_tokenization_spaces": False,
                **(named or {}),
                **({"bos_token": self.begin[0]} if len(self.begin) == 1 else {}),
            },
        )
        write_checksums(directory)

    def encoder(self, *, markup: bool = False) -> Callable[[Sequence[str]], list[bytes]]:
        """A function from texts to their ids as bytes of `dtype`, without what begins or ends documents.

        Text that spells a special token is encoded letter by letter: a document cannot fake an end of
        text. Only in `markup`, which a chat template wrote, special tokens are meant.
        """
        encode = _whole_texts(self.library(markup=markup), self.dtype)
        by_word = not markup and _splits_at_spaces(json.loads(self.json))
        return _word_by_word(encode) if by_word else encode


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """Train a byte-level BPE, which can encode any text and decodes it exactly.

    Args:
        texts: the text to learn from, read once.
        vocab_size: number of ids, at least 257 (256 bytes and the end of text); it gets smaller if the
            text has too few different words.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((part for text in texts for part in _short_words(text)), trainer)
    return _wrapped(tokenizer.to_str(), tokenizer, END_OF_TEXT)


def _short_words(text: str) -> Iterator[str]:
    """Yield a text in parts without very long words: the trainer takes the square of a word's length."""
    begin = 0
    for word in _LONG_WORD.finditer(text):
        yield text[begin : word.end()]
        begin = word.end()
    yield text[begin:]


def load_tokenizer(path: Path) -> TextTokenizer:
    """Read a tokenizer.json, or the one of a model directory or token store.

    The end-of-text token is `eos_token` of the directory's settings (`named_tokens`). For a single file, or
    where that names none, it is the first of the usual ones that it has, special tokens before words.

    Tokens that the post-processor puts in front of a text are kept. Those that it appends are removed: stores
    close documents themselves. So are truncation, padding, and the dropout of merges, whose cuts are random.

    Raises:
        UserError: there is no tokenizer, it cannot be read, or it has no end-of-text token.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    text = tokenizer_json(path)
    try:
        tokenizer = Tokenizer.from_str(text)
        parse_json(text)
    except Exception as error:  # noqa: BLE001 - the library raises plain Exception for bad JSON
        raise UserError(f"tokenizer {file}: not a tokenizer.json ({one_line(error)})") from None
    named = named_tokens(path).get("eos_token")
    special = {added.content for added in tokenizer.get_added_tokens_decoder().values() if added.special}
    for token in [named] if named else sorted(_KNOWN_ENDS, key=lambda end: end not in special):
        if tokenizer.token_to_id(token) is not None:
            return _wrapped(text, tokenizer, token)
    known = f"{' or '.join(_KNOWN_ENDS)}, or a directory whose tokenizer_config.json names its eos_token"
    wanted = f"the eos_token {named!r} of its tokenizer_config.json" if named else known
    raise UserError(f"tokenizer {file}: has no end-of-text token; expected {wanted}")


def _wrapped(text: str, tokenizer: Tokenizer, end: str) -> TextTokenizer:
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    begin, begin_ids, appends = added_to_texts(tokenizer)
    settings = json.loads(text)
    model = settings["model"] | dict.fromkeys({"dropout"} & settings["model"].keys())
    wanted: dict[str, object] = {"truncation": None, "padding": None, "model": model}
    if appends:
        wanted["post_processor"] = _in_front(begin, begin_ids)
    if any(settings.get(name) != value for name, value in wanted.items()):
        text = json.dumps(settings | wanted, ensure_ascii=False, indent=2)
    return TextTokenizer(text, end, max(vocabulary.values()) + 1, vocabulary[end], begin, begin_ids)


def added_to_texts(tokenizer: Tokenizer) -> tuple[tuple[str, ...], tuple[int, ...], bool]:
    """Return the tokens that the post-processor puts in front of a text, their ids, and if it appends any."""
    if tokenizer.post_processor is None:
        return (), (), False
    bare = Tokenizer(models.WordLevel({"text": 0}))
    bare.post_processor = tokenizer.post_processor
    encoding = bare.encode("text")
    place = encoding.special_tokens_mask.index(0)
    return tuple(encoding.tokens[:place]), tuple(encoding.ids[:place]), place + 1 < len(encoding.ids)


def _in_front(tokens: Sequence[str], ids: Sequence[int]) -> dict[str, object]:
    """Return the post-processor, as in a tokenizer.json, that puts these tokens in front of a text."""
    bare = Tokenizer(models.WordLevel())
    bare.post_processor = processors.TemplateProcessing(
        single=[*tokens, "$A"], special_tokens=list(zip(tokens, ids, strict=True))
    )
    template: dict[str, object] = json.loads(bare.to_str())["post_processor"]
    return template


def _without_special_words(settings: dict[str, Any], special: Collection[str]) -> str:
    """A tokenizer.json in which special tokens keep their ids under names with NULs, unlike any text."""
    model = settings["model"]
    vocabulary = model["vocab"]
    words = vocabulary if isinstance(vocabulary, dict) else [word for word, _ in vocabulary]  # list: Unigram
    names = {word: f"\x00{word}\x00" for word in special if word in words and not _BYTE.fullmatch(word)}
    if model.get("merges"):
        pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
        model["merges"] = [pair for pair in pairs if names.keys().isdisjoint((*pair, "".join(pair)))]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(word, word): index for word, index in vocabulary.items()}
    else:
        model["vocab"] = [[names.get(word, word), score] for word, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    for token in settings.get("added_tokens") or []:
        if token["content"] in special:
            token |= {"content": names.get(token["content"], token["content"]), "special": True}
    return json.dumps(settings)


def _whole_texts(tokenizer: Tokenizer, dtype: np.dtype[np.generic]) -> Callable[[Sequence[str]], list[bytes]]:
    def encode(texts: Sequence[str]) -> list[bytes]:
        encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=dtype).tobytes() for encoding in encodings]

    return encode


def _word_by_word(encode: Callable[[Sequence[str]], list[bytes]]) -> Callable[[Sequence[str]], list[bytes]]:
    """Wrap `encode` so that every different word is encoded once and a text is the join of its words' bytes.

    This takes a third of the time of the library's own batches, which spend it on offsets and strings.
    """
    cache: dict[str, bytes] = {}
    cached_bytes = 0

    def encode_words(texts: Sequence[str]) -> list[bytes]:
        nonlocal cached_bytes
        if cached_bytes > _CACHE_BYTES:
            cache.clear()
            cached_bytes = 0
        words = [_WORD_START.split(text) for text in texts]
        new = list({word for text in words for word in text}.difference(cache))
        cache.update(zip(new, encode(new), strict=True))
        cached_bytes += sum(map(len, new)) + _BYTES_PER_WORD * len(new)
        return [b"".join(map(cache.__getitem__, text)) for text in words]

    return encode_words


def _splits_at_spaces(tokenizer: dict[str, object]) -> bool:
    """Return whether no token reaches over a space that is followed by something other than white space.

    That holds for the pattern of GPT-2, which the ByteLevel pre-tokenizer uses, as long as nothing else
    (a normalizer, an added token that is no special one) looks at the text before it.
    """
    match tokenizer:
        case {
            "normalizer": None,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
            "added_tokens": [*added],
        }:
            return all(isinstance(token, dict) and token["special"] for token in added)
    return False
