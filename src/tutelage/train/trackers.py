"""Send the rows of metrics.jsonl to experiment trackers (extra `trackers`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from tutelage.errors import UserError
from tutelage.installed import install_extra

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path


class Tracker(Protocol):
    """An experiment tracker."""

    def log(self, row: Mapping[str, float]) -> None:
        """Take one row of metrics.jsonl; its "step" is the x axis."""

    def close(self) -> None:
        """Flush and close."""


class _TensorBoard:
    """Event files in the run's directory."""

    def __init__(self, directory: Path, _config: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - optional

        self._writer = SummaryWriter(str(directory / "tensorboard"))

    def log(self, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            self._writer.add_scalar(f"train/{name}", value, int(row["step"]))

    def close(self) -> None:
        self._writer.close()


class _Remote:
    """A run of Weights & Biases, or of Trackio, which has the same methods."""

    def __init__(self, run: Any) -> None:  # noqa: ANN401 - the packages are optional
        self._run = run

    def log(self, row: Mapping[str, float]) -> None:
        self._run.log(dict(row), step=int(row["step"]))

    def close(self) -> None:
        self._run.finish()


def _wandb(directory: Path, config: dict[str, Any]) -> _Remote:
    """Weights & Biases; its run has the id of ours, so a resumed run continues there too."""
    import wandb  # noqa: PLC0415 - optional

    return _Remote(
        wandb.init(project="tutelage", id=directory.name, resume="allow", dir=str(directory), config=config)
    )


def _trackio(directory: Path, config: dict[str, Any]) -> _Remote:
    """Trackio, a local dashboard."""
    import trackio  # noqa: PLC0415 - optional

    return _Remote(trackio.init(project="tutelage", name=directory.name, resume="allow", config=config))


TRACKERS: dict[str, Callable[[Path, dict[str, Any]], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _wandb,
    "trackio": _trackio,
}


def open_tracker(name: str, directory: Path, config: dict[str, Any]) -> Tracker:
    """Start the tracker called `name` for the run in `directory`.

    Raises:
        UserError: its package is not installed.
    """
    try:
        return TRACKERS[name](directory, config)
    except ImportError as error:
        raise UserError(
            f"runtime.trackers: {name} needs a package ({error}); {install_extra('trackers')}"
        ) from None
