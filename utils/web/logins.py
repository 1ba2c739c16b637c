"""Who may use the page: user names and passwords, from a file or from the environment."""

import os
from pathlib import Path

from utils.errors import InputError

VARIABLE = "EDITOR_AUTH"


def read_logins(file: str | None) -> list[tuple[str, str]]:
    """(user, password) pairs of a file with lines USER:PASSWORD, else of the environment variable; [] for neither.

    Every process of a machine can see a command line, so passwords on it are refused. Raises InputError, which never
    has the text that was given.
    """
    if file is None:
        lines, source = [os.environ.get(VARIABLE, "")], VARIABLE
    elif Path(file).is_file():
        lines, source = Path(file).read_text("utf-8").splitlines(), f"--auth {file}"
    else:
        raise InputError(
            f"--auth must be a file with lines USER:PASSWORD, and there is no such file. Others can see a password on "
            f"the command line: put it into a file, or into the environment variable {VARIABLE}"
        )
    logins = []
    for number, line in enumerate(lines, 1):
        user, colon, password = line.strip().partition(":")
        if not line.strip() or line.startswith("#"):
            continue
        if not (colon and user.strip() and password):
            raise InputError(f"{source}, line {number}: must be USER:PASSWORD (the line is not shown here)")
        logins.append((user.strip(), password))
    if file is not None and not logins:
        raise InputError(f"{source} has no line USER:PASSWORD")
    return logins
