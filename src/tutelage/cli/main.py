"""Assemble the `tutelage` command; what a user did wrong becomes one line and an exit code."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from tutelage.agreement import is_loss, last_words, lost_at_a_stop
from tutelage.cli.data_commands import data_app
from tutelage.cli.doctor import doctor
from tutelage.cli.eval_commands import eval_app
from tutelage.cli.plan_commands import plan_app
from tutelage.cli.reference_commands import init, models, schema, verify
from tutelage.cli.show_commands import runs, show
from tutelage.cli.streams import flush_streams, prepare_streams, tell
from tutelage.cli.study_commands import demo, report, study_app
from tutelage.cli.train_commands import teach, train
from tutelage.errors import Stopped, UserError
from tutelage.files import NO_SPACE, errno_of, no_space
from tutelage.loading import end_soon
from tutelage.processes import place
from tutelage.stopping import EXIT_CODE, came_of_signal, interruptible, last_line

_UNLESS_ASKED = {
    "DISABLE_SAFETENSORS_CONVERSION": "1",  # asks a service of the Hub to unpickle weights
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "USE_HUB_KERNELS": "0",  # compiled code from the Hub
}
"""What libraries do by themselves unless these are set, which they read when they are imported."""


class Commands(TyperGroup):
    """All commands; a signal that none of them has handled ends one, with what is finished on disk."""

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 - a class private to typer
        """Run a command.

        Raises:
            Stopped: it was ended, of which typer would say nothing.
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Stopped from None


app = typer.Typer(
    name="tutelage",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Pretrain language models with a teacher, and measure which teacher, how much of it, and whether "
    "it pays.\n\n"
    "Start with `tutelage demo`: minutes on a laptop, real text, no account.",
)
for command in (demo, report, train, teach, runs, show, init, models, doctor, schema, verify):
    app.command()(command)


def _version(asked: bool) -> None:
    """Print what is installed and from where, and end, if that is asked."""
    if asked:
        from tutelage.installed import describe

        typer.echo(describe())
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="print the version")
    ] = False,
) -> None:
    """Options that stand before a command."""


app.add_typer(data_app, name="data")
app.add_typer(study_app, name="study")
app.add_typer(eval_app, name="eval")
app.add_typer(plan_app, name="plan")


def main() -> None:
    """Entry point of the `tutelage` command: user errors become one line and exit code 2.

    Of several processes only one prints it: the first, or the one that alone has the error, with its rank.
    """
    for name, value in _UNLESS_ASKED.items():
        os.environ.setdefault(name, value)
    end_soon()
    prepare_streams()
    try:
        with interruptible():
            _check_place()
            app()
    except (Stopped, KeyboardInterrupt) as stopped:  # the latter before a command has begun
        _leave(str(stopped))
    except Exception as error:
        if came_of_signal(error) or lost_at_a_stop(error):
            _leave()
        wrong = _wrong_input(error)
        if wrong is None and place().size == 1:
            raise
        _complain(wrong or error)
        sys.exit(1 if wrong is None else 2)
    finally:
        flush_streams()


def _leave(where: str = "") -> NoReturn:
    """End a command that was stopped, after "step 12 of 100" for example."""
    if place().is_main:
        tell(last_line(where))
    sys.exit(EXIT_CODE)


def _check_place() -> None:
    """Refuse paths that are no text, before any work: several libraries that read and write files do."""
    try:
        here = os.path.realpath(".")
    except FileNotFoundError:
        raise UserError("the working directory was removed; change to one that exists") from None
    for path in (here, *sys.argv[1:]):
        try:
            path.encode()
        except UnicodeEncodeError:
            raise UserError(f"{path}: not UTF-8, which names of files must be here; rename it") from None


def _wrong_input(error: Exception) -> UserError | None:
    """The error as one the user can do something about; None for a bug."""
    where = (error.filename if isinstance(error, OSError) else None) or "output"
    if errno_of(error) in NO_SPACE:
        return UserError(no_space(where))
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.ENAMETOOLONG):
        return UserError(f"{where}: {error.strerror}")
    return error if isinstance(error, UserError) else None


def _complain(error: Exception) -> None:
    """Print what ends this process, unless another prints it; the traceback too if it is a bug."""
    line = last_words(error)
    if line is None:
        return
    if not isinstance(error, UserError) and not is_loss(error):
        tell("".join(traceback.format_exception(error)))
    tell(f"error: {line}\n")
