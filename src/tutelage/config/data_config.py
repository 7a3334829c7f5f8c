"""Settings of a token store."""

from __future__ import annotations

import codecs
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from tutelage.config.base import Bytes, FilePath, Fraction, Name, Section

DOCUMENT_LIMIT = 2**23
"""Largest document in bytes. One document is tokenised at once, so this bounds the memory of a build."""


Kind = Literal["text", "html", "csv", "tsv", "jsonl", "parquet"]
"""What a file is: text as a whole, a page, or rows."""


def _known_encoding(name: str) -> str:
    """Return the one name that Python has for an encoding."""
    try:
        "".encode(name)
        return codecs.lookup(name).name
    except (LookupError, UnicodeError):
        raise ValueError(f"{name!r} is no encoding; write for example latin-1, cp1252 or utf-16") from None


def _regular(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression ({error})") from None
    return pattern


class _Source(Section):
    weight: float | None = Field(
        default=None, ge=1e-9, le=1e9, description="share of bytes in the mixture; default: take all"
    )
    on_bad_row: Literal["stop", "skip"] = Field(
        default="stop",
        description="a row without usable text (no valid UTF-8 or JSON, no such field, another type, half of "
        "a surrogate pair, too long): end the build and name it, or leave it out and count it",
    )


class _Paths(_Source):
    paths: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        min_length=1, description="files, glob patterns, and directories, which are read with all in them"
    )
    format: Kind | None = Field(
        default=None, description="read all files as this; default: each by its ending, compressed or not"
    )
    encoding: Annotated[str, AfterValidator(_known_encoding)] | None = Field(
        default=None,
        description="encoding of the text, for example latin-1, where no byte order mark says it; default: "
        "UTF-8, or what a page of HTML says of itself",
    )


class _OnHub(_Source):
    path: str = Field(description="name on the Hub, or a local directory that `datasets` can load")
    subset: str | None = Field(
        default=None, description="configuration of the data set, for example 'sample-10BT'"
    )
    split: str = Field(default="train", description="split of the data set")
    revision: str | None = Field(
        default=None, description="commit or tag; pin it to make the store reproducible"
    )


class CorpusSource(_Source):
    """A named corpus from `tutelage data list`."""

    kind: Literal["corpus"] = "corpus"
    name: str = Field(description="name of the corpus")


