"""The votes on blind pairs of edits: asked, checked, and kept in votes.jsonl."""

import random
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from evaluation.ratings import WINS, Rating, Vote, rate
from utils.json_lines import append_json_line, parse_json_object

VOTES = "votes.jsonl"


@dataclass(frozen=True)
class Question:
    """Which of two edits of a sample is better? id: its number; the names of the editors are not shown."""

    id: int
    sample: int
    first: str
    second: str


class Ballot:
    """Asks questions and stores votes; may be used by several threads.

    samples: their numbers; names: of the editors; folder: of votes.jsonl, which further runs continue.
    """

    def __init__(self, samples: list[int], names: list[str], folder: Path, seed: int | None = None) -> None:
        self._samples, self.names, self._path = samples, names, folder / VOTES
        self._random, self._lock, self._asked = random.Random(seed), threading.Lock(), {}
        self.votes = read_votes(self._path, names)

    def ask(self) -> Question:
        """A question about the pair of editors with the fewest votes, on a random sample, in random order."""
        with self._lock:
            pairs = [(a, b) for i, a in enumerate(self.names) for b in self.names[i + 1 :]]
            counts = {pair: sum({vote.first, vote.second} == set(pair) for vote in self.votes) for pair in pairs}
            least = min(counts.values())
            pair = list(self._random.choice([pair for pair in pairs if counts[pair] == least]))
            self._random.shuffle(pair)
            question = Question(len(self._asked), self._random.choice(self._samples), *pair)
            self._asked[question.id] = question
            return question

    def question(self, number: int) -> Question | None:
        return self._asked.get(number)

    def answer(self, number: int, winner: str) -> str | None:
        """Store a vote; returns what is wrong with it, or None. A question is answered once."""
        with self._lock:
            question = self._asked.get(number)
            if question is None:
                return "this question was not asked, or is already answered"
            if winner not in WINS:
                return f"the answer must be one of {', '.join(WINS)}"
            self._asked[number] = None
            self._store(Vote(question.first, question.second, winner, question.sample))
        return None

    def add(self, vote: Vote) -> None:
        """Store the vote of a judge."""
        with self._lock:
            self._store(vote)

    def _store(self, vote: Vote) -> None:
        append_json_line(self._path, asdict(vote))
        self.votes.append(vote)

    def ratings(self) -> list[Rating]:
        with self._lock:
            return rate(self.votes, self.names)


def read_votes(path: Path, names: list[str]) -> list[Vote]:
    """The votes between these editors; lines that are not votes, such as a half-written last one, are left out."""
    votes = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            vote = Vote(**parse_json_object(line, str(path)))
        except (TypeError, ValueError):
            continue
        if {vote.first, vote.second} <= set(names) and vote.winner in WINS:
            votes.append(vote)
    return votes
