"""Which licence an export may carry: no more permissive than that of any source, nor of the models that made it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_preparation.exporting.scrubbing import scrub_text
from utils.errors import InputError
from utils.licences import (
    NO_DERIVATIVES,
    NON_COMMERCIAL,
    USE_RESTRICTIONS,
    Licence,
    look_up_licence,
    hub_id,
    is_hub_licence,
    known_licences,
    problems_of_carrying,
    restrictions_of,
    strictest,
    terms_of,
)

UNNAMED = "rows that name no source"
OTHER = "other"
# Licences of models whose cards name a file and not an id.
KNOWN_MODELS = {
    "stabilityai/sdxl-turbo": "sai-nc-community",
    "stabilityai/sd-turbo": "sai-nc-community",
    "black-forest-labs/FLUX.1-Kontext-dev": "flux-1-dev-non-commercial-license",
}


@dataclass(frozen=True)
class Decision:
    """carried: what the front matter of the card says. sources, models: what is known of each; notes: for the card."""

    carried: str
    sources: list[Licence]
    models: list[Licence]
    notes: list[str]


def source_licences(origins: Counter) -> list[Licence]:
    """One for each (dataset, licence) that rows name; where the rows name none, what the dataset's card says."""
    found = {}
    for dataset, licence in sorted(origins, key=str):
        name = scrub_text(dataset) if dataset else UNNAMED
        licence = licence or (_of_dataset(dataset) if is_repo_id(dataset) else None) or ""
        found[name, licence] = Licence(name, licence, restrictions_of(licence))
    return list(found.values())


def model_licences(models: Counter, token: str | None) -> list[Licence]:
    """Of every model that rows name, by its card on the Hub; of a file or a folder no more is known than its name."""
    ids = {entry["id"] for text in models for entry in _entries(text)}
    found = []
    for name in sorted(ids):
        is_on_hub = is_repo_id(name)
        licence = look_up_licence(name, KNOWN_MODELS.get(name), token) if is_on_hub else Licence(name, "", ())
        found.append(Licence(scrub_text(name), licence.name, licence.restrictions))
    return found


def decide(sources: Sequence[Licence], models: Sequence[Licence], wanted: str | None, accept_unknown: bool) -> Decision:
    """The licence to carry: `wanted`, or that of the strictest source. Raises InputError where it may not be."""
    unknown = [one for one in (*sources, *models) if terms_of(one.name) is None]
    if unknown and not accept_unknown and wanted != OTHER:
        raise InputError(_refuse_unknown(unknown))
    if wanted == OTHER:
        return Decision(OTHER, list(sources), list(models), _notes(OTHER, sources, models))
    if wanted and not is_hub_licence(hub_id(wanted)):
        raise InputError(
            f"--license {wanted}: not a licence of the Hub whose terms are known here; allowed are "
            f"{', '.join(known_licences())}, and other"
        )
    best = _strictest(sources, models)
    carried = hub_id(wanted) if wanted else best
    if carried is None:
        raise InputError(_refuse_default(sources))
    problems = problems_of_carrying(carried, sources) + _problems_of_models(carried, models)
    if problems:
        allowed = f"{best} or other" if best and is_hub_licence(best) else "other"
        raise InputError.from_problems([*problems, f"--license may be {allowed}"])
    barred = [one for one in sources if NO_DERIVATIVES in (terms_of(one.name) or ())]
    if barred and not wanted:
        names = ", ".join(f"{one.source} ({one.name})" for one in barred)
        raise InputError(
            f"{names}: bars works made of it, and an edited picture is one. If you pass on pairs as they were "
            f"published, or have the owner's leave, say so with --license {carried}"
        )
    return Decision(carried, list(sources), list(models), _notes(carried, sources, models))


def _strictest(sources: Sequence[Licence], models: Sequence[Licence]) -> str | None:
    """The licence that permits no more than any source; what a non-commercial model has made is under NC at least."""
    stand_in = [Licence("a model", "cc-by-nc-4.0", (NON_COMMERCIAL,))] if _non_commercial(models) else []
    return strictest([*sources, *stand_in])


def _non_commercial(models: Sequence[Licence]) -> list[Licence]:
    return [one for one in models if NON_COMMERCIAL in (terms_of(one.name) or ())]


def _problems_of_models(carried: str, models: Sequence[Licence]) -> list[str]:
    """Of a model's licence only this binds the pictures: attribution and share-alike are about its weights, and the
    use restrictions of an OpenRAIL bind who uses it, which the card tells."""
    if NON_COMMERCIAL in (terms_of(carried) or ()):
        return []
    return [
        f"{one.source}, which made pictures, is {one.name}, and {carried} drops its {NON_COMMERCIAL}"
        for one in _non_commercial(models)
    ]


def _refuse_default(sources: Sequence[Licence]) -> str:
    known = [one for one in sources if terms_of(one.name) is not None]
    if not known:
        return "no source has a known licence: say under which one this is to be published, with --license"
    names = ", ".join(f"{one.source}: {one.name}" for one in known)
    return (
        f"none of the licences of the sources meets the terms of all others ({names}): give --license other, and the "
        "card names each source's, or export the sources apart"
    )


def _refuse_unknown(unknown: Sequence[Licence]) -> str:
    names = ", ".join(f"{one.source}{f' ({one.name})' if one.name else ''}" for one in unknown)
    return (
        f"the terms of the licence of {names} are not known. If the pictures are yours, or you have looked the terms "
        "up, say so: --license ID --accept_unknown_license, or --license other"
    )


def _notes(carried: str, sources: Sequence[Licence], models: Sequence[Licence]) -> list[str]:
    notes = []
    if any(terms_of(one.name) is None for one in sources):
        notes.append("The terms of some sources are not known to the script that wrote this card; its author vouches.")
    if any(NO_DERIVATIVES in (terms_of(one.name) or ()) for one in sources):
        notes.append("A source bars works made of it: check that you may use these pairs.")
    if any(NON_COMMERCIAL in (terms_of(one.name) or ()) for one in (*sources, *models)):
        notes.append("A source or a model forbids commercial use; that holds for these pairs.")
    if any(USE_RESTRICTIONS in (terms_of(one.name) or ()) for one in models):
        notes.append(
            "Pictures were made with a model under an OpenRAIL licence: the uses that its Attachment A lists "
            "are forbidden to whoever makes pictures with it."
        )
    if carried == OTHER:
        notes.append("No single licence holds for the whole: each row is under that of its source (`source_license`).")
    return notes


def _of_dataset(dataset: str) -> str | None:
    from huggingface_hub import DatasetCard

    try:
        data = DatasetCard.load(dataset, ignore_metadata_errors=True).data
        found = data.get("license_name") or data.get("license")
    except Exception:  # a card that cannot be had leaves the licence unknown, which is then said
        return None
    return found if isinstance(found, str) else None


def is_repo_id(name: str | None) -> bool:
    """Whether this can be an id on the Hub, and is no folder here."""
    return bool(name and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)) and not Path(name).exists()


def _entries(text: str) -> list[dict]:
    try:
        entries = json.loads(text)
    except ValueError:
        return []
    return [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)]
