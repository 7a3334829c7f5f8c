"""torchtitan's Llama 3 with an ObjectiveHead, sharded as torchtitan does it, against one process in float64.

Started by torchrun beside the page's tutored_loss.py.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import distribute_tensor
from torch.nn import functional as F
from torchtitan.distributed.fsdp import apply_fsdp_to_decoder
from torchtitan.models.llama3 import llama3_configs
from tutored_loss import TutoredLoss

from tutelage import Objective, ObjectiveHead

ROWS, LENGTH, E, ALPHA = 8, 16, 24, 0.4


class Attention(nn.Module):
    """In the place of flex_attention, which has no backward pass on a CPU."""

    def forward(self, *qkv_BTNH, **_):
        q, k, v = (x.transpose(1, 2) for x in qkv_BTNH)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def decoder(tied):
    config = llama3_configs["debugmodel"](attn_backend="flex")
    config.layers, config.enable_weight_tying = config.layers[:1], tied
    with torch.device("meta"):
        model = config.build()
    for layer in model.layers.values():
        layer.attention.inner_attention = Attention()
    return model


def initialised(model):
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.init_weights(buffer_device=None)
    return model


def main(tied):
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    whole = initialised(decoder(tied))
    student = decoder(tied)
    student.lm_head = ObjectiveHead(student.lm_head, Objective())
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("fsdp",))
    apply_fsdp_to_decoder(student, mesh, torch.float32, torch.float32, pp_enabled=False)
    for module in student.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo only sums
    initialised(student)
    weights = {name.replace("lm_head", "lm_head.head"): weight for name, weight in whole.named_parameters()}
    for name, weight in student.named_parameters():
        weight.data.copy_(distribute_tensor(weights[name].data, mesh, weight.placements))
    student._skip_lm_head = True  # as torchtitan's trainer does
    loss = TutoredLoss.Config(alpha=ALPHA).build()
    loss.set_lm_head(student.lm_head)

    vocab = len(whole.lm_head.weight)
    ids, labels = torch.randint(vocab, (2, ROWS, LENGTH))
    labels[: ROWS // 2, :5] = -100
    embed, teacher_head = torch.randn(vocab, E), torch.randn(vocab, E)
    valid = labels != -100
    mine = torch.arange(ROWS).chunk(size)[rank]
    for rows in mine.chunk(2):
        x, taught = ids[rows], {"teacher_hidden": embed[ids[rows]], "teacher_head": teacher_head}
        value, _ = loss(student(x), labels[rows], valid.sum(), positions=None, **taught)
        value.backward()
    q = whole.double()(ids)[valid].log_softmax(-1)
    p = (embed[ids[valid]].double() @ teacher_head.double().T).log_softmax(-1)
    kd = F.kl_div(q, p, log_target=True, reduction="batchmean")
    ((1 - ALPHA) * F.nll_loss(q, labels[valid]) + ALPHA * kd).backward()
    for name, weight in student.named_parameters():
        gradient = weights[name].grad.float()
        torch.testing.assert_close(weight.grad.full_tensor(), gradient, rtol=1e-4, atol=1e-6)
    with torch.no_grad():  # as torchtitan validates
        value, _ = loss(student(ids), labels)
        expected = F.cross_entropy(whole(ids)[valid], labels[valid], reduction="sum")
    torch.testing.assert_close(value, expected.float(), rtol=1e-5, atol=0.0)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main(tied=sys.argv[1] == "tied")
    dist.barrier()
    dist.destroy_process_group()
