"""Draw the stages of a run, as training does: `python drawn_stages.py NAME` in a terminal or with a log."""

from __future__ import annotations

import sys
import time

from tutelage.cli.bars import RichProgress

ROW = {
    "step": 1240,
    "loss": 3.2141,
    "ce": 3.5012,
    "kd_top50": 2.7833,
    "alpha": 0.4,
    "tokens_per_second": 123_456.7,
    "mfu": 0.41,
    "peak_memory_gib": 41.2,
}

if __name__ == "__main__":
    with RichProgress() as progress:
        progress.note("resuming after step 1,000 of 95,367")
        progress.start(sys.argv[1], 95_367, "steps", 1000)
        for step in range(1220, 1241):
            progress.advance(sys.argv[1], step)
            progress.describe(sys.argv[1], ROW)
            time.sleep(0.05)
        time.sleep(0.5)  # the screen is drawn five times a second
        progress.finish(sys.argv[1])
