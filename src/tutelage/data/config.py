"""Settings of a token store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from tutelage.settings import Fraction, Name, Section


class CorpusSource(Section):
    """A named corpus from `tutelage data list`."""

    kind: Literal["corpus"] = "corpus"
    name: str = Field(description="name of the corpus")
    weight: float | None = Field(None, gt=0, description="share of bytes in the mixture; default: take all")


class FilesSource(Section):
    """Local text: .txt, .jsonl or .parquet, each also as .gz or .zst (not parquet)."""

    kind: Literal["files"]
    paths: tuple[str, ...] = Field(min_length=1, description="files or glob patterns")
    field: str = Field("text", description="field (jsonl) or column (parquet) that holds the text")
    weight: float | None = Field(None, gt=0, description="share of bytes in the mixture; default: take all")


class HubSource(Section):
    """A Hugging Face data set, streamed (extra `hub`)."""

    kind: Literal["hub"]
    path: str = Field(description="name on the Hub, or a local directory that `datasets` can load")
    subset: str | None = Field(None, description="configuration of the data set, for example 'sample-10BT'")
    split: str = Field("train", description="split of the data set")
    revision: str | None = Field(None, description="commit or tag; pin it to make the store reproducible")
    field: str = Field("text", description="column that holds the text")
    weight: float | None = Field(None, gt=0, description="share of bytes in the mixture; default: take all")


Source = Annotated[CorpusSource | FilesSource | HubSource, Field(discriminator="kind")]


class TokenizerConfig(Section):
    """Where the tokenizer comes from: trained on the train split, or a ready one."""

    vocab_size: int = Field(512, ge=257, le=1_000_000, description="size of a byte-level BPE trained here")
    sample_bytes: int | None = Field(
        None, ge=1, description="train the tokenizer on about this much text; default: 4000 per entry"
    )
    path: Path | None = Field(None, description="use this tokenizer.json (or directory) and train none")


class StoreConfig(Section):
    """Text to token store: sources, tokenizer, split. The store lands in `<output>/<name>-<hash8>`."""

    name: Name = Field(description="readable part of the directory name")
    sources: tuple[Source, ...] = Field(min_length=1, description="where the text comes from")
    tokenizer: TokenizerConfig = TokenizerConfig()
    validation: Fraction = Field(0.05, description="fraction of documents, by hash, held out for choices")
    test: Fraction = Field(0.05, description="fraction of documents, by hash, held out for reports")
    max_bytes: int | None = Field(None, ge=1, description="stop after this much text, in bytes of UTF-8")

    @model_validator(mode="after")
    def _consistent(self) -> StoreConfig:
        if self.validation + self.test > 1.0:
            raise ValueError("validation + test must be at most 1")
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise ValueError("give every source a weight, or none")
        return self
