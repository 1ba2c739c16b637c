"""The ways to ask for each edit; the last ones of each file are kept out of training."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "instructions"


def available_tasks() -> list[str]:
    """Names of the tasks that have a file of phrasings, sorted. Needs no import of the edits themselves."""
    return sorted(path.stem for path in FOLDER.glob("*.txt"))


def read_phrasings(task: str, num_heldout: int = 3) -> tuple[list[str], list[str]]:
    """(phrasings for training, phrasings kept out of it) of one task."""
    lines = [line.strip() for line in (FOLDER / f"{task}.txt").read_text(encoding="utf-8").splitlines() if line.strip()]
    return lines[: len(lines) - num_heldout], lines[len(lines) - num_heldout :]
