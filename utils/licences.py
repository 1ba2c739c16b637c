"""Licences: looked up, what they ask told from their names, and which one a mixture of sources may carry."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, ModelCard

NON_COMMERCIAL = "non-commercial"
NO_DERIVATIVES = "no derivatives"
SHARE_ALIKE = "share-alike"
ATTRIBUTION = "attribution"
USE_RESTRICTIONS = "use restrictions"

_RULES = (
    (NON_COMMERCIAL, re.compile(r"(^|[-_. ])nc([-_. ]|$)|non-?commercial|research", re.IGNORECASE)),
    (NO_DERIVATIVES, re.compile(r"(^|[-_. ])nd([-_. ]|$)|no-?deriv", re.IGNORECASE)),
)
_CREATIVE_COMMONS = [
    f"cc-{kind}-{version}"
    for kind in ("by", "by-sa", "by-nc", "by-nd", "by-nc-sa", "by-nc-nd")
    for version in ("1.0", "2.0", "2.5", "3.0", "4.0")
]
# The ids that the Hub knows and whose terms are beyond doubt, by what they ask of whoever passes a work on.
_BY_TERMS = {
    (): ("cc0-1.0", "pddl", "unlicense", "wtfpl"),
    (ATTRIBUTION,): (
        "mit",
        "apache-2.0",
        "bsd",
        "bsd-2-clause",
        "bsd-3-clause",
        "isc",
        "zlib",
        "ncsa",
        "odc-by",
        "bsl-1.0",
        "cdla-permissive-1.0",
        "cdla-permissive-2.0",
        "etalab-2.0",
        "afl-3.0",
        "postgresql",
        "ecl-2.0",
    ),
    (ATTRIBUTION, SHARE_ALIKE): (
        "gpl",
        "gpl-2.0",
        "gpl-3.0",
        "agpl-3.0",
        "lgpl",
        "lgpl-2.1",
        "lgpl-3.0",
        "odbl",
        "cdla-sharing-1.0",
        "gfdl",
    ),
    (ATTRIBUTION, USE_RESTRICTIONS): (
        "openrail",
        "openrail++",
        "creativeml-openrail-m",
        "bigscience-openrail-m",
        "bigscience-bloom-rail-1.0",
        "bigcode-openrail-m",
    ),
}
_TERMS = {name: frozenset(terms) for terms, names in _BY_TERMS.items() for name in names} | {
    name: frozenset([ATTRIBUTION]).union(
        term
        for part, term in (("nc", NON_COMMERCIAL), ("nd", NO_DERIVATIVES), ("sa", SHARE_ALIKE))
        if part in name.split("-")
    )
    for name in _CREATIVE_COMMONS
}
_SAME = {
    "public domain": "cc0-1.0",
    "publicdomain": "cc0-1.0",
    "pd": "cc0-1.0",
    "cc0": "cc0-1.0",
    "cc-zero": "cc0-1.0",
    "apache 2.0": "apache-2.0",
    "apache": "apache-2.0",
    "mit license": "mit",
}
NOT_TOLD = ("", "unknown", "other", "none")


@dataclass(frozen=True)
class Licence:
    """Of one model or dataset. name: "" where it is not known; restrictions: what of "non-commercial",
    "no derivatives" holds."""

    source: str
    name: str
    restrictions: tuple[str, ...]


def look_up_licence(source: str, known: str | None = None, token: str | None = None) -> Licence:
    """What a model's card says, on the Hub or in its folder; else `known`, what is known of it beforehand.

    What either forbids is forbidden.
    """
    fields = read_license_fields(source, token)
    told = fields.get("license_name") or fields.get("license") or ""
    names = " ".join([*fields.values(), known or ""])
    return Licence(source, told or known or "", restrictions_of(names))


def restrictions_of(names: str) -> tuple[str, ...]:
    """What licences forbid, as their names say it: "cc-by-nc-nd-4.0" -> ("non-commercial", "no derivatives")."""
    return tuple(what for what, rule in _RULES if rule.search(names))


def hub_id(name: str) -> str:
    """The Hub's way to write a licence: "CC BY-SA 4.0" -> "cc-by-sa-4.0", "Public domain" -> "cc0-1.0"."""
    plain = " ".join(name.casefold().replace("_", "-").split())
    plain = _SAME.get(plain, plain).replace(" ", "-")
    if re.fullmatch(r"cc-by(-(nc|sa|nd))*", plain):  # without a version: the current one asks no less
        plain += "-4.0"
    return plain


def is_hub_licence(name: str) -> bool:
    """Whether the front matter of a card may name it; the Hub refuses other words than its own."""
    return name in _TERMS and name not in ("cc-by-1.0", "cc-by-nd-1.0")


def known_licences() -> list[str]:
    return sorted(name for name in _TERMS if is_hub_licence(name))


def terms_of(name: str | None) -> frozenset[str] | None:
    """What a licence asks, of the five terms above; None where its name does not tell."""
    plain = hub_id(name or "")
    if plain in NOT_TOLD:
        return None
    if plain in _TERMS:
        return _TERMS[plain]
    forbidden = restrictions_of(plain)
    return frozenset([ATTRIBUTION, *forbidden]) if forbidden else None


def problems_of_carrying(carried: str, sources: Sequence[Licence]) -> list[str]:
    """Where `carried`, a licence whose terms are known, permits more than a source; one sentence for each."""
    given, problems = terms_of(carried), []
    for source in sources:
        asked = terms_of(source.name)
        if asked is None:
            continue
        lacking = sorted(asked - given - {SHARE_ALIKE})
        if lacking:
            problems.append(f"{source.source} is {source.name}, and {carried} drops its {' and '.join(lacking)}")
        elif SHARE_ALIKE in asked and _family(carried) != _family(source.name):
            problems.append(f"{source.source} is {source.name}, which lets works made of it carry only that licence")
    return problems


def strictest(sources: Sequence[Licence]) -> str | None:
    """The licence among those of the sources that permits no more than any of them; None where there is none."""
    names = sorted({hub_id(source.name) for source in sources}, key=lambda name: (len(terms_of(name) or ()), name))
    return next(
        (name for name in reversed(names) if terms_of(name) is not None and not problems_of_carrying(name, sources)),
        None,
    )


def _family(name: str) -> str:
    """A licence without its version: of the share-alike ones a later version may follow an earlier one."""
    return re.sub(r"-[\d.]+$", "", hub_id(name))


LICENSE_KEYS = ("license", "license_name", "license_link")


def read_license_fields(base_model: str, token: str | None = None) -> dict[str, str]:
    """The licence fields of the base model's card, from its folder or from the Hub; empty when they are not known."""
    readme = Path(base_model) / "README.md"
    try:
        if Path(base_model).exists():
            data = ModelCard.load(readme, ignore_metadata_errors=True).data if readme.is_file() else None
        else:
            data = HfApi(token=token).model_info(base_model, timeout=10).card_data
    except Exception:  # the card only describes: neither a missing network nor an odd card may end a run
        data = None
    known = {key: data.get(key) for key in LICENSE_KEYS} if data else {}
    return {key: value for key, value in known.items() if isinstance(value, str)} if known.get("license") else {}
