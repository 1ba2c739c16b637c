"""--profile DIR: a trace of a few training steps of the main process, to open in a trace viewer, and its table."""

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

logger = logging.getLogger(__name__)
FIRST_STEP, NUM_STEPS = 10, 3  # the first ones compile, record graphs and allocate memory
NUM_ROWS = 40


class StepProfiler:
    """Profiles NUM_STEPS steps of a run, after the FIRST_STEP-th one that it sees."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._seen, self._profile = folder, 0, None

    def count_step(self) -> None:
        """Call after every step."""
        self._seen += 1
        if self._seen == FIRST_STEP:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._profile = profile(activities=activities)
            self._profile.start()
        elif self._profile and self._seen == FIRST_STEP + NUM_STEPS:
            self.close()

    def close(self) -> None:
        """Write what was profiled so far, if anything."""
        if not self._profile:
            return
        self._profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self._folder / "trace.json"))
        averages, key = self._profile.key_averages(), "cuda" if torch.cuda.is_available() else "cpu"
        table = averages.table(sort_by=f"self_{key}_time_total", row_limit=NUM_ROWS)
        (self._folder / "operations.txt").write_text(table)
        logger.warning("--profile: wrote %s and operations.txt", self._folder / "trace.json")
        self._profile = None


def make_profiler(folder: str | None, is_main_process: bool) -> StepProfiler | None:
    """The profiler of the main process, if a folder is given."""
    return StepProfiler(Path(folder)) if folder and is_main_process else None
