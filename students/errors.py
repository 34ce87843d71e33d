"""The exceptions that speak to the person at the keyboard."""


class InputError(Exception):
    """Something the person gave cannot work: a file, a name, a setting.

    The message is one line that names the thing, and is shown as it is, without a traceback (exit code 2).
    Anything else that is raised is a bug of ours and keeps its traceback.
    """


class CheckFailed(Exception):
    """What was asked for was done, and what came of it, or what lies there, is not as it should be.

    The message is one line, shown without a traceback (exit code 1).
    """


def first_line(error: Exception) -> str:
    """The first line of an exception's text, or its type where it has none; for use inside an `InputError`."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
