"""Find a model to evaluate, a run or any Hugging Face model, and the directory of its scores."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tutelage import provenance
from tutelage.data.tokenizer import TextTokenizer, load_tokenizer
from tutelage.data.tokenizer_comparison import check_rows
from tutelage.errors import UserError, check_visible, one_line
from tutelage.evals.domains import SUITES
from tutelage.hub_access import downloaded
from tutelage.models.devices import Hardware
from tutelage.models.directory import ModelState, weights_fingerprint
from tutelage.models.forward_memory import may_not_fit
from tutelage.models.packed import trained_length
from tutelage.names import completed, located, look_up, nearest
from tutelage.run_directory import RunDirectory
from tutelage.types import TOKENIZER_FILES, Score

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from tutelage.evals.token_scores import ScoreEstimate
    from tutelage.progress import Progress
    from tutelage.types import ScoreRole, Split

_HUB_NAME = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
_NEEDED = ("*.json", "*.safetensors", *TOKENIZER_FILES)


@dataclass(frozen=True, slots=True)
class EvaluatedModel:
    """A model to evaluate.

    Attributes:
        id: run id, or `<name>-<first 8 digits of the weights' fingerprint>`.
        model: local Hugging Face directory with weights and tokenizer.
        context: the longest sequence it was trained on, in tokens; without positions, the suites' context.
        output: directory of its scores; it need not exist yet.
        step: optimizer steps it has taken; 0 for a model that is not a run.
        tokens: training tokens it has seen; 0 for a model that is not a run.
        training_store: token store a run was trained on; None for other models.
        state: of its files when they were identified; None: the model is in memory.
    """

    id: str
    model: Path
    context: int
    output: Path
    step: int = 0
    tokens: int = 0
    training_store: Path | None = None
    state: ModelState | None = None

    @property
    def scores(self) -> Path:
        """Rows of `tutelage.types.Score`."""
        return self.output / "scores.jsonl"

    @property
    def documents(self) -> Path:
        """Per-document losses behind the scores."""
        return self.output / "documents.parquet"

    @property
    def samples(self) -> Path:
        """Continuations that the model wrote, for people to read."""
        return self.output / "samples.md"

    @property
    def calibration(self) -> Path:
        """Fits and reliability curves behind the scores, by domain."""
        return self.output / "calibration.json"

    def score(
        self,
        domain: str,
        role: ScoreRole,
        split: Split,
        metric: str,
        estimate: ScoreEstimate,
        n: int,
        version: str,
        *,
        higher_is_better: bool = False,
        fit_error: float | None = None,
    ) -> Score:
        """A score of this model, with the code version that measured it."""
        return Score(
            run=self.id,
            step=self.step,
            tokens=self.tokens,
            domain=domain,
            role=role,
            split=split,
            metric=metric,
            value=estimate.value,
            stderr=estimate.stderr,
            n=n,
            higher_is_better=higher_is_better,
            version=version,
            low=estimate.low,
            high=estimate.high,
            fit_error=fit_error,
            code=provenance.code(),
        )


def find_model(argument: str, output: Path) -> EvaluatedModel:
    """Find the model that `argument` names; a model on the Hub is downloaded.

    Args:
        argument: a run directory or its name, a Hugging Face model directory, or a name on the Hub.
        output: the scores of models that are not runs go to `<output>/<id>`.

    Raises:
        UserError: there is no such model, it has no weights, or the run has not finished training; or
            several runs are called so.
    """
    path = Path(argument).expanduser()
    if not path.exists():
        check_visible(path)
        path = look_up("run", path, "model") or completed(path, "model")
    if path.is_dir():
        is_run = (path / "config.yaml").exists() or (path / "state.json").exists()
        return _run(path) if is_run else _model(path, path.resolve().name, output)
    if path.exists() or argument.startswith((".", "/", "~")) or not _HUB_NAME.match(argument):
        raise UserError(f"{argument}: no such directory or run; give a run, a model directory or a Hub name")
    return _model(_downloaded(argument), argument.rsplit("/", 1)[-1], output)


def find_models(arguments: Sequence[str], output: Path) -> list[EvaluatedModel]:
    """As `find_model`, each model once.

    Raises:
        UserError: also if two directories have the same name, under which their scores would be mixed.
    """
    found = {
        evaluated.output.resolve(): evaluated for evaluated in (find_model(one, output) for one in arguments)
    }
    named: dict[str, Path] = {}
    for place, evaluated in found.items():
        other = named.setdefault(evaluated.id.casefold(), place)
        if other != place:
            raise UserError(
                f"{other} and {place}: both are called {evaluated.id}, so their scores would be shown as one "
                "model's; evaluate them one at a time"
            )
    return [*found.values()]


def _run(path: Path) -> EvaluatedModel:
    directory = RunDirectory(path.resolve())
    state = directory.state()
    if directory.lacks_weights():
        raise UserError(f"{path}: {directory.to_have_model()}")
    if not directory.model.is_dir() and state.get("status") == "done":
        raise UserError(f"{path}: its model is not there; {directory.to_have_model()}")
    if not directory.model.is_dir():
        progress = (
            f"{state.get('status', 'not started')}, step {state.get('step', 0)} of {state.get('steps', '?')}"
        )
        raise UserError(
            f"{path}: the run has not finished training ({progress}); `tutelage train` resumes it"
        )
    model_state = ModelState.of(directory.model)
    weights_fingerprint(directory.model)
    config = directory.config()
    if not all(isinstance(state.get(field), int) for field in ("step", "tokens")):
        raise UserError(f"{path / 'state.json'}: damaged: it does not say how far the run was trained")
    return EvaluatedModel(
        id=directory.id,
        model=directory.model,
        step=int(state["step"]),
        tokens=int(state["tokens"]),
        context=config.data.sequence_length,
        output=directory.path,
        training_store=located(config.data.store, config, directory.path),
        state=model_state,
    )


def _model(path: Path, name: str, output: Path) -> EvaluatedModel:
    state = ModelState.of(path)
    identity = f"{name}-{weights_fingerprint(path)[:8]}"
    context = trained_length(_config(path)) or SUITES.context  # some families have no such number
    return EvaluatedModel(identity, path, context, output / identity, state=state)


def load_evaluated(evaluated: EvaluatedModel, device: torch.device, progress: Progress) -> PreTrainedModel:
    """The model, in eval mode on a device.

    Args:
        evaluated: the model.
        device: where it is to be.
        progress: warned before it is loaded if its weights alone may not fit into what is free.

    Raises:
        UserError: it cannot be loaded, or was written since it was identified.
    """
    from tutelage.models.hub import load  # noqa: PLC0415 - torch, which a wrong name need not cost

    if evaluated.state is not None:
        weights = {"weights": evaluated.state.weight_bytes}
        here = Hardware.here(device.type, 1, 1)
        if warning := may_not_fit(evaluated.id, weights, "loading of the model", here):
            progress.note(f"warning: {warning}")
    model = load(evaluated.model)
    if evaluated.state is not None:
        evaluated.state.refuse_change()
    return model.to(device)


def padded_ids(model: PreTrainedModel, vocab_size: int) -> list[int] | None:
    """Ids that the head has and the tokenizer lacks, for `suppress_tokens`; None if there are none."""
    return [*range(vocab_size, model.get_output_embeddings().weight.shape[0])] or None


def _config(path: Path) -> PretrainedConfig:
    from transformers import AutoConfig  # noqa: PLC0415 - seconds that a wrong name need not cost

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - a wrong field can raise anything
        reason = one_line(error)
        raise UserError(f"{path}: no model that transformers knows: {reason}") from None


def _downloaded(name: str) -> Path:
    def has_weights(directory: Path) -> bool:
        return any(directory.glob("*.safetensors"))

    what = f"{name}: {nearest('run', name)}no run is called so"
    return downloaded(what, name, None, _NEEDED, has_weights)


def check_tokenizer(evaluated: EvaluatedModel) -> TextTokenizer:
    """The model's own tokenizer.

    Raises:
        UserError: there is none, or it has ids beyond the model's vocabulary.
    """
    tokenizer = load_tokenizer(evaluated.model)
    rows = _config(evaluated.model).get_text_config(decoder=True).vocab_size
    check_rows(str(evaluated.model), tokenizer.vocab_size, rows)
    return tokenizer
