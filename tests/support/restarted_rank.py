"""The `tutelage` command for a test of torchrun's restarts: at the first start, rank 1 kills itself once."""

from __future__ import annotations

import os
import signal

from tutelage.cli.main import main
from tutelage.train.student import Student

FATAL_STEP = 9

if (os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]) == ("0", "1"):
    finish = Student.finish_step

    def die(self, *arguments, **keywords):
        if self.step == FATAL_STEP:
            os.kill(os.getpid(), signal.SIGKILL)
        return finish(self, *arguments, **keywords)

    Student.finish_step = die

main()
