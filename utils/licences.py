"""The licences of what is merged: looked up, and what they forbid named."""

from __future__ import annotations

import re
from dataclasses import dataclass

from utils.train.card import find_license

_RULES = (
    ("non-commercial", re.compile(r"(^|[-_. ])nc([-_. ]|$)|non-?commercial|research", re.IGNORECASE)),
    ("no derivatives", re.compile(r"(^|[-_. ])nd([-_. ]|$)|no-?deriv", re.IGNORECASE)),
)


@dataclass(frozen=True)
class Licence:
    """Of one model. name: "" where it is not known; restrictions: what of "non-commercial", "no derivatives" holds."""

    source: str
    name: str
    restrictions: tuple[str, ...]


def find_licence(source: str, known: str | None = None, token: str | None = None) -> Licence:
    """What a model's card says, on the Hub or in its folder; else `known`, what is known of it beforehand.

    What either forbids is forbidden.
    """
    fields = find_license(source, token)
    told = fields.get("license_name") or fields.get("license") or ""
    names = " ".join([*fields.values(), known or ""])
    return Licence(source, told or known or "", restrictions_of(names))


def restrictions_of(names: str) -> tuple[str, ...]:
    """What licences forbid, as their names say it: "cc-by-nc-nd-4.0" -> ("non-commercial", "no derivatives")."""
    return tuple(what for what, rule in _RULES if rule.search(names))
