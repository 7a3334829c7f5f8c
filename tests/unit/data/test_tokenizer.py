"""Training, loading and using tokenizers."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from tutelage.data.corpora import find_corpus
from tutelage.data.tokenizer import END_OF_TEXT, TextTokenizer, load_tokenizer, train_tokenizer
from tutelage.errors import UserError

TEXTS = [  # code too, so that there are merges of spaces and line ends
    text[:10_000]
    for name in ("sotu", "python_source")
    for text in itertools.islice(find_corpus(name).documents(), 20)
]
TRAINED = train_tokenizer(TEXTS, 400)

awkward = st.text(
    st.one_of(
        st.sampled_from(
            " \n\t\r\v\f\x0b\x1c\x1f\x85\xa0\u2003\u2028\u3000\u200b'\"!.abcsdtmrevl0189é漢🙂\u0301²Ⅷ"
        ),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=60,
)


def ids_of(tokenizer: TextTokenizer, *texts: str) -> list[list[int]]:
    return [np.frombuffer(data, tokenizer.dtype).tolist() for data in tokenizer.encoder()(texts)]


def test_trained_one_has_the_promised_shape():
    assert (TRAINED.vocab_size, TRAINED.eos_id, TRAINED.end_of_text) == (400, 0, END_OF_TEXT)
    assert TRAINED.dtype == np.dtype("<u2")
    assert len(TRAINED.sha256) == 64


def test_little_text_gives_a_smaller_vocabulary():
    assert train_tokenizer(["ab ab"], 1000).vocab_size == 257 + 2  # "ab" and " ab"


@settings(max_examples=300, deadline=None)
@given(awkward)
def test_text_comes_back_exactly_and_as_the_library_encodes_it(text):
    library = Tokenizer.from_str(TRAINED.json)
    library.encode_special_tokens = True
    (ids,) = ids_of(TRAINED, text)
    assert ids == library.encode(text, add_special_tokens=False).ids
    assert library.decode(ids, skip_special_tokens=False) == text


def test_real_code_as_the_library_encodes_it():
    library = Tokenizer.from_str(TRAINED.json)
    texts = list(itertools.islice(find_corpus("python_source").documents(), 12))
    assert ids_of(TRAINED, *texts) == [encoding.ids for encoding in library.encode_batch(texts)]


def test_a_document_cannot_fake_an_end_of_text():
    (ids,) = ids_of(TRAINED, f"one {END_OF_TEXT} two")
    assert TRAINED.eos_id not in ids
    assert Tokenizer.from_str(TRAINED.json).decode(ids) == f"one {END_OF_TEXT} two"


def test_a_word_of_a_quarter_of_a_megabyte_takes_as_long_as_text_of_that_length():
    encode = TRAINED.encoder()
    text = "who went to the market and bought apples for her sister. " * 4000
    words = ["a" * len(text), "".join(chr(97 + (i * i) % 26) for i in range(len(text))), " " * len(text)]

    def took(text):
        began = time.process_time()
        encode([text])
        return time.process_time() - began

    whole = TRAINED.library(markup=False)
    began = time.process_time()
    whole.encode(text)
    as_text = time.process_time() - began
    assert max(took(word) for word in words) < 5 * as_text


def test_training_is_deterministic_over_processes_and_threads():
    code = (
        "import itertools\nfrom tutelage.data.corpora import find_corpus\n"
        "from tutelage.data.tokenizer import train_tokenizer\n"
        "texts = [t[:10_000] for name in ('sotu', 'python_source')\n"
        "         for t in itertools.islice(find_corpus(name).documents(), 20)]\n"
        "print(train_tokenizer(texts, 400).sha256)"
    )
    environment = {"TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == TRAINED.sha256


def test_an_error_while_reading_comes_through():
    def texts():
        yield "one"
        raise UserError("a.txt: damaged")

    with pytest.raises(UserError, match=r"a\.txt: damaged"):
        train_tokenizer(texts(), 300)


def test_saved_one_loads_the_same_here_and_in_transformers(tmp_path):
    TRAINED.save(tmp_path)
    assert load_tokenizer(tmp_path) == TRAINED
    assert load_tokenizer(tmp_path / "tokenizer.json") == TRAINED
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = TEXTS[0][:3000] + "  two  spaces , and a comma"
    assert [theirs(text)["input_ids"]] == ids_of(TRAINED, text)
    assert theirs.decode(theirs(text)["input_ids"]) == text
    assert (theirs.eos_token, theirs.eos_token_id) == (END_OF_TEXT, 0)


# ----------------------------------------------------------------------------------- ready tokenizers


def word_level(*special: str, **fields) -> Tokenizer:
    """A tokenizer of another family: lower-cased words, with padding and truncation switched on."""
    words = ["zero", "one", "two", *special]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=8)
    return tokenizer


def test_other_families_encode_whole_texts(tmp_path):
    word_level("</s>").save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert (loaded.end_of_text, loaded.eos_id, loaded.vocab_size) == ("</s>", 3, 4)
    assert ids_of(loaded, "One two", "two two one two") == [[1, 2], [2, 2, 1, 2]]
    loaded.save(tmp_path)
    again = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))  # as probes and tasks read it
    assert [again.encode(text).ids for text in ("One two", "two two one two")] == [[1, 2], [2, 2, 1, 2]]


def test_a_text_has_the_same_tokens_each_time_though_merges_were_dropped_in_training(tmp_path):
    settings = json.loads(TRAINED.json)
    settings["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    text = "Fellow citizens of the Senate and House of Representatives"
    assert ids_of(load_tokenizer(tmp_path), text) == ids_of(TRAINED, text)


def test_added_tokens_may_reach_over_spaces(tmp_path):
    tokenizer = Tokenizer.from_str(TRAINED.json)
    tokenizer.add_tokens(["the people"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    text = "For the people of the United States"
    assert 400 in ids_of(loaded, text)[0]
    assert ids_of(loaded, text) == [tokenizer.encode(text).ids]


@pytest.mark.parametrize("token", ["<|im_end|>", {"content": "<|im_end|>", "lstrip": False}])
def test_a_directory_says_what_ends_a_text(tmp_path, token):
    word_level("</s>", "<|im_end|>").save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).end_of_text == "</s>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
    assert load_tokenizer(tmp_path).end_of_text == "<|im_end|>"
    assert load_tokenizer(tmp_path / "tokenizer.json").end_of_text == "</s>"


def test_a_word_that_a_tokenizer_learned_from_text_ends_none_where_a_special_token_does(tmp_path):
    words = {word: n for n, word in enumerate(["zero", "one", END_OF_TEXT, "</s>"])}
    tokenizer = Tokenizer(models.WordLevel(words))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert (loaded.end_of_text, loaded.eos_id) == ("</s>", 3)
    assert ids_of(loaded, f"one {END_OF_TEXT}") == [[1, 2]]  # a word like others, as the tokenizer has it


def test_large_vocabulary_needs_four_bytes():
    assert TextTokenizer("", "", 65_536, 0).dtype == np.dtype("<u2")
    assert TextTokenizer("", "", 65_537, 0).dtype == np.dtype("<u4")


def test_bad_tokenizers_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"there is no tokenizer\.json in this directory$"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"tokenizer .*tokenizer\.json: cannot be read \(No such file"):
        load_tokenizer(tmp_path / "tokenizer.json")
    (model := tmp_path / "run" / "model").mkdir(parents=True)
    word_level("</s>").save(str(model / "tokenizer.json"))
    with pytest.raises(UserError, match=r"no tokenizer\.json .*; that of this run is in .*run.model$"):
        load_tokenizer(tmp_path / "run")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"not a tokenizer\.json"):
        load_tokenizer(tmp_path)
    word_level().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"expected <\|endoftext\|> or </s> or .* names its eos_token$"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    with pytest.raises(UserError, match=r"expected the eos_token '<end>' of its tokenizer_config\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: not a JSON object"):
        load_tokenizer(tmp_path)


FIND = """
import sys
from pathlib import Path
from tutelage.data.tokenizer import find_tokenizer
from tutelage.errors import UserError
try:
    print(find_tokenizer(Path(sys.argv[1])))
except UserError as error:
    print(error)
"""


def found(name, home, folder) -> str:
    """What `find_tokenizer` says in a process whose downloads lie in `home`, without a network."""
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", FIND, name]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_hub_name_stands_for_what_was_downloaded(tmp_path):
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    repository = home / "hub" / "models--some--model"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    TRAINED.save(snapshot)
    elsewhere.mkdir()
    assert found("some/model", home, elsewhere) == str(snapshot)
    assert load_tokenizer(snapshot) == TRAINED
    (elsewhere / "some" / "model").mkdir(parents=True)
    assert found("some/model", home, elsewhere) == "some/model"  # what is here comes first
    message = found("some/other", home, elsewhere)
    assert message.startswith(
        "tokenizer.path = some/other: not on this machine, not among earlier downloads ("
    )
    assert found("stores/a/b", home, elsewhere) == "stores/a/b"  # no Hub name: not asked for
