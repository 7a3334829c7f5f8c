"""A model loaded weight by weight is the one that transformers loads, or is refused in the same cases."""

import json
import shutil

import pytest
import torch
import transformers as hf
from families import FAMILIES, GROUPED
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file
from test_families import written

from tutelage.errors import UserError
from tutelage.models import hub, slices

CPU = torch.device("cpu")
TOKENS_BT = (torch.arange(2 * 32).reshape(2, 32) * 7) % 300


def assert_same(found, expected):
    for ours, theirs in (
        (found.state_dict(), expected.state_dict()),
        (dict(found.named_buffers()), dict(expected.named_buffers())),
    ):
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype, name
            assert torch.equal(ours[name], tensor), name
    with torch.no_grad():
        logits = [one(input_ids=TOKENS_BT, use_cache=False).logits for one in (found, expected)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_buffers_and_logits_are_those_of_transformers(family, tmp_path):
    written(family, tmp_path)
    for dtype in (None, torch.bfloat16):
        expected = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype or "auto")
        found = slices.describe(tmp_path, dtype=dtype).load(CPU)
        assert not found.training
        assert_same(found, expected)


@pytest.fixture
def tied(tmp_path):
    """A model whose head is its input embedding, in two files."""
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, tie_word_embeddings=True))
    model.save_pretrained(tmp_path / "tied", max_shard_size="50KB")
    return tmp_path / "tied"


def rewritten(directory, change):
    """The directory with one file, whose weights were changed."""
    weights = {}
    for path in sorted(directory.glob("*.safetensors")):
        weights |= load_file(path)
        path.unlink()
    (directory / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file(change(weights), directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_several_files_and_tied_weights(tied):
    assert len(list(tied.glob("*.safetensors"))) > 1
    found = slices.describe(tied).load(CPU)
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert_same(found, hub.load(tied))


@pytest.mark.parametrize("left_out", ["lm_head.weight", "model.embed_tokens.weight", None])
def test_a_tied_weight_may_have_either_name_or_both(left_out, tied):
    expected = hub.load(tied)

    def change(weights):
        both = weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
        return {name: weight for name, weight in both.items() if name != left_out}

    assert_same(slices.describe(rewritten(tied, change)).load(CPU), expected)


def test_tied_names_with_two_weights_are_refused(tied):
    rewritten(tied, lambda weights: weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + 1})
    with pytest.raises(UserError, match=r"are one weight .* the files hold two that differ"):
        slices.describe(tied).load(CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {k: v for k, v in w.items() if "layers.1.mlp.up" not in k},
         r"1 weight is missing, for example model\.layers\.1\.mlp\.up_proj\.weight"),
        (lambda w: w | {"model.layers.7.mlp.up_proj.weight": torch.zeros(2)},
         r"config\.json speaks of fewer layers than there are weights, for example model\.layers\.7"),
        (lambda w: w | {"model.norm.weight": torch.full((32,), torch.inf)},
         r"model\.norm\.weight holds numbers that are not finite"),
        (lambda w: w | {"model.norm.weight": torch.zeros(31)},
         r"model\.norm\.weight is \(31,\) in its file, and config\.json says \(32,\)"),
    ],
    ids=["missing", "unexpected", "not finite", "shape"],
)  # fmt: skip
def test_what_is_wrong_with_the_weights_is_one_line(change, message, tied):
    rewritten(tied, change)
    with pytest.raises(UserError, match=message) as caught:
        slices.describe(tied).load(CPU)
    assert "\n" not in str(caught.value)


def test_what_transformers_does_not_use_is_left_out(tied):
    expected = hub.load(tied)
    rewritten(tied, lambda weights: weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert_same(slices.describe(tied).load(CPU), expected)


def test_a_base_model_has_no_head_and_is_refused_for_it(tmp_path):
    torch.manual_seed(0)
    hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)).model.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match=r"1 weight is missing, for example lm_head\.weight"):
        slices.describe(tmp_path / "base").load(CPU)


def test_names_of_a_base_model_are_found(tied):
    expected = hub.load(tied)
    found = rewritten(tied, lambda weights: {k.removeprefix("model."): v for k, v in weights.items()})
    assert_same(slices.describe(found).load(CPU), expected)


def test_experts_of_a_wrong_shape_are_one_line(tmp_path):
    written("mixtral", tmp_path)
    name = "model.layers.0.block_sparse_moe.experts.2.w1.weight"
    rewritten(tmp_path, lambda weights: weights | {name: torch.zeros(3, 3)})
    with pytest.raises(UserError, match=r"experts\.gate_up_proj cannot be made of its files: ") as caught:
        slices.describe(tmp_path).load(CPU)
    assert "\n" not in str(caught.value)


def test_weights_keep_their_saved_dtype_where_config_names_none(tied):
    rewritten(tied, lambda weights: {name: weight.bfloat16() for name, weight in weights.items()})
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "dtype"}))
    assert slices.describe(tied).model.dtype == torch.bfloat16
    assert slices.describe(tied, dtype=torch.float32).load(CPU).dtype == torch.float32


def test_what_a_family_keeps_in_float32_stays_so(tmp_path):
    torch.manual_seed(0)
    config = hf.Dots1Config(**GROUPED, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2,
                            n_group=1, topk_group=1, n_shared_experts=1, first_k_dense_replace=1)  # fmt: skip
    hf.Dots1ForCausalLM(config).save_pretrained(tmp_path / "dots")
    expected = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "dots", dtype=torch.bfloat16)
    found = slices.describe(tmp_path / "dots", dtype=torch.bfloat16).load(CPU)
    assert len({weight.dtype for weight in expected.state_dict().values()}) == 2
    assert_same(found, expected)


@pytest.mark.parametrize("files", ["one", "several"])
def test_a_model_on_the_hub_is_downloaded_file_by_file(files, tied, tmp_path, monkeypatch):
    if files == "one":
        rewritten(tied, dict)
    asked = []

    def download(name, file, revision=None):
        assert (name, revision) == ("some/model", "v1")
        asked.append(file)
        if not (tied / file).exists():
            raise EntryNotFoundError(file)
        (tmp_path / "cache").mkdir(exist_ok=True)
        return shutil.copy(tied / file, tmp_path / "cache" / file)

    monkeypatch.setattr(slices, "hf_hub_download", download)
    found = slices._downloaded_files("some/model", "v1")
    assert sorted(path.name for path in found) == sorted(path.name for path in tied.glob("*.safetensors"))
    assert asked[:2] == ["config.json", "model.safetensors.index.json"]


def test_a_config_of_no_language_model_is_one_line(tied):
    (tied / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UserError, match="cannot be loaded as a causal language model") as caught:
        slices.describe(tied)
    assert "\n" not in str(caught.value)
