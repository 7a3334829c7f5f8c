"""The comparison of a model's tokenizer with a token store's."""

import json
import shutil
from dataclasses import replace

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from tutelage.data.store import open_store
from tutelage.data.tokenizer import load_tokenizer, tokenizer_json
from tutelage.data.tokenizer_comparison import check_model_tokenizer, compare_tokenizers
from tutelage.errors import UserError

ADDED = {"id": 50_000, "content": "president", "special": False} | dict.fromkeys(
    ("single_word", "lstrip", "rstrip", "normalized"), False
)
"""A word that a tokenizer was given, beyond the ids of the store."""


@pytest.fixture
def own(store):
    return json.loads((store / "tokenizer.json").read_text(encoding="utf-8"))


@pytest.fixture
def text(store):
    return open_store(store)


def compare(tokenizer, text):
    return compare_tokenizers("teacher t", json.dumps(tokenizer), text, same_cuts=False)


def swapped(tokenizer, first, second):
    words = {index: word for word, index in tokenizer["model"]["vocab"].items()}
    words[first], words[second] = words[second], words[first]
    tokenizer["model"]["vocab"] = {words[index]: index for index in sorted(words)}
    return words[first], words[second]


def test_the_first_id_that_differs_is_named_with_both_strings(own, text):
    here, there = swapped(own, 261, 290)
    message = (
        f"teacher t: its tokenizer differs from that of {text.path}: "
        f"id 261 is {here!r} in the first and {there!r} in the second; they must share one"
    )
    with pytest.raises(UserError) as caught:
        compare(own, text)
    assert str(caught.value).startswith(message)


def test_all_ids_permuted_are_refused(own, text):
    words = sorted(own["model"]["vocab"], key=own["model"]["vocab"].get)
    own["model"]["vocab"] = {word: index for index, word in enumerate([words[0], *reversed(words[1:])])}
    with pytest.raises(UserError, match="id 1 is"):
        compare(own, text)


def test_how_a_file_is_written_does_not_count(own, text):
    assert compare(own, text) is None
    own["truncation"] = {"direction": "Right", "max_length": 512, "strategy": "LongestFirst", "stride": 0}
    own["model"]["merges"] = [" ".join(pair) for pair in own["model"]["merges"]]
    own["pre_tokenizer"]["trim_offsets"] = not own["pre_tokenizer"]["trim_offsets"]
    own["model"] |= {"byte_fallback": True, "end_of_word_suffix": ""}  # no word of it spells a byte
    own["model"] |= {"unk_token": "the"}  # its words are bytes, so it lacks no character
    own["truncation"]["max_length"] = 1
    assert compare(own, text) is None
    del own["model"]["ignore_merges"]  # as in older files
    assert compare(own, text) is None


def test_more_ids_on_the_models_side_are_fine(own, text):
    own["model"]["vocab"] |= {"<extra>": 300, "<more>": 305}
    own["added_tokens"] += [dict(own["added_tokens"][0], id=306, content="<|chat|>")]
    assert compare(own, text) is None


def test_fewer_are_not(own, text):
    gone = next(word for word, index in own["model"]["vocab"].items() if index == 299)
    del own["model"]["vocab"][gone]
    own["model"]["merges"] = [pair for pair in own["model"]["merges"] if "".join(pair) != gone]
    with pytest.raises(UserError, match=r"id 299 is nothing in the first and '.+' in the second"):
        compare(own, text)


