"""The objective's head under FSDP2 and DDP on two ranks, against the same head whole. Started by torchrun."""

from __future__ import annotations

import json

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from traffic import Traffic

from tutelage.objective import Objective, chunked_objective
from tutelage.objective.chunked import ObjectiveHead
from tutelage.types import DenseTargets, SparseTargets

N, D, E, V, STEPS = 38, 16, 24, 101, 3


def problem():
    torch.manual_seed(0)
    body = nn.Linear(D, D, bias=False)
    head = nn.Linear(D, V, bias=False)
    x = torch.randn(N, D)
    labels = torch.randint(V, (N,))
    labels[:7] = -100  # the ranks hold different numbers of valid tokens
    return body, head, x, labels, torch.randn(N, E), torch.randn(V, E)


def step(body, head, x, labels, targets, valid):
    hidden = body(x)
    hidden.retain_grad()
    loss, *metrics = head(hidden, labels, targets, 0.4)
    (loss / valid).backward()
    return hidden.grad, torch.stack([loss.detach(), *metrics])


def accumulated_step(body, head, x, labels, targets, valid):
    """The same in two micro-batches: gathered for the first, reduced after the last."""
    d_hidden, sums = [], 0
    for rows in (slice(0, 7), slice(7, None)):
        last = rows.stop is None
        for module in (body, head):
            module.set_is_last_backward(last)
            module.set_requires_gradient_sync(last)
            module.set_reshard_after_backward(last)
        found, more = step(body, head, x[rows], labels[rows], targets.rows(rows), valid)
        d_hidden, sums = [*d_hidden, found], sums + more
    return torch.cat(d_hidden), sums


def targets_of(kind, ht, Wt):
    if kind == "dense":
        return DenseTargets(ht, Wt)
    p, ids = (ht @ Wt.T).softmax(-1).topk(5)
    return SparseTargets(ids, p, 1 - p.sum(1), torch.full((len(ht),), -2.0))


def main(kind):
    rank = dist.get_rank()
    body, head, x, labels, ht, Wt = problem()
    valid = (labels != -100).sum()
    whole = ObjectiveHead(head, Objective(chunk_tokens=8))
    d_hidden, sums = step(body, whole, x, labels, targets_of(kind, ht, Wt), valid)
    expected = head.weight.grad.clone(), body.weight.grad.clone()

    body, head, x, labels, ht, Wt = problem()
    sharded = ObjectiveHead(head, Objective(chunk_tokens=8))
    mesh = init_device_mesh("cpu", (2,))
    for module in (body, sharded):
        fully_shard(module, mesh=mesh, reshard_after_forward=False)
        module.set_gradient_divide_factor(1.0)  # the loss is divided by the global count already
        module.set_force_sum_reduction_for_comms(True)  # gloo only sums
    mine = slice(rank * N // 2, (rank + 1) * N // 2)
    for take in (*[step] * STEPS, accumulated_step):
        body.zero_grad()
        sharded.zero_grad()
        targets = targets_of(kind, ht[mine], Wt)
        with Traffic() as traffic:
            found, my_sums = take(body, sharded, x[mine], labels[mine], targets, valid)
        assert sharded.head.weight.to_local().shape[0] < V
        torch.testing.assert_close(found, d_hidden[mine], rtol=1e-5, atol=1e-7)
        for weight, gradient in ((sharded.head.weight, expected[0]), (body.weight, expected[1])):
            torch.testing.assert_close(weight.grad.full_tensor(), gradient, rtol=1e-5, atol=1e-7)
        dist.all_reduce(my_sums)
        torch.testing.assert_close(my_sums, sums, rtol=1e-5, atol=1e-5)
        if rank == 0:
            print(json.dumps(traffic.calls), flush=True)


class Student(nn.Module):
    """A model whose forward stops before its head."""

    def __init__(self, body, head):
        super().__init__()
        self.body, self.head = body, head

    def forward(self, x):
        return self.body(x)


def copied(kind):
    """DDP, which averages over ranks, as docs/how-to/loss-in-a-torch-loop.md says: in two micro-batches."""
    rank, size = dist.get_rank(), dist.get_world_size()
    body, head, x, labels, ht, Wt = problem()
    valid = (labels != -100).sum()
    step(body, ObjectiveHead(head, Objective()), x, labels, targets_of(kind, ht, Wt), valid)
    student = DistributedDataParallel(Student(*problem()[:2]))
    mine = torch.arange(N).chunk(size)[rank]
    valid = (labels[mine] != -100).sum()
    dist.all_reduce(valid)
    for rows in (mine[:7], mine[7:]):
        hidden, weight = student(x[rows]), student.module.head.weight
        targets = targets_of(kind, ht[rows], Wt)
        sums = chunked_objective(hidden, weight, labels[rows], targets, 0.4, Objective())
        (sums.loss * size / valid).backward()
    for ours, whole in ((student.module.body, body), (student.module.head, head)):
        torch.testing.assert_close(ours.weight.grad, whole.weight.grad, rtol=1e-5, atol=1e-7)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for kind in ("dense", "sparse"):
        main(kind)
        copied(kind)
    dist.barrier()
    dist.destroy_process_group()
