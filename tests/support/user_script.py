"""A user's script, as mypy --strict sees it: every `reveal_type` and every mistake is known to the test."""

from pathlib import Path

import polars as pl
import torch

import tutelage as tt
from tutelage.objective import make_gate

store: Path = tt.build_store("store.yaml", "stores", ["tokenizer.vocab_size=300"])
vocabulary: int = tt.open_store(str(store)).vocab_size
config = tt.RunConfig.model_validate({"name": "a"})
run: tt.RunDirectory = tt.run(config)
tt.run("student.yaml", ["tokens=1M"])
tt.run(Path("student.yaml"))
tt.run({"name": "a", "model": {"shape": "nano-20k"}})
table: pl.DataFrame = tt.load_scores("runs")
study: tt.Study = tt.run_study("demo", "out", workers=2)
tables: list[pl.DataFrame] = [study.plan, study.results, study.scores, study.gains, study.verdicts]
tables.append(tt.open_study(Path("out")).gains)

objective = tt.Objective(temperature=2.0, label_smoothing=0.1, z_loss=1e-4, truncation=tt.TopK(k=8))
hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(11, 4, requires_grad=True)
labels = torch.randint(0, 11, (6,))
dense = tt.DenseTargets(torch.randn(6, 3), torch.randn(11, 3), transform=tt.LogitTransform(softcap=30.0))
more: list[tt.LogitTargets | tt.SparseTargets] = [
    tt.LogitTargets(torch.randn(6, 11)),
    tt.SparseTargets(labels[:, None], torch.ones(6, 1), torch.zeros(6), torch.zeros(6)),
]
given = hidden, weight, labels, dense, 0.4, objective
sums = tt.chunked_objective(*given, token_weights_N=torch.ones(6), per_token=True)
loss: torch.Tensor = sums.loss / 6
entropy: torch.Tensor | None = None if sums.tokens is None else sums.tokens.entropy_N
same: tt.LossSums = tt.reference_objective(hidden, weight, labels, more[0], 0.4, tt.objective.Objective())
head = tt.ObjectiveHead(torch.nn.Linear(4, 11), objective)
w, b = tt.weight_and_bias(head.head)
gate = make_gate(None)
try:
    tt.run("x.yaml")
except (tt.UserError, tt.Stopped) as error:
    print(error)

reveal_type(tt.chunked_objective)  # noqa: F821 - mistakes from here on
tt.chunked_objective(hidden, weight, labels, torch.randn(6, 11), 0.4, objective)
tt.chunked_objective(hidden, weight, labels, None, "0.4", objective)
tt.chunked_objective(hidden, torch.nn.Linear(4, 11), labels, None, 0.0, objective)
tt.chunked_objective(hidden, weight, labels, None, 0.0, "jsd")
tt.Objective(temperature="2")
tt.Objective(divergence="kl")
tt.Objective(tempreature=2.0)
tt.TopK()
tt.run(3)
print(study.verdict)
