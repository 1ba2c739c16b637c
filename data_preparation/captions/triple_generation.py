"""The row generator of triples: in which order captions are used, what is asked about each, and which answers are kept.

The rows are also exported as prompts.jsonl.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets

from data_preparation.captions.backends import Backend, ModelOptions, ServerOptions, UsageLog, ask_model
from data_preparation.captions.model_flags import Moderator, open_moderator
from data_preparation.captions.prompts import (
    NUM_SEEDS,
    Question,
    Rejected,
    SamplingOptions,
    Triple,
    clean_text,
    comparable_text,
)
from data_preparation.generation.dataset_folder import DATA
from data_preparation.generation.inputs import Captions, OpenCaptions
from data_preparation.generation.pair_rows import as_json
from data_preparation.generation.runner import GeneratedRows
from data_preparation.photographs import seeded_rng
from utils.atomic_files import write_atomically
from utils.checks.prompt_checks import MAX_TOKENS, estimate_tokens
from utils.errors import InputError

COLUMNS = ("caption", "edit", "output", "url", "source", "source_dataset", "source_license", "model")
URL_COLUMNS = ("url", "URL", "image_url", "link")
ORDER_STREAM = 2**63  # key of the generator that shuffles the captions; above the index of any item
PROMPTS_FILE = "prompts.jsonl"
MAX_USELESS = 200  # answers from the start, none of them usable, after which a worker gives up


def open_backend(options: ModelOptions, sampling: SamplingOptions, rank: int = 0) -> Backend:
    """Load the model, or connect to the server. rank: index of the worker. Raises InputError."""
    if isinstance(options, ServerOptions):
        from data_preparation.captions.server import ServerBackend

        return ServerBackend(options, sampling)
    from data_preparation.captions.local import LocalBackend

    return LocalBackend(options, sampling, rank)


@dataclass(frozen=True)
class TripleGenerator:
    """A `RowGenerator`. An item is a position in the shuffled captions and gives at most `edits_per_caption` rows.

    tries: questions for each edit until an answer is usable; usage_log: file to which tokens are appended.
    """

    num_items: int
    captions: Captions
    model: ModelOptions
    sampling: SamplingOptions
    seed: int
    edits_per_caption: int
    tries: int
    moderation: str | None
    usage_log: Path

    def features(self) -> datasets.Features:
        text = datasets.Value("string")
        return datasets.Features(dict.fromkeys(COLUMNS, text) | {"seed": datasets.Value("int64"), "settings": text})

    def open(self, rank: int) -> OpenTripleGenerator:
        """Raises InputError if the captions, the model or the moderation cannot be used."""
        backend = open_backend(self.model, self.sampling, rank)
        moderator = open_moderator(self.moderation, backend)
        return OpenTripleGenerator(self, ShuffledCaptions(self.captions.open(), self.seed), backend, moderator)


class ShuffledCaptions:
    """The captions in an order that depends on the seed, without duplicates of text or url.

    Captions are read only up to the last item requested, because a dataset may have millions.
    """

    def __init__(self, captions: OpenCaptions, seed: int) -> None:
        self.captions = captions
        self._order = seeded_rng(seed, ORDER_STREAM).permutation(len(captions))
        self._seen: set[str] = set()
        self._problems: list[str | None] = []  # of the positions read so far

    def __getitem__(self, item: int) -> tuple[dict, str | None]:
        """({"caption", "url", "source"}, why the caption is not used, or None)."""
        while len(self._problems) <= item:
            self._problems.append(self._find_problem(self._read(len(self._problems))))
        return self._read(item), self._problems[item]

    def _read(self, item: int) -> dict:
        index = int(self._order[item])
        row = self.captions.row(index)
        url = next((row[name] for name in URL_COLUMNS if row.get(name)), None)
        try:
            caption = clean_text(row[self.captions.column] or "")
        except UnicodeError:
            caption = ""
        return {"caption": caption, "url": url, "source": self.captions.name(index)}

    def _find_problem(self, row: dict) -> str | None:
        words = comparable_text(row["caption"])
        if not words:
            return "caption empty"
        keys = {f"words {words}"} | ({f"url {row['url'].strip()}"} if row["url"] else set())
        is_new = self._seen.isdisjoint(keys)
        self._seen |= keys
        if not is_new:
            return "caption a duplicate"
        return "caption too long" if estimate_tokens(row["caption"]) > MAX_TOKENS else None


class OpenTripleGenerator:
    """items -> rows. Asks all questions of the items together, and again where an answer was rejected."""

    def __init__(
        self, settings: TripleGenerator, captions: ShuffledCaptions, backend: Backend, moderator: Moderator
    ) -> None:
        self._settings, self._captions, self._backend, self._moderator = settings, captions, backend, moderator
        self._usage_log = UsageLog(settings.usage_log)
        self._num_useless: int | None = 0  # answers so far, None once one was usable

    def __call__(self, items: range) -> GeneratedRows:
        rejected: Counter[str] = Counter()
        try:
            captions = self._usable_captions(items, rejected)
            answers = self._ask(captions)
            self._require_progress(answers)
            return GeneratedRows(list(self._rows(captions, answers, rejected)), dict(rejected))
        finally:
            self._usage_log.append(self._backend.usage.take())

    def _usable_captions(self, items: range, rejected: Counter) -> dict[int, dict]:
        """item -> row of `ShuffledCaptions`."""
        read = {item: self._captions[item] for item in items}
        rejected.update(problem for _, problem in read.values() if problem)
        usable = {item: row for item, (row, problem) in read.items() if problem is None}
        refused = self._moderator([row["caption"] for row in usable.values()])
        rejected.update({"caption refused by moderation": sum(refused)} if any(refused) else {})
        return {item: usable[item] for item, is_refused in zip(usable, refused, strict=True) if not is_refused}

    def _ask(self, captions: dict[int, dict]) -> dict[tuple[int, int], tuple[Triple | Rejected, int, int]]:
        """(item, edit) -> (last result, its seed, its try from 1)."""
        settings, results = self._settings, {}
        shape = (settings.edits_per_caption, settings.tries)
        seeds = {item: seeded_rng(settings.seed, item).integers(0, NUM_SEEDS, shape).tolist() for item in captions}
        pending = [(item, edit) for item in captions for edit in range(settings.edits_per_caption)]
        for attempt in range(settings.tries):
            questions = [Question(captions[item]["caption"], seeds[item][edit][attempt]) for item, edit in pending]
            answers = ask_model(self._backend, questions, settings.sampling)
            for key, question, result in zip(pending, questions, answers, strict=True):
                results[key] = (result, question.seed, attempt + 1)
            pending = [key for key in pending if isinstance(results[key][0], Rejected)]
        return results

    def _require_progress(self, results: dict) -> None:
        """Raise InputError where no answer was usable from the start: money would be spent for nothing."""
        if self._num_useless is None:
            return
        rejections = [result for result, _, _ in results.values() if isinstance(result, Rejected)]
        if len(rejections) < len(results):
            self._num_useless = None
            return
        self._num_useless += len(rejections)
        if self._num_useless >= MAX_USELESS:
            (reason, count), last = Counter(one.reason for one in rejections).most_common(1)[0], rejections[-1]
            raise InputError(
                f"none of the first {self._num_useless} answers of the model is usable, mostly because: {reason} "
                f"({count} of {len(rejections)}). One answer: {last.detail[:500] or last.reason!r}. Check --model, "
                "--format and --max_tokens; finished shards are kept"
            )

    def _rows(self, captions: dict[int, dict], results: dict, rejected: Counter) -> Iterator[dict]:
        rejected.update(result.reason for result, _, _ in results.values() if isinstance(result, Rejected))
        good = {key: value for key, value in results.items() if isinstance(value[0], Triple)}
        edits = self._moderator([triple.edit for triple, _, _ in good.values()])
        outputs = self._moderator([triple.output for triple, _, _ in good.values()])
        seen: set[tuple] = set()
        for (item, edit), is_refused in zip(good, map(any, zip(edits, outputs, strict=True)), strict=True):
            triple, seed, attempt = good[item, edit]
            keys = {(item, "edit", comparable_text(triple.edit)), (item, "output", comparable_text(triple.output))}
            is_duplicate = not seen.isdisjoint(keys)
            seen |= keys
            if is_refused or is_duplicate:
                rejected["refused by moderation" if is_refused else "same edit as before"] += 1
                continue
            yield self._row(captions[item], triple, seed, attempt)

    def _row(self, caption: dict, triple: Triple, seed: int, attempt: int) -> dict:
        source = self._captions.captions
        return {
            **triple._asdict(),
            "url": caption["url"],
            "source": caption["source"],
            "source_dataset": source.dataset,
            "source_license": source.license,
            "model": as_json(self._backend.model),
            "seed": seed,
            "settings": as_json(asdict(self._settings.sampling) | self._backend.style | {"try": attempt}),
        }


def export_prompts(data_root: Path) -> Path:
    """Write the rows as prompts.jsonl.

    The caption has two keys: "caption" as in the original's generator, and "input" as in its published file.
    """
    import pyarrow.parquet as pq

    lines = []
    for path in sorted((data_root / DATA).glob("*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(columns=["caption", "edit", "output", "url"]):
            lines += [json.dumps({"input": row["caption"], **row}, ensure_ascii=False) for row in batch.to_pylist()]
    write_atomically(data_root / PROMPTS_FILE, "".join(f"{line}\n" for line in lines).encode())
    return data_root / PROMPTS_FILE
