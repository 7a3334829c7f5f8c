"""Settings of a teacher cache: which teacher reads which text, and what of its distribution is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from tutelage.config.base import BatchTokens, FilePath, Length, Name, Section, Seed, Threads
from tutelage.config.cache_config import Format, MinVarianceFormat
from tutelage.config.objective_config import Temperature
from tutelage.config.run_config import ControlTeacher, LiveTeacher


class TeachConfig(Section):
    """One teacher cache. It lands in `<output>/<name>-<hash8>`; same config, same directory."""

    name: Name = Field("cache", description="readable part of the directory name")
    store: FilePath = Field(description="token store whose training split the teacher reads")
    teacher: LiveTeacher
    context_length: Length = Field(
        128, description="tokens the teacher sees; students use this sequence length or a divisor of it"
    )
    format: Format = Field(MinVarianceFormat(), description="what is kept of the distributions")
    temperature: Temperature = Field(1.0, description="T of the kept probabilities; hidden serves every T")
    seed: Seed = Field(0, description="seed of the sampler")
    compress: bool = Field(default=False, description="zstd per block, where it makes the block smaller")
    shard_tokens: int = Field(
        2**18, ge=1, le=2**40, description="tokens per file; what a writer claims at a time"
    )
    batch_tokens: BatchTokens = Field(4096, description="tokens per teacher forward")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="compute type of the teacher")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="auto: cuda, mps, then cpu")
    threads: Threads | None = Field(None, description="CPU threads; default: torch's own choice")
    runs: FilePath = Field(Path("runs"), description="directory that holds the run of a teacher of kind run")
    output: FilePath = Field(Path("caches"), description="directory of caches")

    @field_validator("teacher")
    @classmethod
    def _live(cls, teacher: LiveTeacher) -> LiveTeacher:
        if not isinstance(teacher, ControlTeacher) and teacher.cache is not None:
            raise ValueError("cache is for students; what this cache keeps is said by format and temperature")
        return teacher

    @field_validator("format", mode="before")
    @classmethod
    def _default_kind(cls, value: object) -> object:
        """Settings of a format without a kind belong to the default one."""
        return {"kind": "sample_min_variance"} | value if isinstance(value, dict) else value
