"""Whether a text may go into the data: by a list of words, by the server, or by a function of the user's."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_preparation.captions.triples import fold
from utils.errors import InputError

if TYPE_CHECKING:
    from data_preparation.captions.client import Client

Moderator = Callable[[Sequence[str]], list[bool]]  # texts -> whether each is refused
TEXTS_PER_REQUEST = 32
ALLOWED = "blocklist:FILE (a word or phrase in each line), server (--base_url's /v1/moderations), python:FILE:FUNCTION"


def find_moderation_problem(given: str, has_server: bool) -> str | None:
    """What cannot be with --moderation, told without loading anything."""
    kind, _, rest = given.partition(":")
    file, _, function = rest.rpartition(":") if kind == "python" else (rest, "", "")
    if given == "server":
        return None if has_server else "--moderation server: give --base_url too, or blocklist: or python:"
    if kind not in ("blocklist", "python") or not file or (kind == "python" and not function.isidentifier()):
        return f"--moderation {given}: must be {ALLOWED}"
    return None if Path(file).is_file() else f"--moderation {given}: there is no file {file}"


def digest_moderation(given: str | None) -> str | None:
    """`given` with a digest of the file that it names: another list or function makes other rows."""
    if given is None or given == "server":
        return given
    kind, _, rest = given.partition(":")
    file, _, function = rest.rpartition(":") if kind == "python" else (rest, "", "")
    digest = hashlib.blake2b(Path(file).read_bytes(), digest_size=8).hexdigest()
    return ":".join(part for part in (kind, digest, function) if part)


def open_moderator(given: str | None, client: Client | None = None) -> Moderator:
    """Raises InputError for a file or function that cannot be used."""
    if given is None:
        return lambda texts: [False] * len(texts)
    kind, _, rest = given.partition(":")
    if kind == "server":
        return lambda texts: ask_server(client, texts)
    if kind == "blocklist":
        return block_words(Path(rest))
    file, _, function = rest.rpartition(":")
    return call_function(Path(file), function)


def block_words(path: Path) -> Moderator:
    """Refuses whole words and phrases, without regard to case and punctuation; lines with # are comments."""
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    words = {fold(line) for line in lines if not line.lstrip().startswith("#")} - {""}
    if not words:
        raise InputError(f"--moderation blocklist:{path}: the file holds no word")
    longest = max(len(word.split()) for word in words)

    def refuses(text: str) -> bool:
        said = fold(text).split()
        spans = ((start, length) for start in range(len(said)) for length in range(1, longest + 1))
        return any(" ".join(said[start : start + length]) in words for start, length in spans)

    return lambda texts: [refuses(text) for text in texts]


def call_function(path: Path, name: str) -> Moderator:
    """`name(text) -> bool` of a Python file: true refuses the text."""
    try:
        spec = importlib.util.spec_from_file_location(f"moderation_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        function = getattr(module, name)
    except Exception as error:  # the user's code: whatever it raises is told
        raise InputError(f"--moderation python:{path}:{name} cannot be loaded: {error!r}") from error

    def refuses(text: str) -> bool:
        try:
            return bool(function(text))
        except Exception as error:
            raise InputError(f"--moderation python:{path}:{name} failed on {text!r}: {error!r}") from error

    return lambda texts: [refuses(text) for text in texts]


def ask_server(client: Client, texts: Sequence[str]) -> list[bool]:
    """OpenAI's moderation endpoint; several texts in each request."""
    from data_preparation.captions.client import Refusal

    refused = []
    for start in range(0, len(texts), TEXTS_PER_REQUEST):
        part = list(texts[start : start + TEXTS_PER_REQUEST])

        def find_fault(said: dict, count: int = len(part)) -> str | None:
            results = said.get("results")
            is_whole = isinstance(results, list) and len(results) == count
            return None if is_whole and all("flagged" in result for result in results) else "no result for each text"

        try:
            said = client.post("moderations", {"input": part}, find_fault)
        except Refusal as refusal:
            raise InputError(f"--moderation server: it refused {len(part)} texts: {refusal}") from refusal
        refused += [bool(result["flagged"]) for result in said["results"]]
    return refused
