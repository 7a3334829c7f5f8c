"""Print the bytes that two real training steps need at their peak, by the process's own high-water mark.

python measured_steps.py RUN.yaml VOCABULARY [TEACHER]

Set MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ to 65536, or freed memory is kept and counted.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from fake_steps import CPU, open_steps, take_steps
from peak_memory import high_water_mark

from tutelage.config.load import load
from tutelage.config.run_config import RunConfig
from tutelage.train.distributed import World

MIB = 2**20
SMALL = ("model.shape=nano-20k", "global_batch_tokens=1024", "micro_batch_tokens=1024")


def main(run, vocab_size, teacher=None):
    torch.set_num_threads(1)
    warm = load(RunConfig, Path(run), SMALL)
    take_steps(open_steps(warm, 300, World(CPU), teacher and "nano-20k"))  # load every library first
    Path("/proc/self/clear_refs").write_text("5")  # the mark starts anew
    before = high_water_mark()
    take_steps(open_steps(load(RunConfig, Path(run)), int(vocab_size), World(CPU), teacher))
    print(round((high_water_mark() - before) * MIB))


if __name__ == "__main__":
    main(*sys.argv[1:])
