"""Licences of models and datasets: look them up, derive their terms from their names, and find conflicts."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import DatasetCard, HfApi, ModelCard

from utils.hub_names import looks_like_path

# What a licence may require of derived works, from the mildest to the strictest.
NOTICE = "notice"
CHANGES = "statement of changes"
ATTRIBUTION = "attribution"
USE_RESTRICTIONS = "use restrictions"
SHARE_ALIKE = "share-alike"
NON_COMMERCIAL = "non-commercial"
NO_DERIVATIVES = "no derivatives"
TERMS = (NOTICE, CHANGES, ATTRIBUTION, USE_RESTRICTIONS, SHARE_ALIKE, NON_COMMERCIAL, NO_DERIVATIVES)
_WORDS = ("notice", "changes", "attribution", "use", "share", "non-commercial", "no-derivatives")  # of the table

_RESTRICTION_PATTERNS = {
    NON_COMMERCIAL: re.compile(r"(^|[-_. ])nc([-_. ]|$)|non-?commercial|research", re.IGNORECASE),
    NO_DERIVATIVES: re.compile(r"(^|[-_. ])nd([-_. ]|$)|no-?deriv", re.IGNORECASE),
}
_CREATIVE_COMMONS = re.compile(r"(cc-by(?:-(?:nc|sa|nd))*)-([\d.]+)")


def _read_table() -> dict[str, frozenset[str] | None]:
    lines = Path(__file__).with_name("hub_licences.txt").read_text("utf-8").splitlines()
    rows = [line.split() for line in lines if line and not line.startswith("#")]
    terms = dict(zip(_WORDS, TERMS, strict=True))
    return {name: None if words == ["?"] else frozenset(terms[word] for word in words) for name, *words in rows}


_HUB = _read_table()  # id -> terms
_ALIASES = dict.fromkeys(("public domain", "publicdomain", "pd", "cc0", "cc-zero"), "cc0-1.0") | {
    "apache 2.0": "apache-2.0",
    "apache": "apache-2.0",
    "mit license": "mit",
}
# The use restrictions of these are the same; those of any other licence must be passed on under its own name.
_SAME_RESTRICTIONS = ("openrail", "creativeml-openrail-m", "openrail++")
_NOT_TOGETHER = {("gpl-2.0", "apache-2.0"), ("lgpl-2.1", "apache-2.0")}  # the patent clause; the FSF's list
LICENSE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Licence:
    """The licence of a model or dataset. name: "" if unknown; restrictions: NON_COMMERCIAL, NO_DERIVATIVES or both."""

    source: str
    name: str
    restrictions: tuple[str, ...]


def look_up_licence(source: str, known: str | None = None, token: str | None = None) -> Licence:
    """The licence named by a model's card on the Hub or in its folder, by default the one known beforehand.

    The restrictions are those of both.
    """
    fields = read_license_fields(source, token)
    name = fields.get("license_name") or fields.get("license") or known or ""
    return Licence(source, name, restrictions_of(" ".join([*fields.values(), known or ""])))


def read_license_fields(source: str, token: str | None = None) -> dict[str, str]:
    """The license fields of a model card, in the model's folder or on the Hub; empty if unknown or out of reach."""
    try:
        if looks_like_path(source):
            data = ModelCard.load(Path(source) / "README.md", ignore_metadata_errors=True).data
        else:
            data = HfApi(token=token).model_info(source, timeout=10).card_data
    except Exception:  # for the model card only: neither a missing network nor an invalid card may end a run
        return {}
    fields = {key: data.get(key) for key in LICENSE_KEYS} if data else {}
    return {key: value for key, value in fields.items() if isinstance(value, str)} if fields.get("license") else {}


# Datasets whose card has the licence of its code or annotations: that of the photographs.
IMAGENET = ("frgfm/imagenette", "frgfm/imagewoof", "johnowhitaker/imagenette2-320", "ilsvrc/imagenet-1k")
COCO = ("detection-datasets/coco", "huggingfacem4/coco", "phiyodr/coco2017")
PHOTOGRAPHS = dict.fromkeys(IMAGENET, "imagenet-research-only") | dict.fromkeys(COCO, "licences-of-flickr")


def find_dataset_license(source: str) -> str | None:
    """The licence in a dataset's card, in its folder, beside its file, or on the Hub; None if unknown.

    Of some datasets the card is about something else than the photographs (`PHOTOGRAPHS`).
    """
    if source.casefold() in PHOTOGRAPHS:
        return PHOTOGRAPHS[source.casefold()]
    path = Path(source).expanduser()
    readme = (path if path.is_dir() else path.parent) / "README.md"
    try:
        data = DatasetCard.load(readme if path.exists() else source, ignore_metadata_errors=True).data
    except Exception:  # as in read_license_fields
        return None
    found = data.get("license_name") or data.get("license")
    return (found[0] if isinstance(found, list) and found else found) or None


def restrictions_of(names: str) -> tuple[str, ...]:
    """The restrictions in the names of licences: "cc-by-nc-nd-4.0" -> ("non-commercial", "no derivatives")."""
    return tuple(term for term, pattern in _RESTRICTION_PATTERNS.items() if pattern.search(names))


