"""Hostile manifests and records of stores, caches, runs, checkpoints and studies."""

from __future__ import annotations

import contextlib
import json
import shutil
from typing import TYPE_CHECKING, Any

import yaml
from any_settings import anything, broken
from fuzz_case import to_json
from hypothesis import example, given
from hypothesis import strategies as st
from manifests import change_manifest
from whole_caches import verify_cache

from tutelage.cli.show_commands import show_store
from tutelage.config.load import to_yaml, validate
from tutelage.config.run_config import RunConfig
from tutelage.data.store import open_store, verify_store
from tutelage.evals.evaluated_model import find_model
from tutelage.run_directory import RunDirectory
from tutelage.study.plan import load_plan
from tutelage.teachers.cache.reader import open_cache
from tutelage.train.checkpoint_files import damage

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fuzz_case import Tried


def manifests_of(tried: Tried) -> dict[str, Any]:  # noqa: PLR0915 - families share their files
    """Manifests and records of stores, caches, runs, checkpoints and studies, with their seals or without."""
    store, cache = tried.folder / "store", tried.folder / "cache"
    run = tried.folder / "runs" / "r-00000000"
    run.mkdir(parents=True)
    shutil.copytree(tried.folder / "llama", run / "model")
    config = validate(RunConfig, yaml.safe_load((tried.folder / "good.yaml").read_text()), "good")
    records = {
        store: json.loads((store / "manifest.json").read_text()),
        cache: json.loads((cache / "manifest.json").read_text()),
    }

    def read_store(path: Path) -> None:
        show_store(path)
        view = open_store(path).split("train")
        view.tokens[0:64]
        verify_store(path)

    def read_cache(path: Path) -> None:
        found = open_cache(path)
        found.read([0], found.manifest.layout.context_length)
        verify_cache(path)

    def sealed(path: Path, readers: Callable[[Path], None]) -> Any:
        @given(fields=broken(records[path]), with_seal=st.booleans())
        @example(
            records[path] | {"layout": {"positions": 10**15, "context_length": 2, "contexts_per_shard": 1}},
            True,
        )
        @example({name: value for name, value in records[path].items() if name != "config"}, True)
        @example(records[path] | {"config": {}, "sources": []}, True)
        def manifests(fields: Any, with_seal: bool) -> None:
            (path / "manifest.json").write_bytes(to_json(fields))
            if with_seal and isinstance(fields, dict):
                with contextlib.suppress(ValueError):
                    change_manifest(path)
            with tried.case(f"manifests of {path.name}", fields):
                readers(path)
            (path / "manifest.json").write_bytes(to_json(records[path]))

        return manifests

    files = st.sampled_from(
        [
            "state.json",
            "config.yaml",
            "metrics.jsonl",
            "provenance.json",
            "scores.jsonl",
            "model/config.json",
            "checkpoints/step-000000001/manifest.json",
        ]
    )
    good = {
        "status": "done",
        "step": 32,
        "tokens": 8000,
        "ce": 1.5,
        "data": {"store": "x"},
        "format": 1,
        "origin": {"run": "r", "recipe": {}, "replicate": 1, "shard": 1},
        "files": {"../../x": {"bytes": 1, "crc32": 1}},
        "crc32": 5,
        "sessions": [{}],
    }

    @given(name=files, fields=broken(good))
    @example("state.json", {"status": "done"})
    @example("state.json", {"status": "done", "step": "9", "tokens": None})
    @example("metrics.jsonl", {"step": None})
    def records_of_a_run(name: str, fields: Any) -> None:
        directory = RunDirectory(run)
        (run / "checkpoints/step-000000001").mkdir(parents=True, exist_ok=True)
        (run / "config.yaml").write_text(to_yaml(config))
        (run / "state.json").write_text('{"status": "done", "step": 32, "tokens": 8000}')
        (run / name).write_bytes(to_json(fields))
        with tried.case("records of a run", (name, fields)):
            directory.is_done()
            directory.last_metrics()
            directory.recent_ce()
            directory.keep_metrics_until(1)
            damage(run / "checkpoints/step-000000001")
            try:
                find_model(str(run), tried.folder / "evals")
            finally:
                shutil.copyfile(tried.folder / "llama" / "config.json", run / "model" / "config.json")

    study = tried.folder / "study"
    study.mkdir()
    plan = {
        "schema": 9,
        "name": "s",
        "runs": [{"run": "a", "kind": "student", "tokens": 5}],
        "seeds": [1],
        "claims": [1],
    }

    @given(fields=broken(plan) | anything)
    def plans(fields: Any) -> None:
        (study / "plan.json").write_bytes(to_json(fields))
        with tried.case("plans", fields):
            load_plan(study)

    return {
        "manifests of store": sealed(store, read_store),
        "manifests of cache": sealed(cache, read_cache),
        "records of a run": records_of_a_run,
        "plans": plans,
    }
