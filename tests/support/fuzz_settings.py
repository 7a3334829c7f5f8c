"""Hostile settings: any value in any field, any text as a file, any override on the command line."""

from __future__ import annotations

import contextlib
import io
import sys
from typing import TYPE_CHECKING, Any

import yaml
from any_settings import WORDS, broken, of_model
from hypothesis import example, given
from hypothesis import strategies as st

from tutelage.cli.main import main as tutelage_command
from tutelage.config.data_config import StoreConfig
from tutelage.config.load import load, to_yaml, validate
from tutelage.config.run_config import RunConfig
from tutelage.config.study_config import StudyConfig
from tutelage.config.teacher_config import TeachConfig
from tutelage.errors import UserError
from tutelage.evals.domains import Suites
from tutelage.models.devices import Hardware
from tutelage.run_directory import run_id
from tutelage.run_plan import check_fits, plan_run
from tutelage.study.cost import works_of
from tutelage.study.expand import expand
from tutelage.teachers.cache.job import plan_cache

if TYPE_CHECKING:
    from fuzz_case import Tried

_SOURCE = {"kind": "corpus", "name": "sotu"}
GOOD: dict[Any, dict[str, Any]] = {
    RunConfig: {"model": {"shape": "nano-50k"}, "data": {}, "tokens": "1M"},
    StoreConfig: {"name": "s", "sources": [_SOURCE]},
    TeachConfig: {"store": "store", "teacher": {"kind": "unigram"}},
    StudyConfig: {
        "name": "s",
        "title": "t",
        "corpus": {"name": "c", "sources": [_SOURCE]},
        "domains": {"kjv": {"source": _SOURCE}},
        "teachers": {"weak": {"shape": "nano-20k", "tokens": "400K"}},
        "students": {
            "main": {
                "shape": "nano-50k",
                "tokens": "400K",
                "grid": {"product": {"teacher": ["weak"], "alpha": [0.4]}},
            }
        },
        "seeds": [43],
    },
    Suites: {"max_documents": 1, "max_tokens": 1, "context": 2, "stride": 0.5, "domains": {}},
}
"""The least that each kind of file must say."""

KINDS = tuple(GOOD)


