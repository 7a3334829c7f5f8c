"""Which families of causal language models can teach and learn here, tried on a tiny random model of each.

Families are those that transformers knows. A teacher's logits, from hidden states and head, are held against
the model's own; a student takes three steps and its loss has to fall; what is exported is read back; two
processes share the teacher's weights, each of which reads its slices only.

    python benchmarks/model_families.py [FAMILY ...] > families.md

takes about ten minutes on one core, and prints the tables of docs/families.md.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
from tokenizers import ByteLevelBPETokenizer
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tutelage.config.objective_config import Objective
from tutelage.errors import UserError, one_line
from tutelage.models import hub, slices
from tutelage.models.sharding import Sharding
from tutelage.objective.products import dense_logits
from tutelage.teachers.live import OnlineTeacher
from tutelage.train.objective_model import ObjectiveModel
from tutelage.types import Batch

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))

import forked_ranks
import tiny_families

CPU = torch.device("cpu")
STEPS, SECONDS = 3, 60


@dataclass
class Row:
    """What was found out about a family; a number is the largest difference of logits, a text why not."""

    family: str
    teacher: float | str = "not tried"
    student: str = ""
    export: float | str = ""
    shared: float | str = ""


def batch() -> Batch:
    """Four sequences of other ids than the special ones."""
    ids = torch.randint(10, tiny_families.VOCAB, (4, 33), generator=torch.Generator().manual_seed(0))
    return Batch(ids[:, :-1], ids[:, 1:], (0, 1, 2, 3))


def logits(teacher: OnlineTeacher, tokens: Batch) -> torch.Tensor:
    """A teacher's logits, as the objective makes them."""
    return dense_logits(teacher.targets(tokens), slice(None), None)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference of two tensors; raises UserError if they have other shapes."""
    if found.shape != expected.shape:
        raise UserError(f"{tuple(found.shape)} logits where the model gives {tuple(expected.shape)}")
    return float((found - expected).abs().max())


def reason(error: Exception) -> str:
    """What an error says, without the temporary directory."""
    text = one_line(error) if isinstance(error, UserError) else f"{type(error).__name__}: {one_line(error)}"
    return text.split(": ", 1)[1] if text.startswith("/") else text


def learn(directory: Path) -> tuple[str, transformers.PreTrainedModel]:
    """Take a few steps of AdamW on one batch."""
    model = hub.load(directory, dtype=torch.float32).train()
    student = ObjectiveModel(model, Objective(), tiny_families.VOCAB)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(STEPS + 1):
        torch.manual_seed(0)
        loss = student(batch(), None, 0.0)[0] / batch().tokens_BT.numel()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    idle = [name for name, weight in model.named_parameters() if weight.grad is None]
    falls = "learns" if losses[-1] < losses[0] else f"loss {losses[0]:.3f}, then {losses[-1]:.3f}"
    return falls + (f", {len(idle)} weights without a gradient" if idle else ""), model


def share(directory: Path, expected: torch.Tensor, result: Path) -> None:
    """What each of two processes does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    try:
        pending = slices.describe(directory, dtype=torch.float32)
        teacher = OnlineTeacher(pending.model, 0.0, sharding=Sharding(mesh, None, reshard_after_forward=True))
        pending.load(CPU)
        teacher.use(lambda model: hub.check_logits(model, str(directory)))
        found: float | str = difference(logits(teacher, batch()), expected)
    except Exception as error:  # noqa: BLE001 - the table says what it was
        found = reason(error)
    if dist.get_rank() == 0:
        result.write_text(json.dumps(found))


def tried(family: str, folder: Path, tokenizer: Path) -> Row:
    """Try one family."""
    row, directory = Row(family), folder / "model"
    try:
        model = tiny_families.tiny_model(family, directory)
        tokens = batch()
        with torch.no_grad():
            expected = model(input_ids=tokens.tokens_BT, use_cache=False).logits.float().flatten(0, 1)
    except Exception as error:  # noqa: BLE001
        row.teacher = f"no tiny model could be made: {reason(error)}"
        return row
    try:
        row.teacher = difference(logits(OnlineTeacher(hub.load(directory), 0.0), tokens), expected)
    except Exception as error:  # noqa: BLE001
        row.teacher = reason(error)
        return row
    try:
        row.student, learned = learn(directory)
        row.export = hub.save(learned.eval(), folder / "exported", tokenizer)
    except Exception as error:  # noqa: BLE001
        row.export = reason(error)
    result = folder / "shared.json"
    forked_ranks.wait(forked_ranks.start(2, partial(share, directory, expected, result)), SECONDS)
    row.shared = json.loads(result.read_text()) if result.exists() else f"nothing after {SECONDS} s"
    return row


def tables(rows: list[Row]) -> str:
    """Markdown: what is accepted, and what is not, with the sentence that a user gets."""

    def cell(value: float | str) -> str:
        return f"{value:.0e}" if isinstance(value, float) and value else str(value).replace("0.0", "0")

    head = "| family | as teacher | as student | exported, read back | shared by 2 processes |"
    lines = [head, "|---|---|---|---|---|"]
    accepted = (row for row in rows if isinstance(row.teacher, float))
    lines += ["| " + " | ".join(cell(value) for value in asdict(row).values()) + " |" for row in accepted]
    lines += ["", "| not accepted | because |", "|---|---|"]
    refused = [row for row in rows if not isinstance(row.teacher, float)]
    lines += [f"| {row.family} | {row.teacher} |" for row in refused]
    return "\n".join(lines)


def main(asked: list[str]) -> None:
    """Try all families, or those asked for, and print the tables."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = Path(temporary) / "tokenizer"
        tokenizer.mkdir()
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator(["a weak teacher may teach a strong student " * 9], tiny_families.VOCAB)
        bpe.save(str(tokenizer / "tokenizer.json"))
        kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
        (tokenizer / "tokenizer_config.json").write_text(json.dumps(kind))
        for number, family in enumerate(asked or tiny_families.FAMILIES):
            folder = Path(temporary) / str(number)
            folder.mkdir()
            rows.append(tried(family, folder, tokenizer))
            print(rows[-1], file=sys.stderr, flush=True)
    print(tables(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
