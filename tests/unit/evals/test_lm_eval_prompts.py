"""Questions in conversations: the ids that a model reads, what scores are called, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest
from own_task_files import QUESTION, own_task, write_rows, write_task
from tokenizers import Tokenizer, processors
from told_progress import Told
from transformers import AutoTokenizer

from tutelage.config.data_config import StoreConfig
from tutelage.config.load import validate
from tutelage.data.build import build_store
from tutelage.data.store import open_store
from tutelage.errors import UserError
from tutelage.evals.evaluated_model import EvaluatedModel
from tutelage.evals.lm_eval import run_downstream
from tutelage.evals.lm_eval_prompts import Prompting
from tutelage.evals.score_files import read_scores
from tutelage.models import hub
from tutelage.models.shapes import find_shape

pytest.importorskip("lm_eval")
lm_eval_model = pytest.importorskip("tutelage.evals.lm_eval_model")

CONTEXT = 128
ANSWERS = ["the lord", "the states"]
ASKED = (
    "{{ '<|user|>' + m.content if m.role == 'user' else '<|' + m.role + '|>' + m.content + '<|endoftext|>' }}"
)
TURNS = (
    "{% for m in messages %}" + ASKED + "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
DEAF = "{% for m in messages if m.role != 'system' %}" + ASKED + "{% endfor %}<|assistant|>"
KINDS = {
    "nothing in front": ((), TURNS),
    "the template writes what is in front": (("<s>",), "{{ '<s>' }}" + TURNS),
    "the template does not": (("<s>",), TURNS),
    "two in front": (("[gMASK]", "<sop>"), "[gMASK]<sop>" + TURNS),
}
CHAT = Prompting(chat=True)


def made(store, folder, begin, template):
    """A model whose tokenizer puts `begin` in front of texts, with a chat template."""
    place = folder / "tokenizer"
    place.mkdir()
    tokenizer = Tokenizer.from_file(str(store / "tokenizer.json"))
    tokenizer.add_special_tokens([*begin, "<|user|>", "<|assistant|>", "<|system|>"])
    if begin:
        ids = [(token, tokenizer.token_to_id(token)) for token in begin]
        tokenizer.post_processor = processors.TemplateProcessing(single=[*begin, "$A"], special_tokens=ids)
    tokenizer.save(str(place / "tokenizer.json"))
    (place / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    (folder / "a.jsonl").write_text(json.dumps({"text": "the people of the land"}) + "\n")
    sources = [{"kind": "files", "paths": [str(folder / "a.jsonl")]}]
    fields = {"name": "t", "sources": sources, "tokenizer": {"path": str(place)}, "validation": 0, "test": 0}
    opened = open_store(build_store(validate(StoreConfig, fields, "test"), folder))
    directory = folder / "model"
    hub.save(hub.build(find_shape("nano-50k"), opened.vocab_size, CONTEXT, seed=3), directory, opened.path)
    (directory / "checksums.json").unlink()  # as of a directory that others have written
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def chatty(store, tmp_path_factory):
    return made(store, tmp_path_factory.mktemp("chatty"), *KINDS["the template writes what is in front"])


@pytest.fixture
def evaluated(chatty, tmp_path):
    """A copy, so that a test may write to it."""
    model = shutil.copytree(chatty, tmp_path / "chatty")
    return EvaluatedModel("chatty-1", model, CONTEXT, tmp_path / "out")


@pytest.fixture
def folder(tmp_path):
    """A task with two worked examples, and one whose answers are written."""
    place = tmp_path / "files"
    source = write_rows(place, ANSWERS)
    write_task(place, "asked", QUESTION | source | {"num_fewshot": 2})
    written = {"output_type": "generate_until", "doc_to_text": "q", "doc_to_target": "other"}
    settings = {"generation_kwargs": {"max_gen_toks": 4, "until": []}, "test_split": "test", "num_fewshot": 0}
    return write_task(place, "written", written | source | settings)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_reads_what_transformers_makes_of_the_conversation(
    kind, store, folder, tmp_path, monkeypatch
):
    """And begins once with what its tokenizer puts in front, as its training did, whoever writes it."""
    begin, template = KINDS[kind]
    place = tmp_path / "made"
    place.mkdir()
    model = made(store, place, begin, template)
    read = {}

    def answered(_, requests, **_more):
        read["asked"] = [(given, scored) for _, given, scored in requests]
        return [(-1.0, False)] * len(requests)

    def wrote(_, context, attention_mask, **_more):
        read["written"] = [
            row[mask.bool()].tolist() for row, mask in zip(context, attention_mask, strict=True)
        ]
        return context

    monkeypatch.setattr(lm_eval_model.ExportedModel, "_loglikelihood_tokens", answered)
    monkeypatch.setattr(lm_eval_model.ExportedModel, "_model_generate", wrote)
    evaluated = EvaluatedModel("made-1", model, CONTEXT * 4, tmp_path / "out")
    run_downstream(evaluated, ["asked", "written"], include=folder, prompting=CHAT, limit=1)
    tokenizer = AutoTokenizer.from_pretrained(model)
    written_by_template = "".join(begin) in template
    front = [] if written_by_template else tokenizer.convert_tokens_to_ids(list(begin))

    def ids(messages):
        return front + tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]

    question = {"role": "user", "content": "The house of number 0 is"}
    assert read["written"] == [ids([question])]
    (given, scored), (other, wrong) = read["asked"]
    text = tokenizer.decode(given + scored)
    assert text.count("<|user|>") == text.count("<|assistant|>") == 3
    assert text.endswith("<|assistant|>\nthe lord")
    assert given == other
    assert given + scored == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(wrong).strip() == "the states"
    assert sum(given.count(tokenizer.convert_tokens_to_ids(token)) for token in begin) == len(begin)


def test_scores_say_how_was_asked_and_none_is_taken_for_another(evaluated, folder):
    ways = {
        "asked": Prompting(),
        "asked (chat)": CHAT,
        "asked (chat, one turn)": Prompting(chat=True, multiturn=False),
        "asked (chat, system)": Prompting(chat=True, system="Be brief."),
        "asked (system)": Prompting(system="Be brief."),
    }
    rows = {}
    for name, prompting in ways.items():
        found = run_downstream(evaluated, ["asked"], include=folder, prompting=prompting)
        rows[name] = [(score.domain, score.version) for score in found]
        assert {score.domain for score in found} == {name}
    assert len({version for found in rows.values() for _, version in found}) == len(ways)
    kept = read_scores(evaluated.scores)
    assert {score.domain for score in kept} == {*ways}
    before = evaluated.scores.read_bytes()
    for prompting in ways.values():
        run_downstream(evaluated, ["asked"], include=folder, prompting=prompting)
    assert evaluated.scores.read_bytes() == before
    other = run_downstream(evaluated, ["asked"], include=folder, prompting=Prompting(chat=True, system="Be."))
    assert (other[0].domain, other[0].version) not in rows["asked (chat, system)"]
    (evaluated.model / "chat_template.jinja").write_text("{{ '<s>' }}Well: " + TURNS, encoding="utf-8")
    again = run_downstream(evaluated, ["asked"], include=folder, prompting=CHAT)
    assert (again[0].domain, again[0].version) not in rows["asked (chat)"]
    assert [*kept] == read_scores(evaluated.scores)[: len(kept)]


def test_documents_without_a_prompt_are_the_same_in_a_conversation(evaluated, tmp_path):
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_choice": None, "doc_to_target": "other"}
    folder = own_task(tmp_path / "own", ANSWERS, **rolling)
    run_downstream(evaluated, ["own"], include=folder)
    before = evaluated.scores.read_bytes()
    (score, *_) = run_downstream(evaluated, ["own"], include=folder, prompting=CHAT)
    assert score.domain == "own"
    assert evaluated.scores.read_bytes() == before


def test_one_of_several_templates_is_taken_by_its_name(evaluated, folder, monkeypatch):
    """lm-eval's own command takes the default one whatever is named."""
    more = evaluated.model / "additional_chat_templates"
    more.mkdir()
    (more / "formal.jinja").write_text("{{ '<s>' }}Sir! " + TURNS, encoding="utf-8")
    prompts = []
    encode = lm_eval_model.ExportedModel.tok_batch_encode

    def seen(model, strings, **more):
        prompts.extend(strings)
        return encode(model, strings, **more)

    monkeypatch.setattr(lm_eval_model.ExportedModel, "tok_batch_encode", seen)
    for name, domain in ((None, "chat"), ("default", "chat default"), ("formal", "chat formal")):
        prompting = Prompting(chat=True, template=name)
        (score,) = run_downstream(evaluated, ["written"], include=folder, prompting=prompting, limit=1)
        assert score.domain == f"written ({domain})"
    assert [prompt.startswith("<s>Sir! <|user|>") for prompt in prompts] == [False, False, True]
    with pytest.raises(UserError, match="chatty: no template 'warm'; name one of default, formal"):
        run_downstream(evaluated, ["asked"], include=folder, prompting=Prompting(chat=True, template="warm"))
    (evaluated.model / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="chatty: of several chat templates none is the default; name one of"):
        run_downstream(evaluated, ["asked"], include=folder, prompting=CHAT)