def to_hub_licence(name: str) -> str:
    """The Hub's id of a licence: "CC BY-SA 4.0" -> "cc-by-sa-4.0", "Public domain" -> "cc0-1.0"."""
    plain = " ".join(name.casefold().replace("_", "-").split())
    plain = _ALIASES.get(plain, plain).replace(" ", "-")
    if re.fullmatch(r"cc-by(-(nc|sa|nd))*", plain):  # no version given: the current one is at least as strict
        plain += "-4.0"
    return plain


def is_hub_licence(name: str) -> bool:
    """Whether the Hub accepts `name` as the `license` of a card."""
    return name in _HUB


def hub_licences() -> list[str]:
    """The Hub's ids of licences whose terms are known here."""
    return sorted(name for name, terms in _HUB.items() if terms is not None)


def terms_of(name: str | None) -> frozenset[str] | None:
    """The terms of a licence, out of `TERMS`; None if its name does not tell."""
    plain = to_hub_licence(name or "")
    if plain in _HUB:
        return _HUB[plain]
    if match := _CREATIVE_COMMONS.fullmatch(plain):  # a version that the Hub does not list: the terms are the same
        kind = match[1].removeprefix("cc-by").split("-")[1:]
        terms = {"nc": NON_COMMERCIAL, "sa": SHARE_ALIKE, "nd": NO_DERIVATIVES}
        return frozenset([NOTICE, CHANGES, ATTRIBUTION, *(terms[part] for part in kind)])
    restrictions = restrictions_of(plain)
    return frozenset([NOTICE, ATTRIBUTION, *restrictions]) if restrictions else None


def strictness(name: str | None) -> tuple[int, ...]:
    """A key to sort licences by: the strictest term decides, then the next one; unknown licences are the strictest."""
    terms = terms_of(name)
    ranks = [TERMS.index(term) for term in terms] if terms is not None else [len(TERMS)]
    return tuple(sorted(ranks, reverse=True))


def licence_conflicts(licence: str, sources: Sequence[Licence]) -> list[str]:
    """Why `licence`, whose terms are known, is not allowed for a work made from `sources`; one sentence for each."""
    given, problems = terms_of(licence), []
    for source in sources:
        required = terms_of(source.name)
        if required is None:
            continue
        missing = [term for term in TERMS if term in required - given and term != SHARE_ALIKE]
        if missing:
            dropped = " and ".join([*filter(None, [", ".join(missing[:-1])]), missing[-1]])
            problems.append(f"{source.source} is {source.name}, and {licence} drops its {dropped}")
        elif SHARE_ALIKE in required and not _may_follow(licence, source.name):
            problems.append(f"{source.source} is {source.name}, which requires the same licence for derived works")
        elif USE_RESTRICTIONS in required and not _keeps_restrictions(licence, source.name):
            problems.append(f"{source.source} is {source.name}, which requires its own use restrictions")
        elif (to_hub_licence(licence), to_hub_licence(source.name)) in _NOT_TOGETHER:
            problems.append(f"{source.source} is {source.name}, whose patent clause {licence} does not allow")
    return problems


def _may_follow(licence: str, source: str) -> bool:
    """Whether a share-alike licence allows derived works under `licence`: itself, of Creative Commons a later version.

    The 1.0 versions of Creative Commons, and the GPL unless it says so, allow no later version.
    """
    given, required = to_hub_licence(licence), to_hub_licence(source)
    new, old = _CREATIVE_COMMONS.fullmatch(given), _CREATIVE_COMMONS.fullmatch(required)
    if given == required or not (new and old):
        return given == required
    return new[1] == old[1] and old[2] != "1.0" and float(new[2]) >= float(old[2])


def _keeps_restrictions(licence: str, source: str) -> bool:
    names = (to_hub_licence(licence), to_hub_licence(source))
    return names[0] == names[1] or all(name in _SAME_RESTRICTIONS for name in names)


def strictest_licence(sources: Sequence[Licence]) -> str | None:
    """The licence of a source that conflicts with none of the sources; None if there is none."""
    known = {to_hub_licence(one.name) for one in sources if terms_of(one.name) is not None}
    names = sorted(known, key=lambda name: (strictness(name), name), reverse=True)
    return next((name for name in names if not licence_conflicts(name, sources)), None)


def license_fields(name: str) -> dict[str, str]:
    """The fields of a card for a licence: its id if the Hub has it, otherwise "other" with its name."""
    plain = to_hub_licence(name)
    if is_hub_licence(plain) and plain != "other":
        return {"license": plain}
    return {"license": "other", "license_name": re.sub(r"[^\w.-]+", "-", plain).strip("-") or "unknown"}


def merged_license_fields(sources: Sequence[Licence]) -> dict[str, str]:
    """The fields of a card for a work made from all `sources`: the strictest licence, if it meets the terms of all."""
    if len({one.name for one in sources}) == 1:
        return license_fields(sources[0].name)
    has_unknown = any(terms_of(one.name) is None for one in sources)
    strictest = None if has_unknown else strictest_licence(sources)
    return license_fields(strictest) if strictest else {"license": "other", "license_name": "see-the-sources"}
