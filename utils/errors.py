"""One message for a user's mistake, and no traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Something that the user gave cannot work: the message names it, says what is allowed and what to do."""

    @classmethod
    def from_problems(cls, problems: list[str]) -> InputError:
        """All problems of one kind in one message, one line each."""
        return cls(problems[0] if len(problems) == 1 else "\n  - ".join(["several things need mending:", *problems]))


@contextmanager
def exit_on_input_error(exit_code: int = 2) -> Iterator[None]:
    """Turn an `InputError` into one message on stderr and `exit_code`; any other exception is a bug and shows itself."""
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(exit_code) from None
