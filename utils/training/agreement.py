"""What the processes of a run decide together: a mistake that one finds, what only one looks up, and when to stop."""

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from utils.errors import InputError
from utils.runtime import WAITING, StopSignal

Result = TypeVar("Result")


def run_everywhere(accelerator: Accelerator, action: Callable[[], Result]) -> Result:
    """Run a check in every process. If one raises InputError, all do, with the same message; none waits for ever."""
    result, problem = _try(action)
    problems = dict.fromkeys(one for one in gather_object([problem]) if one)
    if problems:
        raise InputError.from_problems(list(problems))
    return result


def run_on_main(accelerator: Accelerator, action: Callable[[], Result]) -> Result:
    """The result of the main process, which must be picklable, in every process; its InputError, too."""
    result, problem = _try(action) if accelerator.is_main_process else (None, None)
    result, problem = broadcast_object_list([result, problem])
    if problem:
        raise InputError(problem)
    return result


def require_equal(accelerator: Accelerator, values: dict, what: str) -> None:
    """Raise InputError in every process if their `values` differ. what: what must be the same, for the message."""
    others = gather_object([values])
    different = sorted({name for other in others for name in values if other.get(name) != others[0].get(name)})
    if different:
        seen = {name: dict.fromkeys(str(other.get(name))[:60] for other in others) for name in different[:3]}
        shown = "; ".join(f"{name}: {', '.join(found)}" for name, found in seen.items())
        raise InputError(f"the processes of this run do not have the same {what} ({shown}): give all the same files")


def _try(action: Callable[[], Result]) -> tuple[Result | None, str | None]:
    try:
        return action(), None
    except InputError as error:
        return None, str(error)


class StopAgreement:
    """Whether to stop after a step, because any process received a signal.

    The processes ask each other at every step, on the CPU and without waiting: the answer is that of the step before.
    Asking on the GPU would make the CPU wait for it.
    """

    def __init__(self, accelerator: Accelerator, stop: StopSignal) -> None:
        self._stop, self._is_alone = stop, accelerator.num_processes == 1
        self._group = None if self._is_alone else torch.distributed.new_group(backend="gloo", timeout=WAITING)
        self._number, self._pending = torch.zeros(1, dtype=torch.int64), None

    def should_stop(self) -> bool:
        """Called by every process after every step."""
        if self._is_alone:
            return self._stop.received is not None
        number = self._wait()
        self._number = torch.tensor([int(self._stop.received or 0)])
        maximum = torch.distributed.ReduceOp.MAX
        self._pending = torch.distributed.all_reduce(self._number, maximum, group=self._group, async_op=True)
        if number and self._stop.received is None:
            self._stop.receive(number)
        return bool(number)

    def _wait(self) -> int:
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
        return int(self._number.item())

    def close(self) -> None:
        """The last question is answered before the processes part."""
        self._wait()
