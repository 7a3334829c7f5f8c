"""The texts of a study: the token stores that they become, and the runs that they are too short for."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from tutelage.config.data_config import StoreConfig, TokenizerConfig
from tutelage.data.corpora import check_installed
from tutelage.data.store import open_store
from tutelage.data.store_manifest import SCORED, read_manifest
from tutelage.errors import UserError
from tutelage.study.nodes import Cost, check_cells

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from tutelage.config.run_config import RunConfig
    from tutelage.data.store_manifest import Manifest
    from tutelage.study.cells import Cell
    from tutelage.study.expand import ExpandedStudy
    from tutelage.study.nodes import Node

    Stores = dict[tuple[str, str], StoreConfig]


def other_texts(expanded: ExpandedStudy, corpus: Path) -> Stores:
    """Settings of the token stores besides that of the corpus, by part of the study file and name.

    Args:
        expanded: the study.
        corpus: where the store of the corpus lies, in whose tokens all others are.
    """
    study, tokenizer = expanded.study, TokenizerConfig(path=corpus)
    domains = {
        name: StoreConfig(
            name=name,
            sources=(spec.source,),
            tokenizer=tokenizer,
            validation=0.5,
            test=0.5,
            max_bytes=spec.max_bytes,
        )
        for name, spec in study.domains.items()
    }
    texts = [("domain", name, text) for name, text in domains.items()]
    texts += [("teacher", name, spec.corpus) for name, spec in expanded.teachers.items() if spec.corpus]
    texts += [("stage", name, spec.corpus) for name, spec in study.post_training.items()]
    chatty = study.corpus.tokenizer  # the store of plain text keeps no chat template
    return {
        (part, name): text.model_copy(update={"tokenizer": chatty if text.uses_chat else tokenizer})
        for part, name, text in texts
    }


def check_corpora(expanded: ExpandedStudy) -> None:
    """Check that the named corpora of all texts are installed, so that none is missed after others are built.

    Raises:
        UserError: some are not; the message has the command that installs them.
    """
    texts = [expanded.study.corpus, *other_texts(expanded, Path()).values()]
    check_installed([source for text in texts for source in text.sources], "sources of the study")


def check_texts(nodes: Sequence[Node]) -> list[str]:
    """Check that the training text of every run is long enough for it.

    Returns:
        Remarks on scored texts that are shorter than the windows of the runs.

    Raises:
        UserError: a text would repeat, which flatters any teacher, as a regulariser; or it has no sequence of
            the length asked for, or steps without anything to learn. The message names the run.
    """
    store_at, remarks = cache(open_store), dict[str, None]()
    for node in nodes:
        config, store = node.config, store_at(node.config.data.store)
        if (lack := _lack(node.cell, config, node.cost.tokens, store.manifest)) is not None:
            raise UserError(f"{node.id}: {lack}")
        if store.manifest.masked:
            from tutelage.data.loader import run_loader  # noqa: PLC0415 - loads torch

            run_loader(config, store, node.cost.tokens // config.global_batch_tokens)
        for domain in config.eval.domains:
            remarks |= dict.fromkeys(_short(domain.name, store_at(domain.store).manifest, config))
    return list(remarks)


def foreseen(expanded: ExpandedStudy, built: Sequence[Manifest]) -> list[str]:
    """What `check_texts` would say of the texts that are token stores already.

    Args:
        expanded: the study, of which nothing need be built.
        built: as `built_texts` finds them; they are known by the settings they were built with.
    """
    corpus = _built_as(expanded.study.corpus, built)
    if corpus is None:
        return []
    others = {key: _built_as(config, built) for key, config in other_texts(expanded, Path()).items()}
    scored = {expanded.study.in_domain: corpus}
    scored |= {name: text for (part, name), text in others.items() if part == "domain" and text is not None}
    drafts, found = check_cells(expanded), dict[str, None]()
    for cell in expanded.cells:
        config = drafts[cell.name]
        own = ("teacher", str(cell.teacher)) if cell.kind == "teacher" else ("stage", str(cell.stage))
        text = others.get(own, corpus)
        cost = Cost.of(cell, config, expanded.teachers, corpus.vocab_size)
        if text is not None and (lack := _lack(cell, config, cost.tokens, text)) is not None:
            found[f"corpus {text.name}: {lack}"] = None
        for name, manifest in scored.items():
            found |= dict.fromkeys(_short(name, manifest, config))
    return list(found)


def _lack(cell: Cell, config: RunConfig, tokens: int, text: Manifest) -> str | None:
    """Say why a text is too short to train a run on `tokens` of it; None if it is long enough."""
    length, has = config.data.sequence_length, text.splits["train"].tokens
    whole = max(0, has - 1) // length * length
    if whole == 0:
        return (
            f"a sequence takes {length + 1:,} tokens (data.sequence_length and the token after it), and the "
            f"training split has {has:,}; add text, or make sequences shorter"
        )
    if tokens > whole and cell.kind != "after":
        return (
            f"{tokens:,} tokens are more than the {whole:,} in whole sequences of the training split, so "
            "text would repeat; lower the budget or add text"
        )
    return None


def _short(name: str, text: Manifest, config: RunConfig) -> Iterator[str]:
    """Remark on splits of a scored text that do not fill a window."""
    for split in SCORED:
        if (tokens := text.splits[split].tokens) < config.data.sequence_length:
            yield (
                f"text {name}: its {split} split has {tokens:,} tokens, less than one window of "
                f"{config.data.sequence_length:,}: scores on it say little; add text"
            )


def training_tokens(expanded: ExpandedStudy, built: Sequence[Manifest]) -> int | None:
    """Tokens of the training text; None where it is no token store yet. `built` as in `foreseen`."""
    corpus = _built_as(expanded.study.corpus, built)
    return None if corpus is None else corpus.splits["train"].tokens


def built_texts(directory: Path) -> list[Manifest]:
    """The manifests of token stores that the study in `directory` may be about, the newest first.

    They lie in its data/, and in stores/ of the working directory.
    """
    found = _manifests([directory / "data", Path("stores")])
    return sorted(found, key=lambda one: one.created, reverse=True)


def _manifests(places: Iterable[Path]) -> Iterator[Manifest]:
    """The manifests of the token stores in some directories, but for damaged ones."""
    for path in (path for place in places for path in place.glob("*/manifest.json")):
        try:
            yield read_manifest(path.parent)
        except UserError:  # who builds or opens it is told
            continue


def _built_as(config: StoreConfig, built: Iterable[Manifest]) -> Manifest | None:
    """The first store with these settings, wherever the tokenizer lies that it was given."""

    def text(settings: dict[str, object]) -> dict[str, object]:
        given = isinstance(tokenizer := settings["tokenizer"], dict) and tokenizer["path"] is not None
        return settings | ({"tokenizer": None} if given else {})

    wanted = text(config.model_dump(mode="json"))
    return next((one for one in built if text({**one.config}) == wanted), None)
