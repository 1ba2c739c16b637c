"""One message for a user's mistake, and no traceback."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class InputError(ValueError):
    """Something that the user gave cannot work: the message names it, says what is allowed and what to do."""

    @classmethod
    def from_problems(cls, problems: list[str]) -> InputError:
        """All problems of one kind in one message, one line each."""
        return cls(problems[0] if len(problems) == 1 else "\n  - ".join(["several things need mending:", *problems]))


@contextmanager
def exit_on_input_error(exit_code: int = 2) -> Iterator[None]:
    """Turn an `InputError` or a full disk into one message on stderr and `exit_code`.

    Any other exception is a bug and shows itself.
    """
    try:
        yield
    except InputError as error:
        message = str(error)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        message = f"{error.filename or 'a file'} could not be written: {error.strerror}. Make room, and run this again"
    else:
        return
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(exit_code)