def template(tokenizer, *, behind):
    """A post-processor that puts the end of text in front of a text, or behind it."""
    name, index = tokenizer["added_tokens"][0]["content"], tokenizer["added_tokens"][0]["id"]
    parts = [{"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": parts[::-1] if behind else parts,
        "pair": [{"Sequence": {"id": which, "type_id": 0}} for which in "AB"],
        "special_tokens": {name: {"id": name, "ids": [index], "tokens": [name]}},
    }


def test_what_a_tokenizer_puts_behind_a_text_does_not_count(own, text):
    """Stores close documents themselves."""
    own["post_processor"] = template(own, behind=True)
    assert compare(own, text) is None


def test_special_tokens_beyond_the_stores_cut_no_text(own, text):
    own["added_tokens"].append(ADDED | {"special": True})
    assert compare(own, text) is None


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda own: own.update(normalizer={"type": "Lowercase"}), "normalizer"),
        (lambda own: own["pre_tokenizer"].update(add_prefix_space=True), "pre-tokenizer"),
        (lambda own: own["model"].update(merges=own["model"]["merges"][::-1]), "merges"),
        (lambda own: own["model"].update(ignore_merges=True), "settings of the model"),
        (lambda own: own["added_tokens"][0].update(special=False), "special tokens"),
        (lambda own: own["added_tokens"].append(ADDED), "added words"),
        (lambda own: own.update(post_processor=template(own, behind=False)), "tokens in front of a text"),
    ],
)
def test_other_cuts_over_the_same_ids_are_a_note_for_models_and_an_error_for_texts(own, text, change, word):
    change(own)
    assert f"has the ids of {text.path} but other {word}, so it learned from text" in compare(own, text)
    with pytest.raises(UserError, match=f"other {word}, so .*; build the store with this tokenizer"):
        compare_tokenizers("model m", json.dumps(own), text, same_cuts=True)


def test_no_tokenizer_needs_a_word_of_the_user(text, tmp_path):
    arguments = {"what": "teacher t", "model": str(tmp_path), "store": text, "setting": "teacher.assume"}
    with pytest.raises(
        UserError, match=r"it has no tokenizer, .* or set teacher\.assume: true if you know it"
    ):
        check_model_tokenizer(**arguments)
    found = check_model_tokenizer(**arguments, assume=True)
    assert not found.is_the_stores
    assert found.notes[0].startswith("teacher t: has no tokenizer; its ids are assumed to be those of")


def test_the_assumption_does_not_cover_a_tokenizer_that_differs(own, text, tmp_path):
    swapped(own, 261, 290)
    (tmp_path / "tokenizer.json").write_text(json.dumps(own))
    with pytest.raises(UserError, match="id 261"):
        check_model_tokenizer("teacher t", str(tmp_path), text, assume=True, setting="x")


WORDS = ["</s>", "<0x00>", "a", "b", "ab", "##b"]
UNIGRAM = {"type": "Unigram", "unk_id": 0, "vocab": [[word, -2.0] for word in WORDS]}
WORDPIECE = {"type": "WordPiece", "vocab": dict(zip(WORDS, range(9), strict=False)), "unk_token": "a"} | {
    "continuing_subword_prefix": "##",
    "max_input_chars_per_word": 100,
}

BPE = {"type": "BPE", "vocab": WORDPIECE["vocab"], "merges": [["a", "b"]], "unk_token": "a"}


@pytest.mark.parametrize(
    ("model", "change", "word"),
    [
        (UNIGRAM, {"vocab": [*UNIGRAM["vocab"][:4], ["ab", -9.0], ["##b", -2.0]]}, "scores of words"),
        (UNIGRAM, {"byte_fallback": True}, "settings of the model"),
        (WORDPIECE, {"max_input_chars_per_word": 1}, "settings of the model"),
        (WORDPIECE, {"unk_token": "b"}, "ids for characters that it lacks"),
        (UNIGRAM, {"unk_id": 1}, "ids for characters that it lacks"),
        (BPE, {"unk_token": "b"}, "ids for characters that it lacks"),
        (BPE, {"unk_token": None}, "ids for characters that it lacks"),
        (BPE, {"fuse_unk": True}, "ids for characters that it lacks"),
        (BPE, {"dropout": 1.0}, "settings of the model"),
    ],
)
def test_models_of_other_kinds_that_cut_otherwise_are_known(own, text, tmp_path, model, change, word):
    settings = own | {"normalizer": None, "pre_tokenizer": None, "post_processor": None, "added_tokens": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings | {"model": model}))
    stored = replace(text, path=tmp_path)
    assert compare({"model": model} | settings | {"model": model}, stored) is None  # in another order
    other = settings | {"model": model | change}
    ours, theirs = (
        [encoding.ids for encoding in Tokenizer.from_str(json.dumps(each)).encode_batch(["ab", "\0", "éé"])]
        for each in (settings | {"model": model}, other)
    )
    assert ours != theirs
    assert f"but other {word}, so it learned" in compare(other, stored)


