"""What triples have cost: workers note their tokens in a file, those of rejected answers and of killed runs too."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

from data_preparation.captions.backend import Usage

FIELDS = ("requests", "tokens_in", "tokens_out")


class Ledger:
    """Lines added to a file by any number of processes; each is written at once, and so stays whole."""

    def __init__(self, path: Path | None) -> None:
        self._path, self._read_to, self._total = path, 0, Counter()

    def note(self, usage: dict[str, int]) -> None:
        """A line; none where the folder is not there, as on another machine of a cluster."""
        if self._path is None or not usage["requests"] or not self._path.parent.is_dir():
            return
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, (json.dumps(usage) + "\n").encode())
        finally:
            os.close(file)

    def read(self) -> Usage:
        """The sum of all lines; those that were read before are not read again."""
        if self._path is not None and self._path.is_file():
            with self._path.open("rb") as file:
                file.seek(self._read_to)
                lines = file.read()
            self._read_to += len(lines)
            for line in lines.splitlines():
                try:
                    self._total.update({name: int(json.loads(line)[name]) for name in FIELDS})
                except (ValueError, KeyError, TypeError):
                    continue  # a line that a crash of the machine has cut
        return Usage(**{name: self._total[name] for name in FIELDS})


def describe_cost(usage: Usage, price_in: float | None, price_out: float | None) -> str:
    """Requests, tokens, and their price where that is known (per million tokens)."""
    said = [f"{usage.requests:,} requests", f"{usage.tokens_in:,} tokens in and {usage.tokens_out:,} out"]
    if price_in is not None or price_out is not None:
        cost = (usage.tokens_in * (price_in or 0) + usage.tokens_out * (price_out or 0)) / 1e6
        said.append(f"cost {cost:,.4f}" if cost < 1 else f"cost {cost:,.2f}")
    return ", ".join(said)