@pytest.mark.parametrize(
    ("template", "system", "message"),
    [
        (None, None, r"chatty: no chat template \(chat_template.jinja, or"),
        (NO_SYSTEM + TURNS, "Be brief.", "chatty: its chat template has no place for a system instruction"),
        (DEAF, "Be brief.", "chatty: its chat template has no place for a system instruction"),
        ("{{ 1 // 0 }}", None, r"chatty: its chat template refuses a prompt \(ZeroDivisionError"),
        ("{{ raise_exception('I am shy') }}", None, "refuses a prompt .*I am shy"),
        ("{% for %}", None, r"refuses a prompt \(TemplateSyntaxError"),
    ],
)
def test_what_a_template_cannot_do_is_one_line_before_any_compute(
    evaluated, folder, template, system, message
):
    path = evaluated.model / "chat_template.jinja"
    path.unlink() if template is None else path.write_text(template, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        run_downstream(evaluated, ["asked"], include=folder, prompting=Prompting(chat=True, system=system))
    assert "\n" not in str(caught.value)
    assert not evaluated.scores.exists()


@pytest.mark.parametrize("prompting", [Prompting(), CHAT])
def test_a_template_that_is_no_text_is_one_line(evaluated, folder, prompting):
    (evaluated.model / "chat_template.jinja").write_bytes(b"\xff\xfe{{ x }}")
    with pytest.raises(UserError, match=r"chatty: its tokenizer or chat template cannot be read \(Unicode"):
        run_downstream(evaluated, ["asked"], include=folder, prompting=prompting)


def test_what_a_conversation_alone_has_needs_one():
    with pytest.raises(UserError, match="chat template 'formal': named, but"):
        Prompting(template="formal")
    with pytest.raises(UserError, match="worked examples have turns in a conversation alone"):
        Prompting(multiturn=False)


def test_a_description_that_a_template_leaves_out_is_told(evaluated, tmp_path):
    """lm-eval asks again without it."""
    folder = own_task(tmp_path / "own", ANSWERS, description="Answer well.")
    told = Told()
    run_downstream(evaluated, ["own"], include=folder, prompting=CHAT, progress=told)
    assert not told.notes
    (evaluated.model / "chat_template.jinja").write_text(NO_SYSTEM + TURNS, encoding="utf-8")
    run_downstream(evaluated, ["own"], include=folder, prompting=CHAT, progress=told)
    (note,) = told.notes
    assert "own: the model's chat template has no place for its description, which is left out" in note


def test_questions_that_are_built_leave_room_for_the_conversation(evaluated, other_store):
    told = Told()
    prompting = Prompting(chat=True, system="Go on with the text that you are shown.")
    asked = [f"continuation:{other_store}"]
    scores = run_downstream(evaluated, asked, limit=20, prompting=prompting, progress=told)
    assert [score.domain for score in scores] == ["continuation_scripture (chat, system)"] * 2
    assert not told.notes


@pytest.mark.slow
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_lm_evals_own_command_gives_the_same_numbers(evaluated, folder, tmp_path, system):
    evaluated = dataclasses.replace(evaluated, context=CONTEXT * 4)
    scores = run_downstream(
        evaluated, ["asked", "written"], include=folder, prompting=Prompting(chat=True, system=system)
    )
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={evaluated.model},max_length={CONTEXT * 4}"]
    command += ["--batch_size", "16", "--tasks", "asked,written", "--include_path", str(folder)]
    command += ["--apply_chat_template", *(["--system_instruction", system] if system else [])]
    command += ["--output_path", str(tmp_path / "theirs.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, timeout=240, env=environment)
    (path,) = tmp_path.glob("theirs*.json")
    theirs = json.loads(path.read_text(encoding="utf-8"))["results"]
    assert len(scores) == 3
    for score in scores:
        row = theirs[score.domain.partition(" ")[0]]
        assert score.value == row[f"{score.metric},none"]
        assert score.stderr == row[f"{score.metric}_stderr,none"]
