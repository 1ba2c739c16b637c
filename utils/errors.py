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


ADVICE = "give the folder of a whole diffusers pipeline, or its id on the Hub; copy a damaged file again"


@contextmanager
def explaining_load_errors(what: str, advice: str = ADVICE) -> Iterator[None]:
    """Turn the many errors of a model that is missing, unreachable or damaged into one `InputError` about `what`."""
    import pickle

    from safetensors import SafetensorError

    damaged = (ValueError, TypeError, KeyError, AttributeError, RuntimeError, EOFError, pickle.UnpicklingError)
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        known = (OSError, *damaged, SafetensorError)
        if not isinstance(error, known) and type(error).__name__ != "SingleFileComponentError":  # diffusers' own
            raise
        reason = f": {_first_line(error)}" if isinstance(error, OSError) else f", is it damaged? {_first_line(error)}"
        if is_hub_out_of_reach(error):
            reason = ": it is not on this machine, not cached, and the Hub cannot be reached (or offline mode is on)"
        raise InputError(f"{what} cannot be loaded{reason} ({advice})") from error


def is_hub_out_of_reach(error: BaseException | None) -> bool:
    """diffusers wraps the reason: without a connection it says that the repository lacks the file."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    while error is not None:
        if isinstance(error, (LocalEntryNotFoundError, ConnectionError)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
