"""README and every how-to are followed, alone and in one directory: their blocks as they stand."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from warm_commands import THREADS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "docs" / "tutorial.md", *sorted(ROOT.glob("docs/how-to/*.md"))]
NAMED = re.compile(r"# (\S+\.(?:py|yaml))\n")
NEEDS = {"evaluate": "lm_eval", "loss-in-hugging-face-trainer": "accelerate"}
TITAN = """
import torch
from torch import nn
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from tutelage.objective import Objective
from tutelage.objective.chunked import ObjectiveHead
from tutored_loss import TutoredLoss

torch.manual_seed(0)
hidden, labels = torch.randn(2, 8, 16, requires_grad=True), torch.randint(64, (2, 8))
head, valid = nn.Linear(16, 64, bias=False), torch.tensor(16)
gradients = []
for loss, module, more in (
    (ChunkedLossWrapper.Config(num_chunks=2, loss_fn=CrossEntropyLoss.Config()).build(), head, {}),
    (
        TutoredLoss.Config(alpha=0.0).build(),
        ObjectiveHead(head, Objective()),
        {"teacher_hidden": torch.randn(2, 8, 4), "teacher_head": torch.randn(64, 4)},
    ),
):
    loss.set_lm_head(module)
    value, metrics = loss(hidden, labels, valid, **more)
    value.backward()
    gradients.append((value.detach(), hidden.grad.clone(), head.weight.grad.clone()))
    hidden.grad = head.weight.grad = None
for theirs, ours in zip(*gradients):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
"""
TUTORED_TRAINER = """
import copy
import torch
from torch.nn.functional import cross_entropy, kl_div
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from page import Objective, TrainingArguments, TutoredTrainer

class Plain(TutoredTrainer):
    def create_optimizer(self, model=None):
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        return self.optimizer

class Uncounted(LlamaForCausalLM):
    accepts_loss_kwargs = False  # as Gemma 3n's

def gpt2():
    sizes = dict(vocab_size=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(GPT2Config(**sizes, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0))

def uncounted():
    sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=16)
    return Uncounted(LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2))

ids = torch.randint(64, (6, 5), generator=torch.Generator().manual_seed(1))
settings = dict(max_steps=1, per_device_train_batch_size=3, gradient_accumulation_steps=2, max_grad_norm=0.0)
quiet = dict(lr_scheduler_type="constant", save_strategy="no", report_to=[], use_cpu=True)
for make in (gpt2, uncounted):
    torch.manual_seed(0)
    student, teacher = make(), make()
    truth, taught = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    q, p = (model(ids).logits[:, :-1].flatten(0, 1).log_softmax(-1) for model in (truth, taught))
    kd = kl_div(q, p.detach(), log_target=True, reduction="batchmean")
    (0.6 * cross_entropy(q, ids[:, 1:].flatten()) + 0.4 * kd).backward()
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments("out", **settings, **quiet)
    more = dict(teacher=teacher, alpha=0.4, objective=Objective())
    trainer = Plain(student, arguments, train_dataset=rows, **more)
    trainer.train()
    for ours, theirs in zip(student.parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(ours, (theirs - theirs.grad).float(), rtol=1e-4, atol=1e-6)
"""

NEEDS_TITAN = pytest.mark.skipif(
    importlib.util.find_spec("torchtitan") is None, reason="pip install --no-deps -r tests/torchtitan.txt"
)


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of every block of a page that is to be followed, in order."""
    return re.findall(
        r"^```(bash|python|yaml)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


def run(command: str, folder: Path, more: Path | None = None) -> None:
    places = [*([more] if more else []), Path(sys.executable).parent, os.environ["PATH"]]
    environment = os.environ | {"PATH": os.pathsep.join(map(str, places))} | THREADS
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def follow(page: Path, folder: Path, warm: Path) -> None:
    """Do what a page says from its first block to its last, as a reader would."""
    together = []
    for language, text in blocks(page):
        name = NAMED.match(text)
        if name:
            file = folder / name[1]
            assert not file.exists() or file.read_text(encoding="utf-8") == text, (
                f"{page.name}: {file.name} is taken"
            )
            file.write_text(text, encoding="utf-8")
        elif language == "python":
            together.append(text)
        else:
            assert language == "bash", "a YAML block starts with its file name"
            lines = [line for line in text.splitlines() if not line.startswith("make ")]
            run("\n".join(["set -e", *lines]), folder, warm)
    if together:
        (folder / "page.py").write_text("\n".join(together), encoding="utf-8")
        run("python page.py", folder, warm)


def test_pages_are_found():
    assert len(PAGES) >= 10
    assert [len(blocks(page)) > 3 for page in PAGES if page.stem in {"README", "evaluate", "sft"}] == [
        True
    ] * 3


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_each_page_alone_and_then_all_in_one_directory(tmp_path, warm):
    """No page needs what another made, or is disturbed by it; what is there already is not made again."""
    pages = [page for page in PAGES if page.stem not in NEEDS or importlib.util.find_spec(NEEDS[page.stem])]
    together = tmp_path / "together"
    for page in pages:
        alone = tmp_path / page.stem
        alone.mkdir()
        follow(page, alone, warm)
        shutil.copytree(alone, together, dirs_exist_ok=True)
    made = {path: path.stat().st_mtime_ns for path in together.glob("runs/*/model/model.safetensors")}
    assert len(made) > 10
    for page in reversed(pages):
        follow(page, together, warm)
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert {*together.glob("runs/*/model/model.safetensors")} == {*made}


def write_titan(folder: Path) -> None:
    page = next(page for page in PAGES if page.stem == "loss-in-torchtitan")
    (text,) = (text for _, text in blocks(page) if text.startswith("# tutored_loss.py"))
    (folder / "tutored_loss.py").write_text(text, encoding="utf-8")


@NEEDS_TITAN
def test_tutored_loss_is_torchtitans_own_at_alpha_0(tmp_path):
    write_titan(tmp_path)
    (tmp_path / "compare.py").write_text(TITAN, encoding="utf-8")
    run(f"{sys.executable} compare.py", tmp_path)


@NEEDS_TITAN
@pytest.mark.slow
@pytest.mark.parametrize("embedding", ["apart", "tied"])
def test_tutored_loss_trains_torchtitans_sharded_decoder(tmp_path, embedding):
    write_titan(tmp_path)
    shutil.copy(ROOT / "tests" / "support" / "titan_decoder.py", tmp_path)
    launcher = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2"
    run(f"{launcher} titan_decoder.py {embedding}", tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="pip install accelerate")
def test_tutored_trainer_takes_the_mean_over_labels_for_any_model(tmp_path):
    """The Trainer counts labels by the name of a model's class and by what the model says of itself."""
    page = next(page for page in PAGES if page.stem == "loss-in-hugging-face-trainer")
    (text,) = (text for _, text in blocks(page) if "class TutoredTrainer" in text)
    (tmp_path / "page.py").write_text(text, encoding="utf-8")
    (tmp_path / "compare.py").write_text(TUTORED_TRAINER, encoding="utf-8")
    run(f"{sys.executable} compare.py", tmp_path)
