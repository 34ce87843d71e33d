"""The bearer token that requests have to show, and whether a server may do without."""

import os
from pathlib import Path

from distill.schema import Recipe
from distill.serve.server import is_loopback
from students import InputError

VARIABLE = "SAM_DISTILL_TOKEN"

SHORTEST = 16
"""Characters: a shorter one can be guessed."""


def token_of(recipe: Recipe) -> str | None:
    """What `serve.token_file`, or else the environment, says; None where neither does.

    Raises:
        InputError: it is none that can be used, or there is none, and the address is other machines' too.
    """
    named, where = recipe.serve.token_file, VARIABLE
    if named is not None:
        where = f"serve.token_file={named}"
        try:
            token: str | None = Path(named).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{where} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    else:
        token = os.environ.get(VARIABLE)
    if token is not None and (len(token) < SHORTEST or not token.isascii() or not token.isprintable() or " " in token):
        raise InputError(f"{where}: a token has {SHORTEST} printable ASCII characters or more, and no spaces")
    if token is None and not is_loopback(recipe.host):
        raise InputError(
            f"host={recipe.host} can be reached from other machines: set {VARIABLE}, or serve.token_file=FILE, "
            "or leave host=127.0.0.1"
        )
    return token
