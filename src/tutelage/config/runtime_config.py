"""Settings of how a run is computed: checkpoints, processes and their mesh, device, memory, logging."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from tutelage.config.base import RunName, Section, Threads, TokenCount, refuse_alike

Processes = Annotated[int, Field(ge=1, le=65_536)]


class CheckpointConfig(Section):
    """Checkpoints, from which a stopped run resumes."""

    every: TokenCount = Field(default=100_000_000, description="tokens between checkpoints")
    keep: int = Field(default=2, ge=1, le=10**6, description="newest checkpoints to keep")
    keep_every: TokenCount | None = Field(
        default=None,
        examples=["1B"],
        description="tokens between checkpoints that are kept for good, written too if none is due; "
        "default: only the newest are kept",
    )
    asynchronous: bool = Field(
        default=True,
        description="write from a copy in memory (12 bytes per parameter, divided by parallel.shard) while "
        "training goes on; the last one is not copied",
    )
    on_full_disk: Literal["stop", "continue"] = Field(
        default="stop",
        description="if one cannot be written: end the run, or train on and try again at the next",
    )
    keep_before_decay: bool = Field(
        default=False,
        description="keep one more, where the decay begins (wsd), for longer runs to start from",
    )


class ParallelConfig(Section):
    """Processes, one per device, as a mesh of copies of the model and of shards of each copy."""

    processes: Processes = Field(
        default=1,
        description="processes of the run, each on a device of its own: what a study gives it, and what "
        "`tutelage train` starts without --nproc, torchrun or srun",
    )
    replicate: Processes = Field(
        default=1, description="copies of the sharded model; their gradients are summed"
    )
    shard: Processes | Literal["auto"] = Field(
        default="auto", description="processes that share one copy; auto: all that `replicate` leaves"
    )
    reshard_after_forward: bool = Field(
        default=True,
        description="free a layer's gathered weights after its forward pass and gather them again for the "
        "backward pass: less memory, more traffic",
    )
    timeout: int = Field(
        default=600,
        ge=1,
        le=86_400,
        description="seconds that a process waits for the others before all are ended",
    )

    @model_validator(mode="after")
    def _make_a_mesh(self) -> ParallelConfig:
        if self.processes > 1:
            self.mesh(self.processes)
        return self

    def mesh(self, processes: int) -> tuple[int, int]:
        """(replicate, shard) for a number of processes.

        Raises:
            ValueError: they do not multiply to it.
        """
        shard = processes // self.replicate if self.shard == "auto" else self.shard
        if self.replicate * shard != processes:
            raise ValueError(
                f"replicate = {self.replicate} times shard = {self.shard} does not make {processes} processes"
            )
        return self.replicate, shard


def uneven(sequences: int, processes: int) -> str | None:
    """What is wrong with a step of so many sequences if processes cannot share it evenly, else None."""
    if sequences % processes == 0:
        return None
    return (
        f"global_batch_tokens: {sequences} sequences per step do not divide by {processes} ranks; choose a "
        f"multiple of {processes} sequences for a step, or fewer ranks"
    )


class RuntimeConfig(Section):
    """Device, memory, speed and logging. Nothing here changes the result, up to rounding."""

    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        default="auto", description="auto: cuda, mps, then cpu"
    )
    threads: Threads | None = Field(default=None, description="CPU threads; default: one per core at most")
    compile: bool | Literal["auto"] = Field(
        default="auto", description="torch.compile of every decoder layer; auto: on cuda"
    )
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        default="none",
        description="recompute activations in the backward pass instead of keeping them: of every layer, or "
        "(selective) all but those of matrix products and attention",
    )
    max_skipped_steps: int = Field(
        default=10,
        ge=0,
        le=10**9,
        description="updates that may be skipped in a row because a loss or gradient is not finite",
    )
    profile: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="steps to record with torch's profiler, after ten of warm-up; 0: none",
    )
    log_every: int = Field(default=20, ge=1, le=10**9, description="steps between rows of metrics.jsonl")
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        default=(), description="also send the rows there (extra `trackers`)"
    )

    def compiles(self, device: str) -> bool:
        """Whether layers are to be compiled on a type of device, as torch names it."""
        return device == "cuda" if self.compile == "auto" else self.compile

    @field_validator("trackers")
    @classmethod
    def _once(cls, trackers: tuple[str, ...]) -> tuple[str, ...]:
        refuse_alike("trackers", trackers)
        return trackers

    branch_from: RunName | None = Field(
        default=None,
        description="shorter run with checkpoint.keep_before_decay in the same output directory, to "
        "start from: it has computed the same steps up to its decay",
    )
