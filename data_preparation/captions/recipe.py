"""The recipe of triples: which captions in which order, what is asked for each, and what is kept of the answers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets

from data_preparation.captions.backend import Backend
from data_preparation.captions.ledger import Ledger
from data_preparation.captions.moderation import Moderator, open_moderator
from data_preparation.captions.opening import Source, open_backend
from data_preparation.captions.prompts import Ask, Sampling
from data_preparation.captions.triples import MAX_TOKENS, PARSERS, Rejected, Triple, clean, count_tokens, fold
from data_preparation.generation.inputs import Captions, OpenCaptions
from data_preparation.generation.runner import GeneratedRows
from data_preparation.photographs import seeded_rng

COLUMNS = ("caption", "edit", "output", "url", "source", "source_dataset", "source_license", "model")
URL_COLUMNS = ("url", "URL", "image_url", "link")
MAX_SEED = 2**31  # servers hold seeds in 32 bits
ORDER = 2**63  # of the generator that orders the captions, which no number of an item reaches


@dataclass(frozen=True)
class TripleRecipe:
    """An item is a place in the drawn order of all captions; it gives at most `edits_per_caption` rows.

    tries: questions for each edit, until an answer can be used; ledger: where tokens are noted, None for nowhere.
    """

    num_items: int
    captions: Captions
    source: Source
    sampling: Sampling
    seed: int = 0
    edits_per_caption: int = 1
    tries: int = 3
    moderation: str | None = None
    ledger: Path | None = None

    def features(self) -> datasets.Features:
        text = datasets.Value("string")
        return datasets.Features(dict.fromkeys(COLUMNS, text) | {"seed": datasets.Value("int64"), "settings": text})

    def open(self, rank: int) -> Callable[[range], GeneratedRows]:
        """Raises InputError where the captions, the model or the moderation cannot be used."""
        backend = open_backend(self.source, self.sampling, rank)
        moderator = open_moderator(self.moderation, getattr(backend, "client", None))
        return Maker(self, DrawnCaptions(self.captions.open(), self.seed), backend, moderator)


class DrawnCaptions:
    """The captions in an order drawn by the seed; one that was there before, by its words or its url, is a duplicate.

    Looked through only as far as it is asked for: a few thousand of millions need no pass over all.
    """

    def __init__(self, captions: OpenCaptions, seed: int) -> None:
        self.captions = captions
        self._order = seeded_rng(seed, ORDER).permutation(len(captions))
        self._seen: set[str] = set()
        self._faults: list[str | None] = []  # of the places looked at so far

    def __getitem__(self, item: int) -> tuple[dict, str | None]:
        """({"caption", "url", "source"}, why it is not used) of a place in the order."""
        while len(self._faults) <= item:
            self._faults.append(self._find_fault(self._read(len(self._faults))))
        return self._read(item), self._faults[item]

    def _read(self, item: int) -> dict:
        index = int(self._order[item])
        row = self.captions.row(index)
        url = next((row[name] for name in URL_COLUMNS if row.get(name)), None)
        try:
            caption = clean(row[self.captions.column] or "")
        except UnicodeError:
            caption = ""
        return {"caption": caption, "url": url, "source": self.captions.name(index)}

    def _find_fault(self, given: dict) -> str | None:
        words = fold(given["caption"])
        if not words:
            return "caption empty"
        keys = {f"words {words}"} | ({f"url {given['url'].strip()}"} if given["url"] else set())
        is_new = self._seen.isdisjoint(keys)
        self._seen |= keys
        if not is_new:
            return "caption a duplicate"
        return "caption too long" if count_tokens(given["caption"]) > MAX_TOKENS else None


class Maker:
    """items -> rows: all questions of some items at once, and those without a usable answer again."""

    def __init__(self, recipe: TripleRecipe, drawn: DrawnCaptions, backend: Backend, moderator: Moderator) -> None:
        self._recipe, self._drawn, self._backend, self._moderator = recipe, drawn, backend, moderator
        self._ledger = Ledger(recipe.ledger)

    def __call__(self, items: range) -> GeneratedRows:
        rejected: Counter[str] = Counter()
        try:
            asked = self._choose(items, rejected)
            found = self._ask(asked)
            return GeneratedRows(list(self._rows(asked, found, rejected)), dict(rejected))
        finally:
            self._ledger.note(self._backend.usage.take())

    def _choose(self, items: range, rejected: Counter) -> dict[int, dict]:
        """Captions of the items that can be used."""
        read = {item: self._drawn[item] for item in items}
        rejected.update(fault for _, fault in read.values() if fault)
        usable = {item: given for item, (given, fault) in read.items() if fault is None}
        refused = self._moderator([given["caption"] for given in usable.values()])
        rejected.update({"caption refused by moderation": sum(refused)} if any(refused) else {})
        return {item: usable[item] for item, is_refused in zip(usable, refused, strict=True) if not is_refused}

    def _ask(self, asked: dict[int, dict]) -> dict[tuple[int, int], tuple[Triple | Rejected, int, int]]:
        """(item, edit) -> what came of it, the seed and the try."""
        recipe, parse = self._recipe, PARSERS[self._recipe.sampling.format]
        found, left = {}, [(item, edit) for item in asked for edit in range(recipe.edits_per_caption)]
        seeds = {item: draw_seeds(recipe, item) for item in asked}
        for attempt in range(recipe.tries):
            asks = [Ask(asked[item]["caption"], seeds[item][edit][attempt]) for item, edit in left]
            for (item, edit), ask, answer in zip(left, asks, self._backend.answer(asks), strict=True):
                refusal = Rejected("refused by the server") if answer.refusal else None
                result = refusal or parse(ask.caption, answer.text, answer.is_finished)
                found[item, edit] = (result, ask.seed, attempt + 1)
            left = [key for key in left if isinstance(found[key][0], Rejected)]
        return found

    def _rows(self, asked: dict[int, dict], found: dict, rejected: Counter) -> Iterator[dict]:
        rejected.update(result.reason for result, _, _ in found.values() if isinstance(result, Rejected))
        good = {key: value for key, value in found.items() if isinstance(value[0], Triple)}
        edits = self._moderator([triple.edit for triple, _, _ in good.values()])
        outputs = self._moderator([triple.output for triple, _, _ in good.values()])
        seen: set[tuple] = set()
        for (item, edit), is_refused in zip(good, map(any, zip(edits, outputs, strict=True)), strict=True):
            triple, seed, attempt = good[item, edit]
            is_known = bool({(item, fold(triple.edit), 0), (item, fold(triple.output), 1)} & seen)
            seen |= {(item, fold(triple.edit), 0), (item, fold(triple.output), 1)}
            if is_refused or is_known:
                rejected["refused by moderation" if is_refused else "same edit as before"] += 1
                continue
            yield self._row(asked[item], triple, seed, attempt)

    def _row(self, given: dict, triple: Triple, seed: int, attempt: int) -> dict:
        captions, settings = self._drawn.captions, asdict(self._recipe.sampling) | self._backend.style
        return {
            **triple._asdict(),
            "url": given["url"],
            "source": given["source"],
            "source_dataset": captions.dataset,
            "source_license": captions.license,
            "model": _as_json(self._backend.model),
            "seed": seed,
            "settings": _as_json(settings | {"try": attempt}),
        }


def draw_seeds(recipe: TripleRecipe, item: int) -> list[list[int]]:
    """Seeds of an item's questions: one for each edit and try."""
    shape = (recipe.edits_per_caption, recipe.tries)
    return seeded_rng(recipe.seed, item).integers(0, MAX_SEED, shape).tolist()


def _as_json(value: dict) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