def test_last_digits_of_scores_do_not_count(own, text, tmp_path):
    """The library changes them whenever it reads and writes a file."""
    settings = own | {"normalizer": None, "pre_tokenizer": None, "post_processor": None, "added_tokens": []}
    here, there = (
        settings | {"model": UNIGRAM | {"vocab": [[word, score] for word in WORDS]}}
        for score in (-6.123456789012345, -6.123456789012346)
    )
    (tmp_path / "tokenizer.json").write_text(json.dumps(there))
    assert compare(here, replace(text, path=tmp_path)) is None


def test_other_ends_and_other_chat_templates_are_noted(text, store, tmp_path):
    """The ids are the store's and text is cut as there, but the model was not trained on such text."""
    here, there = tmp_path / "model", tmp_path / "store"
    for place in (here, there):
        place.mkdir()
        shutil.copy(store / "tokenizer.json", place)

    def found(theirs, stored):
        (here / "tokenizer_config.json").write_text(json.dumps(theirs))
        (there / "tokenizer_config.json").write_text(json.dumps(stored))
        told = check_model_tokenizer("model m", str(here), replace(text, path=there), setting="x")
        assert told.is_the_stores
        return told.notes

    chat, end = {"chat_template": "{{ 1 }}"}, {"eos_token": "<|endoftext|>"}
    assert found(end | chat, end | chat) == found(end | chat, end) == found({}, end | chat) == ()
    assert found(end | {"eos_token": {"content": "!"}}, end | chat) == (
        f"model m: it ends texts with '!', and those of {there} end with '<|endoftext|>'",
    )
    assert found(end | chat, end | {"chat_template": "{{ 2 }}"}) == (
        f"model m: its chat template is not the one by which {there} was written",
    )


def old_files(own, folder):
    """vocab.json and merges.txt, as GPT-2 has them."""
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(own["model"]["vocab"]), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in own["model"]["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_older_files_are_converted(own, text, tmp_path):
    folder = old_files(own, tmp_path / "old")
    found = check_model_tokenizer("teacher t", str(folder), text, setting="x")
    assert found.notes == ()
    assert found.ids == 300
    assert load_tokenizer(folder).eos_id == text.eos_id
    swapped(own, 261, 290)
    with pytest.raises(UserError, match="id 261"):
        check_model_tokenizer("teacher t", str(old_files(own, tmp_path / "other")), text, setting="x")


def test_a_converted_tokenizer_cuts_text_as_its_class_does(own, text, tmp_path):
    folder = old_files(own, tmp_path / "old")
    words = "The state of our Union is strong, isn't it?"
    converted = Tokenizer.from_str(tokenizer_json(folder))
    assert converted.encode(words).ids == AutoTokenizer.from_pretrained(folder)(words)["input_ids"]
    stored = Tokenizer.from_file(str(text.path / "tokenizer.json"))
    assert converted.encode(words).ids == stored.encode(words).ids


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model"])
def test_what_cannot_be_converted_is_one_line(text, name, tmp_path):
    (tmp_path / name).write_bytes(b"no sentencepiece model")
    with pytest.raises(
        UserError, match=r"has no tokenizer\.json, and|there is no tokenizer\.json, and"
    ) as caught:
        check_model_tokenizer("teacher t", str(tmp_path), text, assume=True, setting="x")
    assert "\n" not in str(caught.value)


def test_a_damaged_tokenizer_is_one_line(text, store, tmp_path):
    shutil.copy(store / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json is not one"):
        check_model_tokenizer("teacher t", str(tmp_path), text, setting="x")
