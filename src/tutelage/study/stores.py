"""The token stores of a study, built by its engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tutelage.data.config import StoreConfig, TokenizerConfig
from tutelage.data.remarks import remarks
from tutelage.data.store import open_store
from tutelage.errors import Stopped, UserError
from tutelage.signals import stop_signal
from tutelage.study.cells import teachers_of
from tutelage.study.engines.base import StoreTask
from tutelage.study.graph import Stores

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tutelage.study.claims import Claims
    from tutelage.study.engines.base import Engine
    from tutelage.study.spec import StudyConfig

_POLL_SECONDS = 0.5


def build_stores(
    study: StudyConfig, directory: Path, engine: Engine, claims: Claims, say: Callable[[str], None]
) -> Stores:
    """Build a study's token stores: the corpus, then the rest in its tokens.

    Args:
        study: the study.
        directory: of the stores.
        engine: where they are built.
        claims: of this runner, which may be asked to stop.
        say: told which text is read, and what is unusual about it.

    Raises:
        UserError: a store cannot be built.
        Stopped: on Ctrl-C or `tutelage study stop`.
    """

    def build(configs: Mapping[str, StoreConfig]) -> dict[str, Path]:
        tasks = {key: StoreTask(config=config, directory=directory) for key, config in configs.items()}
        return _perform_all(tasks, engine, claims, say)

    corpus = build({"corpus": study.corpus})["corpus"]
    tokenizer = TokenizerConfig(path=corpus)
    wanted = {
        ("domain", name): StoreConfig(
            name=name,
            sources=(spec.source,),
            tokenizer=tokenizer,
            validation=0.5,
            test=0.5,
            max_bytes=spec.max_bytes,
        )
        for name, spec in study.domains.items()
    }
    texts = [("teacher", name, spec.corpus) for name, spec in teachers_of(study).items()]
    texts += [("stage", name, spec.corpus) for name, spec in study.post_training.items()]
    wanted |= {
        (part, name): text.model_copy(update={"tokenizer": tokenizer})
        for part, name, text in texts
        if text is not None
    }
    distinct = {config.model_dump_json(): config for config in wanted.values()}
    built = build(distinct)
    places = {key: built[config.model_dump_json()] for key, config in wanted.items()}

    def of(part: str) -> dict[str, Path]:
        return {name: path for (kind, name), path in places.items() if kind == part}

    return Stores(corpus=corpus, domains=of("domain"), teachers=of("teacher"), stages=of("stage"))


def _perform_all(
    tasks: Mapping[str, StoreTask], engine: Engine, claims: Claims, say: Callable[[str], None]
) -> dict[str, Path]:
    """Build every store; the first that fails ends it."""
    waiting, running, built = list(tasks), set[str](), dict[str, Path]()
    with stop_signal() as stop:
        while waiting or running:
            for key in waiting[: engine.slots - len(running)]:
                waiting.remove(key)
                running.add(key)
                say(f"text: {tasks[key].config.name}")
                engine.start(key, tasks[key])
            for key, outcome in engine.wait(_POLL_SECONDS).items():
                running.remove(key)
                if outcome.status == "failed":
                    raise UserError(outcome.text)
                if outcome.status == "done":
                    built[key] = Path(outcome.text)
                    for line in remarks(open_store(built[key]).manifest):
                        say(f"text: {tasks[key].config.name}: {line}")
                else:  # another process is building it
                    waiting.append(key)
                    stop.wait(_POLL_SECONDS)
            if stop.is_set() or claims.is_asked_to_stop():
                raise Stopped
    return built
