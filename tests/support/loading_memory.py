"""Print how many MiB a checkpoint takes, and at its peak loading it whole and as one of four processes.

Memory is the process's own (RssAnon) whenever a weight has been read; pages of the files, which the system
takes back when it needs them, do not count.
"""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from pathlib import Path

import forked_ranks
import torch
import transformers as hf
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tutelage.models import slices
from tutelage.models.sharding import Sharding
from tutelage.teachers.live import OnlineTeacher

SIZES = {
    "vocab_size": 16_000,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


def own_memory():
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def write(directory):
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES))
    model.save_pretrained(directory / "model")
    size = sum(weight.numel() for weight in model.parameters()) * 4 / 2**20
    (directory / "size").write_text(json.dumps(size))


def load(directory, name):
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("replicate", "shard"))
    pending = slices.describe(directory / "model")
    sharding = None if name == "whole" else Sharding(mesh, None, reshard_after_forward=True)
    OnlineTeacher(pending.model, 0.0, sharding=sharding)
    before, peak = own_memory(), 0.0
    read = slices._Files.read

    def measured(*arguments):
        nonlocal peak
        found = read(*arguments)
        peak = max(peak, own_memory() - before)
        return found

    slices._Files.read = measured
    pending.load(torch.device("cpu"))
    if dist.get_rank() == 0:
        (directory / name).write_text(json.dumps(peak))


def main(folder):
    torch.set_num_threads(1)
    directory = Path(folder)
    forked_ranks.run(1, partial(write, directory))
    forked_ranks.run(1, partial(load, directory, "whole"))
    forked_ranks.run(4, partial(load, directory, "quarter"))
    print(
        json.dumps(
            {name: json.loads((directory / name).read_text()) for name in ("size", "whole", "quarter")}
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
