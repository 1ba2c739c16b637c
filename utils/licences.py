"""Licences of models and datasets: look them up, derive their terms from their names, and find conflicts."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import DatasetCard, HfApi, ModelCard

from utils.hub_names import looks_like_path

NON_COMMERCIAL = "non-commercial"
NO_DERIVATIVES = "no derivatives"
SHARE_ALIKE = "share-alike"
ATTRIBUTION = "attribution"
USE_RESTRICTIONS = "use restrictions"

_RESTRICTION_PATTERNS = {
    NON_COMMERCIAL: re.compile(r"(^|[-_. ])nc([-_. ]|$)|non-?commercial|research", re.IGNORECASE),
    NO_DERIVATIVES: re.compile(r"(^|[-_. ])nd([-_. ]|$)|no-?deriv", re.IGNORECASE),
}
# Licence ids of the Hub whose terms are known, by what they require of derived works.
_IDS_BY_TERMS = {
    (): "cc0-1.0 pddl unlicense wtfpl",
    (ATTRIBUTION,): "mit apache-2.0 bsd bsd-2-clause bsd-3-clause isc zlib ncsa odc-by bsl-1.0 cdla-permissive-1.0 "
    "cdla-permissive-2.0 etalab-2.0 afl-3.0 postgresql ecl-2.0",
    (ATTRIBUTION, SHARE_ALIKE): "gpl gpl-2.0 gpl-3.0 agpl-3.0 lgpl lgpl-2.1 lgpl-3.0 odbl cdla-sharing-1.0 gfdl",
    (ATTRIBUTION, USE_RESTRICTIONS): "openrail openrail++ creativeml-openrail-m bigscience-openrail-m "
    "bigscience-bloom-rail-1.0 bigcode-openrail-m",
}
_CREATIVE_COMMONS = {
    "by": (),
    "by-sa": (SHARE_ALIKE,),
    "by-nc": (NON_COMMERCIAL,),
    "by-nd": (NO_DERIVATIVES,),
    "by-nc-sa": (NON_COMMERCIAL, SHARE_ALIKE),
    "by-nc-nd": (NON_COMMERCIAL, NO_DERIVATIVES),
}
_TERMS = {name: frozenset(terms) for terms, names in _IDS_BY_TERMS.items() for name in names.split()} | {
    f"cc-{kind}-{version}": frozenset([ATTRIBUTION, *terms])
    for kind, terms in _CREATIVE_COMMONS.items()
    for version in ("1.0", "2.0", "2.5", "3.0", "4.0")
}
_ALIASES = dict.fromkeys(("public domain", "publicdomain", "pd", "cc0", "cc-zero"), "cc0-1.0") | {
    "apache 2.0": "apache-2.0",
    "apache": "apache-2.0",
    "mit license": "mit",
}
_UNKNOWN = ("", "unknown", "other", "none")
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


def find_dataset_license(source: str) -> str | None:
    """The licence in a dataset's card, in its folder, beside its file, or on the Hub; None if unknown."""
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
    """Whether `name` is a valid `license` for a card on the Hub, and its terms are known here."""
    return name in _TERMS and name not in ("cc-by-1.0", "cc-by-nd-1.0")


def hub_licences() -> list[str]:
    """All names for which `is_hub_licence` holds."""
    return sorted(name for name in _TERMS if is_hub_licence(name))


def terms_of(name: str | None) -> frozenset[str] | None:
    """The terms of a licence, out of the five above; None if its name does not tell."""
    plain = to_hub_licence(name or "")
    if plain in _UNKNOWN:
        return None
    if plain in _TERMS:
        return _TERMS[plain]
    restrictions = restrictions_of(plain)
    return frozenset([ATTRIBUTION, *restrictions]) if restrictions else None


def licence_conflicts(licence: str, sources: Sequence[Licence]) -> list[str]:
    """Why `licence`, whose terms are known, is not allowed for a work made from `sources`; one sentence for each."""
    given, problems = terms_of(licence), []
    for source in sources:
        required = terms_of(source.name)
        if required is None:
            continue
        missing = sorted(required - given - {SHARE_ALIKE})
        if missing:
            problems.append(f"{source.source} is {source.name}, and {licence} drops its {' and '.join(missing)}")
        elif SHARE_ALIKE in required and _without_version(licence) != _without_version(source.name):
            problems.append(f"{source.source} is {source.name}, which requires the same licence for derived works")
    return problems


def strictest_licence(sources: Sequence[Licence]) -> str | None:
    """The licence of a source that conflicts with none of the sources; None if there is none."""
    names = sorted({to_hub_licence(one.name) for one in sources}, key=lambda name: (len(terms_of(name) or ()), name))
    allowed = (name for name in reversed(names) if terms_of(name) is not None and not licence_conflicts(name, sources))
    return next(allowed, None)


def _without_version(name: str) -> str:
    """Share-alike licences allow derived works under a later version."""
    return re.sub(r"-[\d.]+$", "", to_hub_licence(name))
