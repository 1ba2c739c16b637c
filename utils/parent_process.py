"""A process that ends with the one that started it."""

import ctypes
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def signal_when_parent_dies(number: signal.Signals) -> None:
    """Ask Linux to send this process a signal when its parent dies, however that ends. Does nothing elsewhere."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
