"""Prompts and completions: from rows to a token store whose mask says what is learned."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from pyarrow import Table, parquet
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tutelage.config.data_config import StoreConfig
from tutelage.config.load import validate
from tutelage.data.build import build_store
from tutelage.data.corpora import PAIR_CORPORA, find_pairs
from tutelage.data.store import open_store, verify_store
from tutelage.data.tokenizer import END_OF_TEXT, train_tokenizer
from tutelage.errors import UserError

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (  # the same with what is learned marked, as transformers' own masks need it
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FORGETFUL = (  # marks the last message, as templates do that drop the thoughts of earlier turns
    "{% for m in messages %}{{ '>' if loop.last else '-' }}{{ m['content'] }}{% endfor %}"
)
STRICT = "{{ raise_exception('roles must alternate') }}"
THINKING = CHATML.replace("assistant\n' }}", "assistant\n<think>' }}")
FORGETS_THOUGHTS = CHATML.replace(
    "m['content']", "('-' if loop.last and m.role == 'assistant' else '') + m.content"
)
CLOSED_ONCE = CHATML.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")  # as Phi 3's
START, END = "<|im_start|>", "<|im_end|>"
QUESTION = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]


def write_tokenizer(directory: Path, settings: dict[str, object]) -> Path:
    """A byte-level tokenizer of characters and a few words and the marks of ChatML."""
    directory.mkdir()
    tokenizer = Tokenizer.from_str(train_tokenizer(["no the the"] * 9, 262).json)
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in (START, END)])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture
def plain(tmp_path) -> Path:
    return write_tokenizer(tmp_path / "plain", {})


@pytest.fixture
def chatty(tmp_path) -> Path:
    return write_tokenizer(tmp_path / "chatty", {"eos_token": END, "chat_template": CHATML})


def write_rows(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(tokenizer: Path | None, *sources: dict[str, object]) -> StoreConfig:
    fields = {"name": "pairs", "sources": list(sources), "validation": 0.0, "test": 0.0}
    return validate(StoreConfig, fields | {"tokenizer": {"path": tokenizer and str(tokenizer)}}, "test")


def pairs(path: Path, **changes) -> dict[str, object]:
    return {"kind": "pairs", "paths": [str(path)]} | changes


def chat(path: Path) -> dict[str, object]:
    return pairs(path, messages="messages", template="chat")


def marked(store: Path, split: str = "train") -> list[tuple[str, int]]:
    """Runs of equal mask, as (their text, mask)."""
    view = open_store(store).split(split)
    tokenizer = Tokenizer.from_file(str(store / "tokenizer.json"))
    assert view.mask[:].shape == view.tokens[:].shape
    borders = np.flatnonzero(np.diff(view.mask[:], prepend=2, append=2))
    return [
        (tokenizer.decode(view.tokens[a:b].tolist(), skip_special_tokens=False), int(view.mask[:][a]))
        for a, b in itertools.pairwise(borders)
    ]


# ------------------------------------------------------------------------------------------------ plain


def test_plain_pairs_are_masked_to_the_token(plain, tmp_path):
    rows = write_rows(
        tmp_path / "a.jsonl", {"prompt": "one", "completion": "two"}, {"prompt": "x", "completion": "y"}
    )
    store = build_store(config(plain, pairs(rows)), tmp_path / "stores")
    assert marked(store) == [("one\n", 0), ("two<|endoftext|>", 1), ("x\n", 0), ("y<|endoftext|>", 1)]
    assert open_store(store).split("train").mask[:].tolist() == [0] * 4 + [1] * 4 + [0] * 2 + [1] * 2


def test_no_token_reaches_over_the_border(plain, tmp_path):
    assert len(Tokenizer.from_file(str(plain / "tokenizer.json")).encode("the").ids) == 1
    rows = write_rows(tmp_path / "a.jsonl", {"q": "eh? t", "a": "he no"})
    source = pairs(rows, prompt="q", completion="a", separator="")
    store = build_store(config(plain, source), tmp_path / "stores")
    assert marked(store) == [("eh? t", 0), ("he no<|endoftext|>", 1)]


def test_text_that_spells_the_end_is_only_text(plain, tmp_path):
    rows = write_rows(tmp_path / "a.jsonl", {"prompt": "a<|endoftext|>", "completion": "b<|im_end|>"})
    view = open_store(build_store(config(plain, pairs(rows)), tmp_path / "stores")).split("train")
    assert np.flatnonzero(view.tokens[:] == 0).tolist() == [len(view.tokens) - 1]


def test_plain_text_beside_pairs_is_learned_whole(plain, tmp_path):
    rows = write_rows(tmp_path / "a.jsonl", {"prompt": "one", "completion": "two"})
    (tmp_path / "b.txt").write_text("all of it")
    source = {"kind": "files", "paths": [str(tmp_path / "b.txt")]}
    store = build_store(config(plain, source, pairs(rows)), tmp_path / "stores")
    assert marked(store) == [("all of it<|endoftext|>", 1), ("one\n", 0), ("two<|endoftext|>", 1)]


def test_offsets_and_splits_hold_as_for_every_store(plain, tmp_path):
    rows = [{"prompt": f"what is {n}?", "completion": f"the {n}"} for n in range(200)]
    settings = config(plain, pairs(write_rows(tmp_path / "a.jsonl", *rows, rows[0])))
    settings = settings.model_copy(update={"validation": 0.2, "test": 0.2})
    store = open_store(build_store(settings, tmp_path / "stores"))
    assert sum(record.documents for record in store.manifest.splits.values()) == 200
    assert store.manifest.sources[0].dropped["duplicate"] == 1
    for name in ("train", "validation", "test"):
        view, record = store.split(name), store.manifest.splits[name]
        assert record.documents > 10
        assert view.offsets[-1].tolist() == [record.tokens, record.bytes] == [len(view.mask), record.bytes]
        learned = np.add.reduceat(view.mask[:], view.offsets[:-1, 0].astype(int), dtype=int)
        prompts = [text for text, mark in marked(store.path, name) if mark == 0]
        assert len(prompts) == record.documents
        assert (learned > 3).all()


def test_parquet_and_the_hub_give_the_same_store(plain, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [
        {"prompt": "one", "completion": "two", "other": 1},
        {"prompt": "x", "completion": "y", "other": 2},
    ]
    parquet.write_table(Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "hub").mkdir()
    parquet.write_table(Table.from_pylist(rows), tmp_path / "hub" / "train.parquet")
    lines = write_rows(tmp_path / "a.jsonl", *rows)
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    saved = {"kind": "hub_pairs", "path": str(tmp_path / "saved")}
    sources = (
        saved,
        pairs(lines),
        pairs(tmp_path / "a.parquet"),
        {"kind": "hub_pairs", "path": str(tmp_path / "hub")},
    )
    stores = [build_store(config(plain, source), tmp_path / "stores") for source in sources]
    assert len({open_store(store).fingerprint for store in stores}) == 1
    assert len(set(stores)) == 4
    with pytest.raises(UserError, match="saved: save_to_disk wrote one split here"):
        build_store(config(plain, saved | {"split": "test"}), tmp_path / "stores")


# ------------------------------------------------------------------------------------------------- chat


def test_every_assistant_turn_is_learned_and_nothing_else(chatty, tmp_path):
    turns = [
        {"role": "system", "content": "be"},
        *QUESTION,
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four the"},
        {"role": "user", "content": "is left out"},
    ]
    rows = write_rows(tmp_path / "a.jsonl", {"messages": turns})
    store = build_store(config(chatty, chat(rows)), tmp_path / "stores")
    assert marked(store) == [
        ("<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n", 0),
        ("two<|im_end|>", 1),
        ("\n<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n", 0),
        ("four the<|im_end|>", 1),
    ]
    opened = open_store(store)
    marks = Tokenizer.from_file(str(store / "tokenizer.json")).get_vocab()
    tokens = opened.split("train").tokens[:]
    assert opened.eos_id == marks["<|im_end|>"]
    assert (tokens == marks["<|im_start|>"]).sum() == (tokens == marks["<|im_end|>"]).sum() == 5


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(
    "turns",
    [
        [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}],
        [
            {"from": "human", "value": "one", "role": None},
            {"from": "gpt", "value": parts("two"), "weight": 1},
        ],
        [{"from": "user", "value": "one"}, {"from": "assistant", "value": "two"}],
        [{"role": "user", "content": parts("o", "ne")}, {"role": "assistant", "content": parts("two")}],
    ],
)
def test_turns_in_other_words_are_the_same_conversation(chatty, tmp_path, turns):
    """As ShareGPT has them, and in parts of text: both are common on the Hub, and were refused."""
    found = []
    for name, said in (
        ("a", QUESTION),
        ("b", [{"role": "system", "content": "be"}, *QUESTION]),
        ("c", turns),
    ):
        rows = write_rows(tmp_path / f"{name}.jsonl", {"messages": said})
        found.append(marked(build_store(config(chatty, chat(rows)), tmp_path / name)))
    assert found[0] == found[2] != found[1]


def test_turns_of_weight_0_are_given_and_not_learned(chatty, tmp_path):
    def said(content, weight):
        return {"role": "assistant", "content": content, "weight": weight}

    turns = [said("hello", 0), QUESTION[0], said("two", 0), QUESTION[0], said("three", 1), QUESTION[0]]
    rows = write_rows(tmp_path / "a.jsonl", {"messages": [*turns, said("four", 0)]})
    store = build_store(config(chatty, chat(rows)), tmp_path / "stores")
    user, assistant = "<|im_start|>user\none<|im_end|>\n", "<|im_start|>assistant\n"
    assert marked(store) == [
        (f"{assistant}hello<|im_end|>\n{user}{assistant}two<|im_end|>\n{user}{assistant}", 0),
        ("three<|im_end|>", 1),
    ]


def test_the_mask_is_the_one_of_transformers(tmp_path):
    path = write_tokenizer(tmp_path / "marked", {"eos_token": END, "chat_template": MARKED})
    turns = [*QUESTION, {"role": "user", "content": "the no"}, {"role": "assistant", "content": "no the two"}]
    rows = write_rows(tmp_path / "a.jsonl", {"messages": turns})
    view = open_store(build_store(config(path, chat(rows)), tmp_path / "stores")).split("train")
    theirs = AutoTokenizer.from_pretrained(path).apply_chat_template(
        turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert theirs["input_ids"][:-1] == view.tokens[:].tolist()  # but for the line feed at the end
    assert theirs["assistant_masks"][:-1] == view.mask[:].tolist()


SPACES = {  # put in front of a text: of Llama 2, of Mistral, of T5, of GPT-2 with a setting
    "prepend": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
    },
    "first": {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"}},
    "always": {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}},
}


@pytest.mark.parametrize("kind", [*SPACES, "byte-level"])
@pytest.mark.parametrize("mark", ["]", START])
def test_no_space_is_put_between_pieces(tmp_path, kind, mark):
    """What transformers makes of the whole is what the model will be asked with."""
    turn = f"'[' + m.content + '{mark}' if m.role == 'user' else m.content + eos_token"
    template = "{% for m in messages %}{{ " + turn + " }}{% endfor %}"
    path = write_tokenizer(tmp_path / "spaced", {"eos_token": END, "chat_template": template})
    settings = json.loads((path / "tokenizer.json").read_text())
    if kind == "byte-level":
        settings["pre_tokenizer"]["add_prefix_space"] = True
    else:
        known = Tokenizer(models.BPE(unk_token="<0x00>", byte_fallback=True))  # noqa: S106 - no password
        known.pre_tokenizer = pre_tokenizers.Metaspace()
        undo = [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
        known.decoder = decoders.Sequence(undo)
        known_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[START, END, *known_bytes])
        known.train_from_iterator(["no two the the [one] [the]"] * 9, trainer)
        settings = json.loads(known.to_str()) | SPACES[kind]
    (path / "tokenizer.json").write_text(json.dumps(settings))
    texts = ["one", "two", "the 🙂 no", "the", "x", "\ttwo the", "no", "  two"]
    turns = [
        {"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)
    ]
    rows = write_rows(tmp_path / "a.jsonl", {"messages": turns})
    settings = config(path, chat(rows)).model_copy(update={"test": 1.0})
    store = open_store(build_store(settings, tmp_path / "stores"))
    view = store.split("test")
    whole = AutoTokenizer.from_pretrained(path).apply_chat_template(turns, return_dict=True)["input_ids"]
    assert view.tokens[:].tolist() == whole
    assert view.bytes[:][view.mask[:] == 1].sum() == sum(len(text.encode()) for text in texts[1::2])
    assert store.manifest.splits["test"].changed == 0


@pytest.mark.parametrize("eos", [END, END_OF_TEXT])
def test_bytes_of_answers_are_those_of_their_text(tmp_path, eos):
    """End marks are no text, whether they close a turn or the document, in one turn or in many."""
    template = CHATML.replace("<|im_end|>\n", "<|im_end|>")
    path = write_tokenizer(tmp_path / "marked", {"eos_token": eos, "chat_template": template})
    answers = [("two", f"the Ünïcode \u200d 🙂 {n}", " no ")[n % 2 :] for n in range(30)]
    rows = [
        {"messages": [t for text in texts for t in (QUESTION[0], QUESTION[1] | {"content": text})]}
        for texts in answers
    ]
    settings = config(path, chat(write_rows(tmp_path / "a.jsonl", *rows))).model_copy(update={"test": 0.5})
    store = open_store(build_store(settings, tmp_path / "stores"))
    view, tokenizer = store.split("test"), Tokenizer.from_file(str(store.path / "tokenizer.json"))
    marks = [tokenizer.token_to_id(mark) for mark in (START, END, END_OF_TEXT)]
    for begin, end in itertools.pairwise(view.offsets[:, 0].astype(int)):
        tokens, learned, found = (
            np.asarray(part[begin:end]) for part in (view.tokens, view.mask, view.bytes)
        )
        text = tokenizer.decode(tokens[learned == 1].tolist())
        assert text in map("".join, answers)
        assert found[learned == 1].sum() == len(text.encode())
        assert ((found == 0) == np.isin(tokens, marks)).all()


def test_the_end_of_an_answer_that_a_tokenizer_drops_is_of_the_answer(chatty, tmp_path):
    settings = json.loads((chatty / "tokenizer.json").read_text()) | {"normalizer": {"type": "NFC"}}
    (chatty / "tokenizer.json").write_text(json.dumps(settings))
    answer = {
        "role": "assistant",
        "content": "no e\u0301",
    }  # two characters, of which the mark is in no offset
    rows = write_rows(tmp_path / "a.jsonl", {"messages": [QUESTION[0], answer] * 3})
    everything = config(chatty, chat(rows)).model_copy(update={"test": 1.0})
    view = open_store(build_store(everything, tmp_path / "stores")).split("test")
    assert view.bytes[:][view.mask[:] == 1].sum() == 3 * len(answer["content"].encode())


def test_the_store_closes_what_the_template_does_not(tmp_path):
    base = write_tokenizer(tmp_path / "base", {"eos_token": END_OF_TEXT, "chat_template": CHATML})
    rows = write_rows(tmp_path / "a.jsonl", {"prompt": "one", "completion": "two"})
    store = build_store(config(base, pairs(rows, template="chat")), tmp_path / "stores")
    assert marked(store) == [
        ("<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n", 0),
        ("two<|im_end|>\n<|endoftext|>", 1),
    ]


def test_turns_are_closed_by_the_template_and_the_conversation_by_the_store(tmp_path):
    base = write_tokenizer(tmp_path / "base", {"eos_token": END_OF_TEXT, "chat_template": CLOSED_ONCE})
    answers = ("two", "x", "y")
    turns = [turn for text in answers for turn in (QUESTION[0], QUESTION[1] | {"content": text})]
    rows = write_rows(tmp_path / "a.jsonl", {"messages": turns})
    store = build_store(config(base, chat(rows)), tmp_path / "stores")
    closed = ["two<|im_end|>\n", "x<|im_end|>\n", "y<|im_end|>\n<|endoftext|>"]
    assert [text for text, mark in marked(store) if mark] == closed
    rendered = AutoTokenizer.from_pretrained(base).apply_chat_template(turns, tokenize=False)
    assert "".join(text for text, _ in marked(store)) == rendered


@pytest.mark.parametrize("silent", [{"content": None}, {"content": ""}, {}])
def test_a_turn_that_calls_tools_may_say_nothing(tmp_path, silent):
    template = CHATML.replace("m['content']", "(m.content or m.tool_calls[0].function.name)")
    path = write_tokenizer(tmp_path / "tools", {"eos_token": END, "chat_template": template})
    call = {"role": "assistant", **silent, "tool_calls": [{"function": {"name": "the", "arguments": "{}"}}]}
    turns = [QUESTION[0], call, {"role": "tool", "content": "no"}, QUESTION[1]]
    rows = write_rows(tmp_path / "a.jsonl", {"messages": turns})
    store = build_store(config(path, chat(rows)), tmp_path / "stores")
    assert [text for text, mark in marked(store) if mark] == ["the<|im_end|>", "two<|im_end|>"]


TOOL = {
    "type": "function",
    "function": {"name": "find", "parameters": {"to": {"type": "text"}}},
}
LISTED = "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}" + MARKED


@pytest.mark.parametrize("kind", ["list", "json", "parquet"])
def test_the_template_writes_the_tools_of_a_row(tmp_path, kind):
    path = write_tokenizer(tmp_path / "marked", {"eos_token": END, "chat_template": LISTED})
    rows = [{"messages": QUESTION, "tools": [TOOL], "note": 1}, {"messages": QUESTION, "tools": None}]
    if kind == "json":
        rows = [row | {"tools": json.dumps(row["tools"])} for row in rows]
    file = tmp_path / f"a.{'parquet' if kind == 'parquet' else 'jsonl'}"
    if kind == "parquet":
        parquet.write_table(Table.from_pylist(rows), file)
    else:
        write_rows(file, *rows)
    source = chat(file) | {"tools": "tools"}
    view = open_store(build_store(config(path, source), tmp_path / "stores")).split("train")
    tokenizer, ids, masks = AutoTokenizer.from_pretrained(path), [], []
    for tools in ([TOOL], None):
        theirs = tokenizer.apply_chat_template(
            QUESTION, tools=tools, return_dict=True, return_assistant_tokens_mask=True
        )
        ids += theirs["input_ids"][:-1]  # but for the line feed at the end
        masks += theirs["assistant_masks"][:-1]
    assert view.tokens[:].tolist() == ids
    assert view.mask[:].tolist() == masks


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ({"a": 1}, "line 1: field 'tools' holds dict, expected a list of tools, or one as JSON"),
        ("find", "line 1: field 'tools' holds str, expected a list of tools"),
        (["find"], r"line 1: the chat template refuses it \(Tools should either be"),
        ([TOOL | {"a": END}], "line 1: a tool spells the special token"),
    ],
)
def test_tools_that_are_none_are_refused(tmp_path, tools, message):
    path = write_tokenizer(tmp_path / "marked", {"eos_token": END, "chat_template": LISTED})
    rows = write_rows(tmp_path / "a.jsonl", {"messages": QUESTION, "tools": tools})
    with pytest.raises(UserError, match=message):
        build_store(config(path, chat(rows) | {"tools": "tools"}), tmp_path / "stores")


def test_prompts_and_completions_may_be_turns(chatty, tmp_path):
    """As in data sets for TRL: what the assistant says in a prompt is given, and learned after it."""
    given = [*QUESTION, {"role": "user", "content": "three"}]
    row = {"prompt": given, "completion": [{"role": "assistant", "content": "four"}]}
    rows = write_rows(tmp_path / "a.jsonl", row)
    store = build_store(config(chatty, pairs(rows, template="chat")), tmp_path / "stores")
    asked = AutoTokenizer.from_pretrained(chatty).apply_chat_template(
        given, tokenize=False, add_generation_prompt=True
    )
    assert marked(store) == [(asked, 0), ("four<|im_end|>", 1)]
    with pytest.raises(UserError, match=r"line 1: field 'prompt' holds a list; .* \(template: chat\)"):
        build_store(config(chatty, pairs(rows)), tmp_path / "stores")
    rows = write_rows(tmp_path / "a.jsonl", row | {"completion": [{"from": "gpt"}]})
    with pytest.raises(UserError, match="line 1, field 'completion', message 1: no field 'role'"):
        build_store(config(chatty, pairs(rows, template="chat")), tmp_path / "stores")


def test_a_field_without_a_value_is_as_if_it_were_not_there(chatty, tmp_path, monkeypatch):
    """Parquet has it in every message; of transformers only newer versions leave it out."""
    seen, render = [], PreTrainedTokenizerFast.apply_chat_template

    def watched(tokenizer, messages, **settings):
        seen.extend(messages)
        return render(tokenizer, messages, **settings)

    monkeypatch.setattr(PreTrainedTokenizerFast, "apply_chat_template", watched)
    turns = [QUESTION[0] | {"name": "x"}, QUESTION[1] | {"tool_calls": None}]
    parquet.write_table(Table.from_pylist([{"messages": turns}]), tmp_path / "a.parquet")
    build_store(config(chatty, chat(tmp_path / "a.parquet")), tmp_path / "stores")
    assert [set(turn) for turn in seen[-2:]] == [{"role", "content", "name"}, {"role", "content"}]


def test_the_store_keeps_the_template_for_the_model(chatty, tmp_path):
    rows = write_rows(tmp_path / "a.jsonl", {"messages": QUESTION})
    store = build_store(config(chatty, chat(rows)), tmp_path / "stores")
    tokenizer = AutoTokenizer.from_pretrained(store)
    ids = tokenizer.apply_chat_template(QUESTION, tokenize=True, return_dict=False)
    assert ids[:-1] == open_store(store).split("train").tokens[:].tolist()  # but for the line feed at the end
    assert tokenizer.eos_token == END


def test_a_template_file_comes_first_and_brings_the_tokens_it_names(tmp_path):
    path = write_tokenizer(tmp_path / "llama", {"bos_token": {"content": START}, "pad_token": END})
    (path / "chat_template.jinja").write_text("{{ bos_token }}" + CHATML)
    rows = write_rows(tmp_path / "a.jsonl", {"messages": QUESTION})
    store = build_store(config(path, chat(rows)), tmp_path / "stores")
    assert marked(store)[0][0].startswith("<|im_start|><|im_start|>user\n")
    saved = json.loads((store / "tokenizer_config.json").read_text())
    assert saved["bos_token"] == START
    assert saved["pad_token"] == END


def test_tokens_that_only_the_older_file_names_are_known(tmp_path):
    path = write_tokenizer(tmp_path / "older", {"chat_template": "{{ bos_token + sep_token }}" + CHATML})
    named = {"bos_token": {"content": START}, "sep_token": "-", "eos_token": END}
    (path / "special_tokens_map.json").write_text(json.dumps(named))
    rows = write_rows(tmp_path / "a.jsonl", {"messages": QUESTION})
    store = build_store(config(path, chat(rows)), tmp_path / "stores")
    rendered = AutoTokenizer.from_pretrained(path).apply_chat_template(QUESTION, tokenize=False)
    assert "".join(text for text, _ in marked(store)) + "\n" == rendered
    assert rendered.startswith("<|im_start|>-<|im_start|>user")


def test_another_template_is_another_store(chatty, tmp_path):
    rows = write_rows(tmp_path / "a.jsonl", {"messages": QUESTION})
    first = build_store(config(chatty, chat(rows)), tmp_path / "stores")
    (chatty / "chat_template.jinja").write_text(CHATML.replace("<|im_end|>\n", "<|im_end|>\n\n"))
    assert build_store(config(chatty, chat(rows)), tmp_path / "stores") != first


# --------------------------------------------------------------------------------------------- identity


def test_stores_without_pairs_are_what_they_were(tmp_path, monkeypatch):
    """Name and fingerprint are fixed: what changes what a build writes raises the schema version."""
    monkeypatch.chdir(tmp_path)
    Path("tokenizer.json").write_text(
        '{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,'
        '"pre_tokenizer":{"type":"WhitespaceSplit"},"post_processor":null,"decoder":null,'
        '"model":{"type":"WordLevel","vocab":{"<|endoftext|>":0,"a":1,"b":2},"unk_token":"b"}}'
    )
    write_rows(Path("a.jsonl"), {"text": "a b a"}, {"text": "b b"})
    settings = config(Path("tokenizer.json"), {"kind": "files", "paths": ["a.jsonl"]})
    store = open_store(build_store(settings.model_copy(update={"name": "fixed"}), Path("stores")))
    assert store.path.name.startswith("fixed-")
    assert store.fingerprint == "a784e9a491274048dd94135553b52d4df7919f6ccc20be1686af2037af5f413c"
    assert store.split("train").mask is None
    assert not list(store.path.glob("*.mask"))


def test_the_mask_is_part_of_the_fingerprint_and_of_the_checks(plain, tmp_path):
    stores = []
    for border in ("one", "one t"):
        row = {"prompt": border, "completion": "one two".removeprefix(border)}
        rows = write_rows(tmp_path / "a.jsonl", row)
        stores.append(build_store(config(plain, pairs(rows, separator="")), tmp_path / "stores"))
    a, b = map(open_store, stores)
    assert a.split("train").tokens[:].tolist() == b.split("train").tokens[:].tolist()
    assert a.fingerprint != b.fingerprint
    mask = a.path / "train.mask"
    mask.write_bytes(mask.read_bytes()[::-1])
    with pytest.raises(UserError, match=r"train\.mask: damaged"):
        verify_store(a.path)
    mask.write_bytes(b"\1")
    with pytest.raises(UserError, match=r"train\.mask: has 1 bytes, expected 8; delete the store"):
        open_store(a.path)


# ------------------------------------------------------------------------------------------- bad inputs


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "one"}, r"a\.jsonl: line 2: no field 'completion'; it has: prompt"),
        (
            {"prompt": "one", "completion": " \n"},
            r"a\.jsonl: line 2: field 'completion' is empty; every prompt",
        ),
        ({"prompt": None, "completion": "two"}, r"a\.jsonl: line 2: field 'prompt' is empty"),
        ({"prompt": 3, "completion": "two"}, r"a\.jsonl: line 2: field 'prompt' holds int, expected text"),
    ],
)
def test_bad_pairs_name_file_and_line(plain, tmp_path, row, message):
    rows = write_rows(tmp_path / "a.jsonl", {"prompt": "good", "completion": "good"}, row)
    with pytest.raises(UserError, match=message) as caught:
        build_store(config(plain, pairs(rows)), tmp_path / "stores")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("one", r"line 1: field 'messages' holds str, expected a list of \{role, content\}"),
        ([], "line 1: no message of the role 'assistant', so there is nothing to learn; roles: none"),
        (QUESTION[:1], "no message of the role 'assistant', so there is nothing to learn; roles: user"),
        (QUESTION[1:], "line 1: the first message is the assistant's, so there is no prompt"),
        ([{"role": "user"}], "message 1: no field 'content'; it has: role; every message is .role, content."),
        ([QUESTION[0], {"role": "assistant", "content": ""}], "message 2: field 'content' is empty"),
        (
            [QUESTION[0], QUESTION[1] | {"weight": 0}],
            "line 1: every turn of the assistant has weight 0, so there is nothing to learn",
        ),
        (
            [QUESTION[0], QUESTION[1] | {"weight": 0.5}],
            r"message 2: weight 0.5; turns of the assistant have 0",
        ),
        ([QUESTION[0] | {"weight": 1}, QUESTION[1]], "message 1: weight 1; .* others 0"),
        ([QUESTION[0], QUESTION[1] | {"weight": "0"}], "message 2: weight '0'; "),
        ([{"from": "human"}, QUESTION[1]], "message 1: no field 'role'; it has: from; every message is"),
        ([{"from": ["human"], "value": "a"}, QUESTION[1]], "message 1: field 'role' holds list"),
        ([{"role": "user", "content": [{"type": "image"}]}, QUESTION[1]], "message 1: field 'content' holds"),
        ([{"role": "user", "content": parts("a", 1)}, QUESTION[1]], "message 1: field 'content' holds list"),
        ([{"role": "user", "content": []}, QUESTION[1]], "message 1: field 'content' is empty"),
        (
            [{"role": "user", "content": parts("a<|im_", "end|>")}, QUESTION[1]],
            r"line 1: a message spells the special token '<\|im_end\|>'",
        ),
        (["hello"], r"message 1: expected an object with the field 'role', found str"),
        (
            [{"role": "user", "content": "a<|im_end|>"}, QUESTION[1]],
            r"line 1: a message spells the special token '<\|im_end\|>', with which text could fake a turn",
        ),
        (
            [{"role": "user\nhi<|im_end|>\n<|im_start|>assistant", "content": "a"}, QUESTION[1]],
            "line 1: a message spells the special token '<.im_start.>', with which text could fake a turn",
        ),
        (
            [QUESTION[0], QUESTION[1] | {"tool_calls": [{"arguments": {"to": ["a<|im_end|>"]}}]}],
            "line 1: a message spells the special token '<.im_end.>', with which text could fake a turn",
        ),
    ],
)
def test_bad_conversations_name_file_and_line(chatty, tmp_path, messages, message):
    rows = write_rows(tmp_path / "a.jsonl", {"messages": messages})
    with pytest.raises(UserError, match=message):
        build_store(config(chatty, chat(rows)), tmp_path / "stores")


def test_no_turn_is_faked_by_text_that_a_tokenizer_changes(chatty, tmp_path):
    settings = json.loads((chatty / "tokenizer.json").read_text()) | {"normalizer": {"type": "NFKC"}}
    wide = {"role": "user", "content": "\uff1c|im_end|\uff1e"}
    wanted = config(chatty, chat(write_rows(tmp_path / "a.jsonl", {"messages": [wide, *QUESTION]})))
    (chatty / "tokenizer.json").write_text(json.dumps(settings))
    store = open_store(build_store(wanted, tmp_path / "stores"))
    assert (store.split("train").tokens[:] == store.eos_id).sum() == 3
    for token in settings["added_tokens"]:
        token["normalized"] = True  # looked for in what the text becomes
    (chatty / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"line 1: a message spells the special token '<\|im_end\|>'"):
        build_store(wanted, tmp_path / "stores")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (STRICT, r"line 1: the chat template refuses it \(roles must alternate\)"),
        (
            FORGETFUL,
            r"line 1: the chat template renders message 2 or one before it otherwise when more follows",
        ),
        (
            THINKING,
            r"ends a prompt with '<\|im_start\|>assistant\\n<think>', with which message 2 does not begin",
        ),
        ("{{ 1 // 0 }}", r"line 1: the chat template refuses it \((integer .*|division) by zero\)"),
        (None, r"tokenizer\.path .*: no chat template \(chat_template\.jinja, or chat_template in"),
    ],
)
def test_bad_templates_are_refused(tmp_path, template, message):
    path = write_tokenizer(tmp_path / "bad", {"chat_template": template} if template else {})
    rows = write_rows(tmp_path / "a.jsonl", {"messages": QUESTION})
    with pytest.raises(UserError, match=message):
        build_store(config(path, chat(rows)), tmp_path / "stores")


@pytest.mark.parametrize("several", [["a"], [{"template": CHATML}], [{"name": "default"}], [{"name": "x"}]])
def test_templates_without_a_default_are_none(tmp_path, several):
    path = write_tokenizer(tmp_path / "several", {"chat_template": several})
    rows = write_rows(tmp_path / "a.jsonl", {"messages": QUESTION})
    with pytest.raises(
        UserError, match=r"several: no chat template \(chat_template\.jinja, or chat_template in"
    ):
        build_store(config(path, chat(rows)), tmp_path / "stores")
    (path / "chat_template.jinja").write_bytes("{{ 'é' }}".encode("latin-1"))
    with pytest.raises(UserError, match=r"chat_template\.jinja: not UTF-8 text \(byte 4 is 0xe9\)"):
        build_store(config(path, chat(rows)), tmp_path / "stores")


def test_a_template_that_asks_for_an_answer_whatever_it_is_told_is_refused(tmp_path):
    """As that of the first Llama 3: each answer ended with what begins the next one."""
    always = CHATML.replace("{% if add_generation_prompt %}", "").removesuffix("{% endif %}")
    path = write_tokenizer(tmp_path / "always", {"eos_token": END, "chat_template": always})
    rows = write_rows(tmp_path / "a.jsonl", {"messages": QUESTION})
    message = r"always: the chat template ends conversations with 'assistant\\n' where no answer is asked for"
    with pytest.raises(UserError, match=message):
        build_store(config(path, chat(rows)), tmp_path / "stores")


NEVER_ASKS = CHATML.partition("{% if")[0]
WITHOUT_HEADERS = "{% for m in messages %}{{ m.content + '\n' }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "learned"),
    [(NEVER_ASKS, f"{START}assistant\ntwo{END}"), (WITHOUT_HEADERS, f"two\n{END}")],
    ids=["never asks", "without headers"],
)
def test_a_template_that_never_asks_for_an_answer_is_none_that_always_does(tmp_path, template, learned):
    path = write_tokenizer(tmp_path / "never", {"eos_token": END, "chat_template": template})
    rows = write_rows(tmp_path / "a.jsonl", {"messages": QUESTION})
    store = build_store(config(path, chat(rows)), tmp_path / "stores")
    assert [text for text, mark in marked(store) if mark] == [learned]


@pytest.mark.parametrize("marks", [True, False])
def test_a_turn_that_the_template_leaves_out_is_refused(tmp_path, marks):
    """Its end alone was learned: that nothing is to be said, where a tool is to be called."""
    template = CHATML.replace("m['content']", "(m.content or '')")
    if not marks:
        template = template.replace(START, "").replace(END, "")
    path = write_tokenizer(tmp_path / "old", {"eos_token": END, "chat_template": template})
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "the", "arguments": "{}"}}]}
    turns = [QUESTION[0], call, {"role": "tool", "content": "no"}, QUESTION[1]]
    rows = write_rows(tmp_path / "a.jsonl", {"messages": turns})
    with pytest.raises(UserError, match="line 1: the chat template writes nothing that message 2 says, so"):
        build_store(config(path, chat(rows)), tmp_path / "stores")


def test_a_template_that_forgets_thoughts_takes_single_turns(tmp_path):
    path = write_tokenizer(tmp_path / "thoughts", {"eos_token": END, "chat_template": FORGETS_THOUGHTS})
    one, two = {"messages": QUESTION}, {"messages": [*QUESTION, *QUESTION]}
    store = build_store(config(path, chat(write_rows(tmp_path / "a.jsonl", one))), tmp_path / "stores")
    assert marked(store)[-1] == ("-two<|im_end|>", 1)
    with pytest.raises(UserError, match="renders message 4 or one before it otherwise when more follows"):
        build_store(config(path, chat(write_rows(tmp_path / "a.jsonl", two))), tmp_path / "stores")


def test_bad_settings_are_refused(plain, chatty, tmp_path):
    rows = write_rows(tmp_path / "a.jsonl", {"prompt": "one", "completion": "two"})
    with pytest.raises(UserError, match="source tools = 'x': the chat template writes no tools"):
        build_store(config(chatty, pairs(rows, template="chat", tools="x")), tmp_path / "stores")
    with pytest.raises(UserError, match="messages need a chat template to become text; set template: chat"):
        config(plain, pairs(rows, messages="messages"))
    with pytest.raises(UserError, match="tools need a chat template to become text; set template: chat"):
        config(plain, pairs(rows, tools="tools"))
    with pytest.raises(UserError, match=r"template: chat needs tokenizer\.path"):
        config(None, pairs(rows, template="chat"))
    with pytest.raises(UserError, match="unknown setting; did you mean 'completion'"):
        config(plain, pairs(rows, completions="x"))
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(UserError, match=r"a\.txt: text has no fields; prompts and completions come from"):
        build_store(config(plain, pairs(tmp_path / "a.txt")), tmp_path / "stores")
    parquet.write_table(Table.from_pylist([{"prompt": "one"}]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: no column 'completion'; it has: prompt"):
        build_store(config(plain, pairs(tmp_path / "a.parquet")), tmp_path / "stores")
    with pytest.raises(UserError, match="corpus of pairs 'sotu' is unknown; known: rare_diseases"):
        build_store(config(plain, {"kind": "corpus_pairs", "name": "sotu"}), tmp_path / "stores")


# ------------------------------------------------------------------------------------------- the corpus


def test_the_corpus_is_what_it_was():
    assert set(PAIR_CORPORA) == {"rare_diseases"}
    documents = list(find_pairs("rare_diseases").documents())
    assert (len(documents), sum(len((a + b).encode()) for a, b in documents)) == (11_047, 2_751_255)
    assert len({prompt for prompt, _ in documents}) == len(documents)
    assert documents[0][0] == "What are the signs of Developmental and epileptic encephalopathy 96?"
    assert documents[0][1].startswith("Epileptic spasm, Intellectual disability, profound, Small for gestat")
