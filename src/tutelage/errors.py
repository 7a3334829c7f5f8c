"""The two exceptions a user is meant to see, and other libraries' messages on one line."""


class UserError(Exception):
    """Something in the input is wrong; the message is one line and says what would be right.

    The command line prints the message without a traceback and exits with code 2. Library users can
    catch it. Anything else that escapes is a bug of ours and keeps its traceback.
    """


class Stopped(Exception):  # noqa: N818 - it is no error
    """Work was stopped by Ctrl-C or SIGTERM; what was done is on disk and the same call goes on."""


def one_line(error: Exception, limit: int = 300) -> str:
    """Put another library's message on one line, as many whole sentences as fit into `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) <= limit:
        return text
    sentences = text[:limit].rpartition(". ")[0]
    return f"{sentences or text[:limit].rpartition(' ')[0]} ..."
