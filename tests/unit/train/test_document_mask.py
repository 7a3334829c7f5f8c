"""Runs with a document mask, against transformers reading every document by itself.

Expected values are computed here from the definition: the windows of the first step are cut where documents
begin, each piece goes through plain models alone, and the losses of all pieces are averaged.
"""

from __future__ import annotations

import itertools
import json

import pytest
import torch
import transformers as hf
from families import IDS
from training import losses

from tutelage.config.data_config import StoreConfig, TokenizerConfig
from tutelage.config.load import validate
from tutelage.config.teacher_config import TeachConfig
from tutelage.data.build import build_store
from tutelage.data.loader import Loader
from tutelage.data.store import open_store
from tutelage.errors import UserError
from tutelage.models import hub, shapes
from tutelage.run import run, run_cohort
from tutelage.run_directory import run_id
from tutelage.teachers.cache.cache_writer import write_cache

LENGTH, SEQUENCES = 32, 8


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Some 400 documents of a few words each, so that nearly every window has several."""
    folder = tmp_path_factory.mktemp("short")
    words = ["the", "state", "of", "the", "union", "is", "a", "matter", "of", "record", "and", "of", "hope"]
    texts = [" ".join((words * 3)[i % 7 : i % 7 + 2 + i * i % 23]) + f" {i}" for i in range(400)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = StoreConfig(
        name="short",
        sources=({"kind": "files", "paths": (str(folder / "a.jsonl"),)},),
        tokenizer=TokenizerConfig(vocab_size=300),
        validation=0.1,
        test=0.1,
    )
    return build_store(config, folder / "stores")


@pytest.fixture
def make(make_config, store):
    def config(**changes):
        data = {"store": str(store), "sequence_length": LENGTH, "document_mask": True}
        base = {"data": data, "tokens": LENGTH * SEQUENCES, "global_batch_tokens": LENGTH * SEQUENCES}
        return make_config(**base | changes)

    return config


@pytest.fixture
def teacher(store, tmp_path):
    """A model with other weights, in the store's tokenizer."""
    hub.save(
        hub.build(shapes.find_shape("nano-20k"), vocab(store), LENGTH, seed=9), tmp_path / "teacher", store
    )
    return tmp_path / "teacher"


def vocab(store):
    return open_store(store).vocab_size


def pieces(store):
    """The documents of the first step's windows, cut out, with the next token of each but the last."""
    split = open_store(store).split("train")
    begins = set(split.offsets[:, 0].astype(int).tolist())
    found = []
    for start in (Loader(split, LENGTH, SEQUENCES, 42).windows(0) * LENGTH).tolist():
        cuts = [start, *sorted(begins & set(range(start + 1, start + LENGTH + 1))), start + LENGTH + 1]
        found += [
            torch.from_numpy(split.tokens[a:b].astype("int64"))
            for a, b in itertools.pairwise(cuts)
            if b - a > 1
        ]
    assert len(found) > 2 * SEQUENCES
    return found


@torch.no_grad()
def alone(model, store, other=None):
    """Mean cross-entropy over all documents, each read alone, and mean KL from another model."""
    ce, kl, tokens = 0.0, 0.0, 0
    for piece_N in pieces(store):
        logp = model(input_ids=piece_N[None, :-1]).logits[0].log_softmax(-1)
        ce -= float(logp.gather(1, piece_N[1:, None]).sum())
        tokens += len(piece_N) - 1
        if other is not None:
            theirs = other(input_ids=piece_N[None, :-1]).logits[0].log_softmax(-1)
            kl += float((theirs.exp() * (theirs - logp)).sum())
    return ce / tokens, kl / tokens


def built(store, config):
    return hub.build(shapes.find_shape(config.model.shape), vocab(store), LENGTH, config.seed).eval()


def test_the_loss_of_a_packed_run_is_that_of_its_documents_alone(make, store):
    config = make()
    (row,) = losses(run(config))
    expected, _ = alone(built(store, config), store)
    assert row["ce"] == pytest.approx(expected, rel=2e-6)
    packed = make(data={"store": str(store), "sequence_length": LENGTH})
    assert packed.data.document_mask is False
    (other,) = losses(run(packed))
    assert abs(other["ce"] - expected) > 1e-5


