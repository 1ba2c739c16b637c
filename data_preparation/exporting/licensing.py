"""Choose the licence of an export: no more permissive than that of any source, or of the models that made it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from data_preparation.exporting.reading import scrub_text
from data_preparation.generation.pair_rows import parse_json
from utils.errors import InputError
from utils.hub_names import is_hub_id
from utils.licences import (
    NO_DERIVATIVES,
    NON_COMMERCIAL,
    USE_RESTRICTIONS,
    Licence,
    find_dataset_license,
    hub_licences,
    is_hub_licence,
    licence_conflicts,
    look_up_licence,
    restrictions_of,
    strictest_licence,
    terms_of,
    to_hub_licence,
)

NO_SOURCE = "rows without a source"
OTHER = "other"
# Models whose card links to a licence file instead of naming an id.
KNOWN_MODELS = {
    "stabilityai/sdxl-turbo": "sai-nc-community",
    "stabilityai/sd-turbo": "sai-nc-community",
    "black-forest-labs/FLUX.1-Kontext-dev": "flux-1-dev-non-commercial-license",
}


@dataclass(frozen=True)
class LicenceChoice:
    """licence: for the front matter of the card; notes: sentences for the card."""

    licence: str
    sources: list[Licence]
    models: list[Licence]
    notes: list[str]


def names_repository(name: str | None) -> bool:
    """Whether `name` is written like owner/name on the Hub and is not a path on this machine."""
    return bool(name) and "/" in name and is_hub_id(name)


def source_licences(origins: Counter) -> list[Licence]:
    """One for each (source_dataset, source_license) of the rows; without a licence, the one in the dataset's card."""
    found = {}
    for dataset, licence in sorted(origins, key=str):
        name = scrub_text(dataset) if dataset else NO_SOURCE
        licence = licence or (find_dataset_license(dataset) if names_repository(dataset) else None) or ""
        found[name, licence] = Licence(name, licence, restrictions_of(licence))
    return list(found.values())


def model_licences(models: Counter, token: str | None) -> list[Licence]:
    """One for each model that the rows name, from its card on the Hub; unknown for local models."""
    entries = [entry for text in models for entry in parse_json(text) or ()]
    found = []
    for name in sorted({e["id"] for e in entries if isinstance(e, dict) and isinstance(e.get("id"), str)}):
        on_hub = names_repository(name)
        licence = look_up_licence(name, KNOWN_MODELS.get(name), token) if on_hub else Licence(name, "", ())
        found.append(Licence(scrub_text(name), licence.name, licence.restrictions))
    return found


def choose_licence(
    sources: Sequence[Licence], models: Sequence[Licence], requested: str | None, accept_unknown: bool
) -> LicenceChoice:
    """The licence `requested` by --license, or that of the strictest source. Raises InputError if it is not allowed."""
    unknown = [one for one in (*sources, *models) if terms_of(one.name) is None]
    if unknown and not accept_unknown and requested != OTHER:
        names = ", ".join(one.source + (f" ({one.name})" if one.name else "") for one in unknown)
        raise InputError(
            f"the terms of the licence of {names} are not known. If the images are yours, or you have read the terms, "
            "pass --license ID --accept_unknown_license, or --license other"
        )
    if requested == OTHER:
        return LicenceChoice(OTHER, list(sources), list(models), _notes(OTHER, sources, models))
    if requested and to_hub_licence(requested) not in hub_licences():
        raise InputError(
            f"--license {requested}: is not a licence of the Hub with known terms; choose one of "
            f"{', '.join(hub_licences())}, or other"
        )
    # Images made by a non-commercial model need at least a non-commercial licence. Other terms of a model are about its
    # weights (attribution, share-alike) or bind whoever uses the model (OpenRAIL), not the images.
    non_commercial = with_term(NON_COMMERCIAL, models)
    at_least = [Licence("a model", "cc-by-nc-4.0", (NON_COMMERCIAL,))] if non_commercial else []
    best = strictest_licence([*sources, *at_least])
    licence = to_hub_licence(requested) if requested else best
    if licence is None:
        raise InputError(_explain_no_default(sources))
    conflicts = licence_conflicts(licence, sources)
    if NON_COMMERCIAL not in (terms_of(licence) or ()):
        made = [f"{one.source}, which made images, is {one.name}" for one in non_commercial]
        conflicts += [f"{reason}, and {licence} drops its {NON_COMMERCIAL}" for reason in made]
    if conflicts:
        allowed = f"{best} or other" if best and is_hub_licence(best) else "other"
        raise InputError.from_problems([*conflicts, f"--license must be {allowed}"])
    if (no_derivatives := with_term(NO_DERIVATIVES, sources)) and not requested:
        names = ", ".join(f"{one.source} ({one.name})" for one in no_derivatives)
        raise InputError(
            f"{names}: forbids derived works, and an edited image is one. If you republish unchanged pairs, or have "
            f"the owner's permission, pass --license {licence}"
        )
    return LicenceChoice(licence, list(sources), list(models), _notes(licence, sources, models))


def with_term(term: str, licences: Sequence[Licence]) -> list[Licence]:
    """Those of the licences that are known to have a term."""
    return [one for one in licences if term in (terms_of(one.name) or ())]


def _explain_no_default(sources: Sequence[Licence]) -> str:
    names = ", ".join(f"{one.source}: {one.name}" for one in sources if terms_of(one.name) is not None)
    if not names:
        return "no source has a known licence: choose one with --license"
    return (
        f"no licence of a source meets the terms of all others ({names}): pass --license other, then the card lists "
        "the licence of each source, or export the sources separately"
    )


def _notes(licence: str, sources: Sequence[Licence], models: Sequence[Licence]) -> list[str]:
    notes = []
    if any(terms_of(one.name) is None for one in sources):
        notes.append("The terms of some sources are not known; the author of this dataset vouches for them.")
    if with_term(NO_DERIVATIVES, sources):
        notes.append("A source forbids derived works: check that you may use these pairs.")
    if with_term(NON_COMMERCIAL, [*sources, *models]):
        notes.append("A source or a model forbids commercial use; this applies to these pairs too.")
    if with_term(USE_RESTRICTIONS, models):
        notes.append("A model has an OpenRAIL licence, which forbids its users the uses listed in its Attachment A.")
    if licence == OTHER:
        notes.append("Each row has the licence of its source (`source_license`).")
    return notes
