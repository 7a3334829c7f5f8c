"""A run's directory: where everything about the run is, and the only way to write there.

Layout: config.yaml, provenance.json, state.json, metrics.jsonl, scores.jsonl, documents.parquet,
checkpoints/step-N/, model/ (a Hugging Face directory).
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tutelage.files import claimed, make_directory, write_json, write_text

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Paths and files of one run."""

    path: Path

    @property
    def id(self) -> str:
        """The run id, `<name>-<hash8>`."""
        return self.path.name

    @property
    def model(self) -> Path:
        """The finished model; it exists only when training is complete."""
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        """Parent of `step-N` directories."""
        return self.path / "checkpoints"

    @property
    def scores(self) -> Path:
        """Rows of `tutelage.types.Score`."""
        return self.path / "scores.jsonl"

    @property
    def documents(self) -> Path:
        """Per-document losses behind the scores."""
        return self.path / "documents.parquet"

    def claimed(self) -> contextlib.AbstractContextManager[None]:
        """Hold the run for this process; a second process gets a `UserError`."""
        make_directory(self.path)
        return claimed(self.path / "lock", str(self.path))

    def state(self) -> dict[str, Any]:
        """Contents of state.json; empty before the run has started."""
        try:
            state: dict[str, Any] = json.loads((self.path / "state.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        return state

    def is_done(self) -> bool:
        """Whether the run finished training and scoring."""
        return self.state().get("status") == "done"

    def write_state(self, status: str, **fields: object) -> None:
        """Update state.json: `status` is running, stopped, done or failed; other fields are kept."""
        kept = self.state() | {"error": None} | fields
        write_json(self.path / "state.json", kept | {"status": status})

    def write_config(self, text: str, provenance: Mapping[str, object]) -> None:
        """Record what runs and where. `sessions` lists every earlier start of the same run."""
        write_text(self.path / "config.yaml", text)
        path = self.path / "provenance.json"
        earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        sessions = [*earlier.pop("sessions"), earlier] if earlier else []
        write_json(path, {**provenance, "sessions": sessions})

    def append_metrics(self, row: Mapping[str, object]) -> None:
        """Add one row to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def recent_ce(self) -> float | None:
        """Mean training loss of the last rows of metrics.jsonl, in nats per token; None without rows.

        At most ten rows, and of a short history its last quarter, so that a loss that still falls fast is
        not averaged over its fall.
        """
        path = self.path / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        losses = [float(json.loads(line)["ce"]) for line in lines[-max(1, min(10, len(lines) // 4)) :]]
        return sum(losses) / len(losses) if losses else None

    def keep_metrics_until(self, step: int) -> None:
        """Drop rows after `step`, which a resumed run is about to write again (and any torn last line)."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
        write_text(path, "".join(kept))