@pytest.mark.parametrize("micro", [None, LENGTH * 2])
@pytest.mark.parametrize("how", ["live", "cached", "taught"])
def test_the_teacher_reads_the_same_documents(make, store, teacher, tmp_path, how, micro):
    kind = {"kind": "model", "path": str(teacher)}
    if how == "cached":
        kind |= {"cache": {"format": {"kind": "hidden", "dtype": "float32"}}}
    if how == "taught":
        fields = {
            "store": str(store),
            "teacher": kind,
            "format": {"kind": "hidden", "dtype": "float32"},
            "context_length": LENGTH,
            "document_mask": True,
            "output": str(tmp_path / "caches"),
        }
        kind = {"kind": "cache", "path": str(write_cache(validate(TeachConfig, fields, "test")))}
    config = make(teacher=kind, objective={"alpha": 0.5}, micro_batch_tokens=micro)
    (row,) = losses(run(config))
    theirs = hf.AutoModelForCausalLM.from_pretrained(teacher)
    ce, kd = alone(built(store, config), store, theirs)
    assert row["ce"] == pytest.approx(ce, rel=2e-6)
    assert row["kd"] == pytest.approx(kd, rel=1e-4)
    assert row["teacher_ce"] == pytest.approx(alone(theirs, store)[0], rel=2e-6)


def test_a_cohort_shares_the_mask(make, store):
    first, second = make(name="first"), make(name="second", seed=44)
    rows = [losses(directory) for directory in run_cohort([first, second])]
    for row, config in zip(rows, (first, second), strict=True):
        assert row[0]["ce"] == pytest.approx(alone(built(store, config), store)[0], rel=2e-6)
    other = make(data={"store": str(store), "sequence_length": LENGTH}, name="other")
    with pytest.raises(UserError, match=r"trained together, they read the same batches, but data is"):
        run_cohort([first, other])


def test_a_cache_of_the_other_mask_is_refused_before_training(make, store, teacher, tmp_path):
    fields = {
        "store": str(store),
        "teacher": {"kind": "model", "path": str(teacher)},
        "context_length": LENGTH,
        "output": str(tmp_path / "caches"),
    }
    path = write_cache(validate(TeachConfig, fields, "test"))
    config = make(teacher={"kind": "cache", "path": str(path)}, objective={"alpha": 0.5})
    with pytest.raises(UserError, match=r"^data.document_mask = true: teacher cache .* = false; set it to"):
        run(config)
    masked = write_cache(validate(TeachConfig, fields | {"document_mask": True}, "test"))
    assert masked != path


@pytest.mark.parametrize("part", ["model", "teacher"])
def test_a_model_that_cannot_is_refused_before_training(make, store, tmp_path, part):
    torch.manual_seed(0)
    config = hf.MambaConfig(**IDS, vocab_size=vocab(store), hidden_size=32, num_hidden_layers=2)
    hub.save(hf.MambaForCausalLM(config), tmp_path / "mamba", store)
    changes = {"model": {"path": str(tmp_path / "mamba")}}
    if part == "teacher":
        changes = {"teacher": {"kind": "model", "path": str(tmp_path / "mamba")}, "objective": {"alpha": 0.5}}
    with pytest.raises(UserError, match=rf"^{part} .*mamba: \w+ cannot keep the documents") as caught:
        run(make(**changes))
    assert "\n" not in str(caught.value)


def test_only_a_mask_that_is_on_changes_the_name_of_a_run(make, store):
    def name(**data):
        return run_id(make(data={"store": str(store), "sequence_length": LENGTH, **data}))

    assert name() == name(document_mask=False)
    assert name() != name(document_mask=True)


def test_a_start_model_with_learned_positions(make, store, tmp_path):
    """Of two positions more than the longest document has, so that positions that go on would fail."""
    torch.manual_seed(0)
    longest = max(len(piece_N) for piece_N in pieces(store))
    config = hf.GPT2Config(vocab_size=vocab(store), n_embd=32, n_layer=2, n_head=2, n_positions=LENGTH,
                           resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **IDS)  # fmt: skip
    model = hf.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.transformer.wpe.weight[longest:] = float("inf")
    expected, _ = alone(model, store)
    with torch.no_grad():
        model.transformer.wpe.weight[longest:] = 1e3
    hub.save(model, tmp_path / "start", store)
    (row,) = losses(run(make(model={"path": str(tmp_path / "start")})))
    assert row["ce"] == pytest.approx(expected, rel=2e-6)
