"""The two exceptions a user is meant to see."""


class UserError(Exception):
    """Something in the input is wrong; the message is one line and says what would be right.

    The command line prints the message without a traceback and exits with code 2. Library users can
    catch it. Anything else that escapes is a bug of ours and keeps its traceback.
    """


class Stopped(Exception):  # noqa: N818 - it is no error
    """Work was stopped by Ctrl-C or SIGTERM; what was done is on disk and the same call goes on."""
