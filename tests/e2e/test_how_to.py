"""Every how-to is run: its blocks in order, in an empty directory, as a reader would."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).parents[2] / "docs" / "how-to").glob("*.md"))
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


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def run(command: str, folder: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_pages_are_found():
    assert len(PAGES) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_run_in_order(page, tmp_path):
    if page.stem in NEEDS:
        pytest.importorskip(NEEDS[page.stem])
    together = []
    for text in blocks(page, "python"):
        compile(text, page.name, "exec")
        if name := NAMED.match(text):
            (tmp_path / name[1]).write_text(text, encoding="utf-8")
        else:
            together.append(text)
    if together:
        (tmp_path / "page.py").write_text("\n".join(together), encoding="utf-8")
        run(f"{sys.executable} page.py", tmp_path)
    for text in blocks(page, "yaml"):
        name = NAMED.match(text)
        assert name, "a YAML block starts with its file name"
        (tmp_path / name[1]).write_text(text, encoding="utf-8")
    run("set -e\n" + "\n".join(blocks(page, "bash")), tmp_path)


@pytest.mark.skipif(
    importlib.util.find_spec("torchtitan") is None, reason="pip install --no-deps -r tests/torchtitan.txt"
)
def test_tutored_loss_is_torchtitans_own_at_alpha_0(tmp_path):
    page = next(page for page in PAGES if page.stem == "loss-in-torchtitan")
    (text,) = (text for text in blocks(page, "python") if text.startswith("# tutored_loss.py"))
    (tmp_path / "tutored_loss.py").write_text(text, encoding="utf-8")
    (tmp_path / "compare.py").write_text(TITAN, encoding="utf-8")
    run(f"{sys.executable} compare.py", tmp_path)
