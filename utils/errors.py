"""Errors that are the user's to fix: one clear message, no traceback."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

CLOSED_PIPE = 141  # as a shell reports a program that SIGPIPE ended
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class InputError(ValueError):
    """A flag, file or value that cannot be used. The message names it and says what is allowed and what to do."""

    @classmethod
    def from_problems(cls, problems: list[str]) -> InputError:
        """One error for all problems: the message of a single one, or a list."""
        return cls(problems[0] if len(problems) == 1 else "\n  - ".join(["fix these problems:", *problems]))


def discard_output() -> None:
    """Whatever is still printed goes nowhere: flushing it at the end would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def exit_on_input_error(exit_code: int = 2) -> Iterator[None]:
    """Exit with one message on stderr on `InputError` or a full disk; any other exception is a bug and is raised.

    A reader of the output that has seen enough, as `| head`, ends the script without a message.
    """
    try:
        yield
        sys.stdout.flush()
    except InputError as error:
        message = str(error)
    except BrokenPipeError:
        discard_output()
        raise SystemExit(CLOSED_PIPE) from None
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        message = f"{error.filename or 'a file'} could not be written: {error.strerror}. Make room and run this again"
    else:
        return
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(exit_code)


ADVICE = "give a folder with a complete diffusers pipeline or its Hub id; copy a damaged file again"


@contextmanager
def explaining_load_errors(what: str, advice: str = ADVICE) -> Iterator[None]:
    """Replace the many errors for a model that is missing, unreachable or damaged by one `InputError`.

    what: the model, as the start of the message.
    """
    import pickle

    from safetensors import SafetensorError

    damaged = (ValueError, TypeError, KeyError, AttributeError, RuntimeError, EOFError, pickle.UnpicklingError)
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        known = (OSError, *damaged, SafetensorError)
        if not isinstance(error, known) and type(error).__name__ != "SingleFileComponentError":  # diffusers' own
            raise
        reason = f": {first_line(error)}" if isinstance(error, OSError) else f", is it damaged? {first_line(error)}"
        if is_hub_out_of_reach(error):
            reason = ": it is not on this machine, not cached, and the Hub cannot be reached (or offline mode is on)"
        raise InputError(f"{what} cannot be loaded{reason} ({advice})") from error


def is_hub_out_of_reach(error: BaseException | None) -> bool:
    """Whether there is no connection to the Hub; diffusers reports that as a file missing from the repository."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    while error is not None:
        if isinstance(error, (LocalEntryNotFoundError, ConnectionError)):
            return True
        error = error.__cause__ or error.__context__
    return False


# What PyTorch, cuDNN, cuBLAS, bitsandbytes and the allocators of CUDA, MPS and the CPU say, in lower case
MEMORY_ERRORS = ("out of memory", "not enough memory", "can't allocate", "cannot allocate", "alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the process or of its device was too small."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    is_said = isinstance(error, RuntimeError) and any(words in str(error).lower() for words in MEMORY_ERRORS)
    return is_said or isinstance(error, MemoryError)


def first_line(error: Exception) -> str:
    """The first line of an error's message that is not blank, or the name of its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
