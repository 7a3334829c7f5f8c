"""The parts of `benchmarks/faults.py`: what is disturbed, how, and how it is judged."""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "POLARS_MAX_THREADS", "RAYON_NUM_THREADS"):
    os.environ[_name] = "1"  # read when torch is imported: two commands at a time beat one with two threads
os.environ |= {"COLUMNS": "400", "TOKENIZERS_PARALLELISM": "false"}
