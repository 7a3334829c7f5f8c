"""What docs/explanation/security.md promises, watched by an audit hook in a process that does it all."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_study import TINY
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

SUPPORT = Path(__file__).parents[1] / "support"
SECRETS = {
    "HF_TOKEN": "hf_" + "SecretSecretSecret12345",
    "WANDB_API_KEY": "wandb5ecretwandb5ecret",
    "AWS_SECRET_ACCESS_KEY": "aws5ecretaws5ecret",
}
RAN = "import pathlib; pathlib.Path({!r}).write_text('ran')\n"


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (Path(self.path), "ran")


def plant(model, ran):
    """Put into a model directory whatever has ever made a library run code."""
    for name in ("modeling_x", "configuration_x", "tokenization_x", "pipeline_x", "model"):
        (model / f"{name}.py").write_text(RAN.format(str(ran)))
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "x.pth", "x.npy", ".metadata"):
        (model / name).write_bytes(pickle.dumps(Bomb(str(ran))))
    torch.save(Bomb(str(ran)), model / "consolidated.00.pth")
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(RAN.format(str(ran)))
    file = model / "config.json"
    auto = {"AutoConfig": "configuration_x.Config", "AutoModelForCausalLM": "modeling_x.Model"}
    pipes = {"text-generation": {"impl": "pipeline_x.Pipe", "pt": ["AutoModelForCausalLM"]}}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": auto, "custom_pipelines": pipes}))
    file = model / "tokenizer_config.json"
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_x.T", "tokenization_x.T"]}}
    escape = "{{ cycler.__init__.__globals__.os.system('touch " + str(ran) + "') }}"
    file.write_text(json.dumps(json.loads(file.read_text()) | tokenizer | {"chat_template": escape}))
    (model / "checksums.json").unlink(missing_ok=True)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory, store):
    """A hostile model directory, made of a model that works."""
    model = tmp_path_factory.mktemp("foreign") / "model"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=128, **sizes)).save_pretrained(model)
    AutoTokenizer.from_pretrained(store).save_pretrained(model)
    plant(model, model.parent / "ran")
    return model


@pytest.mark.slow
def test_nothing_is_unpickled_run_opened_or_written_that_should_not_be(foreign, tmp_path):
    output, home = tmp_path / "work", tmp_path / "home"
    output.mkdir()
    home.mkdir()
    text = [{"text": f"{word} went to the market and bought {n} apples. " * 5}
            for n, word in enumerate(["Ann", "Bob", "Cid", "Dan"] * 60)]  # fmt: skip
    (output / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text))
    build = {
        "name": "text",
        "sources": [{"kind": "files", "paths": [str(output / "text.jsonl")]}],
        "tokenizer": {"path": str(foreign)},
        "validation": 0.2,
        "test": 0.2,
    }
    (output / "build.yaml").write_text(yaml.safe_dump(build))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "WANDB"))}
    environment |= SECRETS | {
        "HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(output),
    }
    root = Path(__file__).parents[2]
    environment["PYTHONPATH"] = os.pathsep.join([str(SUPPORT), str(root / "src")])
    environment |= {"TMPDIR": str(output), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}

    def audited(*commands):
        done = subprocess.run(
            [sys.executable, "-m", "audited", str(output), str(foreign.parent), json.dumps(commands)],
            capture_output=True,
            text=True,
            check=False,
            cwd=output,
            env=environment,
        )
        line = next((line for line in done.stdout.splitlines() if line.startswith("AUDIT ")), None)
        assert line is not None, done.stdout + done.stderr
        return json.loads(line.removeprefix("AUDIT ")), done.stdout + done.stderr

    base = [
        *("seed=1", "tokens=8192", "global_batch_tokens=512", "data.store=text", "data.sequence_length=32"),
        *("runtime.device=cpu", "model.shape=nano-20k", "eval.max_documents=4"),
    ]
    teach = ["store=text", f"teacher.path={foreign}", "context_length=32"]
    (output / "run.yaml").write_text(
        "name: taught\nobjective: {alpha: 0.5}\nteacher: {kind: model, path: '?'}\n"
    )
    (output / "teach.yaml").write_text("teacher: {kind: model, path: '?'}\n")
    result, said = audited(
        ["data", "build", "build.yaml", "--output", "stores"],
        ["teach", "teach.yaml", *teach],
        ["train", "run.yaml", *base, f"teacher.path={foreign}"],
        ["eval", "score", str(foreign), "runs/taught", "--store", "held-out=text", "--max-documents", "4"],
    )
    assert result["statuses"] == [0, 0, 0, 0], said
    assert result["found"] == [], json.dumps(result["found"], indent=1)[:6000]
    assert result["counts"]["open"] > 100
    assert result["counts"]["os.rename"] > 5

    for checkpoint in output.glob("runs/taught-*/checkpoints/step-*"):
        for name in (".metadata", "__0_0.distcp", "optimizer.pt", "counters.pkl"):
            (checkpoint / name).write_bytes(pickle.dumps(Bomb(str(foreign.parent / "ran"))))
    (trained,) = output.glob("runs/taught-*/model/model.safetensors")
    weights = trained.read_bytes()
    shutil.rmtree(trained.parent)
    study = TINY | {
        "corpus": build | {"tokenizer": {"path": str(foreign)}},
        "domains": {"other": {"source": {"kind": "corpus", "name": "kjv"}, "max_bytes": 50_000}},
        "teachers": {"given": {"model": str(foreign)}},
        "students": {
            "main": {
                "shape": "nano-20k",
                "tokens": "2K",
                "grid": {"product": {"teacher": ["given"], "alpha": [0.4]}},
            }
        },
    }
    (output / "study.yaml").write_text(yaml.safe_dump(study))
    result, said = audited(
        ["train", "run.yaml", *base, f"teacher.path={foreign}"],
        ["study", "run", "study.yaml", "--output", "study", "--workers", "1"],
        ["report", "study"],
    )
    assert result["statuses"] == [0, 0, 0], said
    assert result["found"] == [], json.dumps(result["found"], indent=1)[:6000]
    assert trained.read_bytes() == weights
    assert (output / "study" / "report.html").is_file()
    assert not (foreign.parent / "ran").exists()
    assert not list(home.rglob("*"))
    for path in output.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            for secret in (*SECRETS.values(), str(home)):
                assert secret.encode() not in content, path


def test_the_hook_sees_what_must_not_happen(tmp_path):
    """Otherwise the test above would show nothing."""
    code = (
        "import sys, json; sys.argv = ['x', sys.argv[1], sys.argv[2], '[]']; sys.path.insert(0, sys.argv[2]);"
        "import audited; sys.addaudithook(audited.hook); import pickle, socket, collections;"
        "pickle.loads(pickle.dumps(collections.OrderedDict)); socket.create_server(('127.0.0.1', 0)).close();"
        "import planted; open(sys.argv[2] + '/new', 'w').close();"
        "print(json.dumps(sorted({one[0] for one in audited.found})))"
    )
    (tmp_path / "work").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "planted.py").write_text("x = 1\n")
    done = subprocess.run(
        [sys.executable, "-B", "-c", code, str(tmp_path / "work"), str(tmp_path / "foreign")],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(SUPPORT)},
    )
    assert json.loads(done.stdout) == ["exec", "open", "pickle.find_class", "socket.bind"]
