"""Assemble the `tutelage` command; what a user did wrong becomes one line and an exit code."""

from __future__ import annotations

import errno
import sys

import typer

from tutelage.cli.data_commands import data_app
from tutelage.cli.doctor import doctor
from tutelage.cli.eval_commands import eval_app
from tutelage.cli.reference_commands import models, schema
from tutelage.cli.study_commands import demo, report, study_app
from tutelage.cli.train_commands import teach, train
from tutelage.errors import Stopped, UserError

app = typer.Typer(
    name="tutelage",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Pretrain language models with a teacher, and measure which teacher, how much of it, and whether "
    "it pays.\n\n"
    "Start with `tutelage demo`: minutes on a laptop, real text, no account.",
)
for command in (demo, report, train, teach, models, doctor, schema):
    app.command()(command)
app.add_typer(data_app, name="data")
app.add_typer(study_app, name="study")
app.add_typer(eval_app, name="eval")


def main() -> None:
    """Entry point of the `tutelage` command: user errors become one line and exit code 2."""
    try:
        app()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS):
            raise
        sys.stderr.write(f"error: {error.filename or 'output'}: {error.strerror}\n")
        sys.exit(2)
    except Stopped:
        sys.stderr.write("\nstopped; run the same command again to resume\n")
        sys.exit(130)