def settings_of(tried: Tried) -> dict[str, Any]:  # noqa: C901 - families share their files
    """Any value in any field, as far as what needs no training: plans, run ids, stores, estimates."""
    store, output = tried.folder / "store", tried.folder / "out"

    def used(config: object) -> None:
        if isinstance(config, StudyConfig):
            works_of([expand(config)])
        elif isinstance(config, RunConfig):
            run_id(config)
            plan_run(config, Hardware.named("h100", config.parallel.processes))
            check_fits([config], "cpu", 1, 1)
        elif isinstance(config, TeachConfig):
            plan_cache(config)
        if isinstance(config, RunConfig | TeachConfig | StoreConfig):
            assert validate(type(config), yaml.safe_load(to_yaml(config)), "again") == config

    @given(kind=st.sampled_from(KINDS), data=st.data())
    def fields(kind: Any, data: st.DataObject) -> None:
        some = st.lists(st.sampled_from([*kind.model_fields]), max_size=2)
        tree = data.draw(of_model(kind, some=data.draw(some)))
        tree = data.draw(broken({**GOOD[kind], **tree}, most=1))
        if kind is RunConfig and isinstance(tree, dict) and isinstance(tree.get("data"), dict):
            tree["data"] = {"store": str(store)} | tree["data"]
        with tried.case("settings", (kind.__name__, tree), output):
            used(validate(kind, tree, "file.yaml"))

    path = tried.folder / "file.yaml"
    good = tried.folder / "good.yaml"
    good.write_text(
        f"name: r\nmodel: {{shape: nano-50k}}\ndata: {{store: {store}, sequence_length: 32}}\ntokens: 8K\n"
        f"global_batch_tokens: 256\nruntime: {{device: cpu, threads: 1}}\noutput: {output}\n"
    )
    scalars = st.sampled_from(
        [
            "a",
            "*x",
            "&x 1",
            "<<: *x",
            "!!python/name:os.system",
            "!!binary aGk=",
            "no",
            "1e3",
            "'",
            '"\\ud800"',
            "\t",
            "\ufeff",
            "2020-13-45",
            "? [a]",
            "---",
            "%YAML 1.1",
            "!!int x",
            "${oc.env:HOME}",
            "name: a",
        ]
    )
    texts = st.one_of(
        st.text(alphabet="abn:{}[],*&!|>-'\"#%@? \n\t0123.eE~<", max_size=60).map(str.encode),
        st.lists(scalars, max_size=8).map(lambda parts: "\n".join(parts).encode()),
        st.binary(max_size=40),
        st.builds(
            lambda text, code: text.encode(code, "replace"),
            st.text(max_size=30),
            st.sampled_from(["utf-16", "utf-32", "latin-1", "utf-8-sig"]),
        ),
        st.builds(
            lambda part, many: (part * many).encode(),
            st.sampled_from(["[", "{a: ", "- ", "a: &a [*a]\n", "? ", "a: 1\n", "'", "x" * 1000]),
            st.sampled_from([50, 5000, 10_000]),
        ),
    )

    @given(text=texts, kind=st.sampled_from(KINDS))
    @example(b"a: &a [*a]", RunConfig)
    @example(good.read_bytes() + b"tokens: 9K\n", RunConfig)
    def files(text: bytes, kind: Any) -> None:
        path.write_bytes(text)
        with tried.case("yaml", text):
            load(kind, path)

    keys = st.lists(
        st.sampled_from(
            [
                "data",
                "optim",
                "eval",
                "domains",
                "0",
                "tokens",
                "teacher",
                "objective",
                "alpha",
                "betas",
                "output",
                "name",
                "-1",
                "",
                "\0",
                "a b",
                *RunConfig.model_fields,
            ]
        ),
        min_size=1,
        max_size=4,
    ).map(".".join)
    values = st.sampled_from(
        [
            *WORDS,
            "[1.0, 1.0]",
            "18446744073709551616",
            "1000000",
            "&a [*a]",
            "{kind: run, run: x}",
            "[[[",
            "'",
            "\ud800",
            "\0",
            f"{good}/x",
            "9" * 5000,
            "[" * 5000,
        ]
    ) | st.text(max_size=20)

    @given(
        override=st.builds("{}={}".format, keys, values) | st.text(max_size=20),
        more=st.sampled_from(
            [[], ["--device", "h100"], ["--devices", "0"], ["--device", "x"], ["--nproc", "-1"]]
        ),
    )
    @example("optim.betas=[1.0, 1.0]", [])
    @example("output=good.yaml/x", [])
    @example("name=2020-13-45", [])
    @example("seed=18446744073709551616", [])
    @example("objective.truncation={kind: top_k, k: 1000000000}", [])
    @example("optim.lr=" + "x" * 5000, [])
    @example("x" * 5000 + "=1", [])
    @example("output=a\x1b[2Jb", [])
    def overrides(override: str, more: list[str]) -> None:
        with tried.case("overrides", (override, more), output):
            if "\0" in override or "\ud800" in override:  # which no command line can hold
                load(RunConfig, good, [override])
            else:
                _typed("train", str(good), override, "--plan", *more)

    return {"settings": fields, "yaml": files, "overrides": overrides}


def _typed(*arguments: str) -> None:
    """Type a command; what it complains about is raised again."""
    sys.argv = ["tutelage", *arguments]
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            tutelage_command()
    except SystemExit as end:
        text = complaint.getvalue()
        if end.code == 2 and text.startswith("error: ") and "Traceback" not in text:
            raise UserError(text.removeprefix("error: ").rstrip("\n")) from None
        if end.code == 2 and text.startswith("Usage:"):  # typer's own words about an option
            raise UserError("usage") from None
        if end.code not in (0, None):
            raise AssertionError(f"exit code {end.code!r}: {text}") from None