class FilesSource(_Paths):
    """Local text: .txt, .md, .html, .csv, .tsv, .jsonl, also compressed (.gz, .zst, .xz, .bz2), .parquet."""

    kind: Literal["files"]
    field: str = Field(
        default="text", description="field (jsonl) or column (csv, parquet) that holds the text"
    )
    cut_at: str | None = Field(
        default=None,
        min_length=1,
        description="of text and html: what stands between documents, such as <|endoftext|>; it is left out",
    )
    cut_before: Annotated[str, AfterValidator(_regular)] | None = Field(
        default=None,
        min_length=1,
        description="of text and html: a document begins with each line whose beginning matches this regular "
        "expression, for example 'CHAPTER [IVXL]+'",
    )
    document_bytes: Annotated[int, Field(ge=256, le=DOCUMENT_LIMIT // 2)] | Literal["auto", "file"] = Field(
        default="auto",
        description="of text and html: cut it between paragraphs into documents of about this many bytes; "
        "auto: where there are fewer than 200 files, cut those longer than 8 KiB into about 200 documents in "
        "all (of 512 bytes to 8 KiB), else, and after cut_at or cut_before, only what is longer than 1 MiB; "
        "file: every file is one document",
    )

    @model_validator(mode="after")
    def _cut_in_one_way(self) -> FilesSource:
        if self.cut_at is not None and self.cut_before is not None:
            raise ValueError("cut_at and cut_before are two ways to cut the same text; keep one")
        if self.is_cut and self.document_bytes == "file":
            raise ValueError(
                "document_bytes: file asks for no cuts, cut_at and cut_before for some; keep one"
            )
        return self

    @property
    def is_cut(self) -> bool:
        """Whether marks in the text say where documents begin or end."""
        return self.cut_at is not None or self.cut_before is not None


class HubSource(_OnHub):
    """A Hugging Face data set, streamed (extra `hub`)."""

    kind: Literal["hub"]
    field: str = Field(default="text", description="column that holds the text")


class _Pairs(_Source):
    template: Literal["plain", "chat"] = Field(
        default="plain",
        description="plain: prompt, separator, completion; chat: the tokenizer's own chat template",
    )
    separator: str = Field(
        default="\n", description="plain only: ends every prompt, so that the model sees where it is to begin"
    )


class _PairFields(_Pairs):
    prompt: str = Field(default="prompt", description="field that holds what is asked")
    completion: str = Field(
        default="completion", description="field that holds the answer, which is what is learned"
    )
    messages: str | None = Field(
        default=None,
        description="instead of the two: field with a list of {role, content}; assistant turns are learned",
    )
    tools: str | None = Field(
        default=None,
        description="chat only: field with the list of tools that the template is to write, as it is or as "
        "JSON; default: the template is told of none",
    )

    @model_validator(mode="after")
    def _consistent(self) -> _PairFields:
        for name, field in (("messages", self.messages), ("tools", self.tools)):
            if field is not None and self.template != "chat":
                raise ValueError(f"{name} need a chat template to become text; set template: chat")
        if self.messages is None and self.prompt == self.completion:
            raise ValueError(f"prompt and completion are the same field, '{self.prompt}'")
        return self


class CorpusPairs(_Pairs):
    """A named corpus of prompts and completions from `tutelage data list`, for stage sft."""

    kind: Literal["corpus_pairs"]
    name: str = Field(description="name of the corpus")


class FilePairs(_Paths, _PairFields):
    """Prompts and completions in local .jsonl, .csv or .tsv (also compressed) or .parquet files, for sft."""

    kind: Literal["pairs"]


class HubPairs(_OnHub, _PairFields):
    """Prompts and completions in a Hugging Face data set (extra `hub`), for stage sft."""

    kind: Literal["hub_pairs"]


TextSource = CorpusSource | FilesSource | HubSource
PairSource = CorpusPairs | FilePairs | HubPairs
Source = Annotated[TextSource | PairSource, Field(discriminator="kind")]


class TokenizerConfig(Section):
    """A tokenizer that is trained on the train split, or an existing one."""

    vocab_size: int = Field(
        default=512, ge=257, le=1_000_000, description="size of a byte-level BPE trained here"
    )
    sample_bytes: Bytes | None = Field(
        default=None,
        examples=[2_000_000],
        description="train the tokenizer on about this much text; default: 4000 per entry",
    )
    path: FilePath | None = Field(
        default=None, description="use this tokenizer.json, directory or Hub name, and train none"
    )


class StoreConfig(Section):
    """Text to token store: sources, tokenizer, split. The store lands in `<output>/<name>-<hash8>`."""

    name: Name = Field(description="readable part of the directory name")
    sources: tuple[Source, ...] = Field(min_length=1, description="where the text comes from")
    tokenizer: TokenizerConfig = TokenizerConfig()
    validation: Fraction = Field(
        default=0.05, description="fraction of documents, by hash, held out for choices"
    )
    test: Fraction = Field(default=0.05, description="fraction of documents, by hash, held out for reports")
    max_bytes: Bytes | None = Field(
        default=None, examples=[100_000_000], description="stop after this much text, in bytes of UTF-8"
    )
    special_tokens_in_text: Literal["text", "refuse"] = Field(
        default="text",
        description="what to do with text that spells a special token, such as <|endoftext|>: encode it as "
        "the letters it is and count it, or refuse it (other programs may read the token)",
    )

    @model_validator(mode="after")
    def _consistent(self) -> StoreConfig:
        if self.validation + self.test > 1.0:
            raise ValueError("validation + test must be at most 1")
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise ValueError("give every source a weight, or none")
        if self.uses_chat and self.tokenizer.path is None:
            raise ValueError(
                "template: chat needs tokenizer.path, the directory of a model with a chat template"
            )
        return self

    @property
    def has_pairs(self) -> bool:
        """Whether some tokens are prompts, which carry no loss."""
        return any(isinstance(source, PairSource) for source in self.sources)

    @property
    def uses_chat(self) -> bool:
        """Whether a chat template is needed."""
        return any(isinstance(source, PairSource) and source.template == "chat" for source in self.sources)
