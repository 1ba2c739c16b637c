"""What is private comes out of texts before they are published: absolute paths, and tokens."""

from __future__ import annotations

import json
import re
from typing import Any

from utils.hub import HIDDEN, redact

# A path from the root, from a home, from a drive or of a server; not the `//` of an address, nor a lone `/`.
_PATH = re.compile(r"(?<![\w./:~\\-])(?:file://)?(?:~[\w.-]*|[A-Za-z]:|\\)?[/\\](?:[^/\\\s\"'|]+[/\\])+([^/\\\s\"'|]*)")
_WHOLE_PATH = re.compile(r"(?:file://)?(?:~[\w.-]*|[A-Za-z]:|\\)?[/\\](?:[^/\\\n]+[/\\])*([^/\\\n]*)[/\\]?")
_SECRET = re.compile(r"token|secret|password|api_?key", re.IGNORECASE)


def scrub_text(text: str) -> str:
    """A text without folders: of an absolute path the last part stays. Tokens are hidden."""
    whole = _WHOLE_PATH.fullmatch(text)
    if whole:
        return redact(whole.group(1))
    return redact(_PATH.sub(lambda match: match.group(1), text))


def scrub(value: Any) -> Any:
    """The same for a JSON value; what is kept under the name of a secret is hidden."""
    if isinstance(value, str):
        return scrub_text(value)
    if isinstance(value, dict):
        return {
            str(name): HIDDEN if _SECRET.search(str(name)) and isinstance(inner, str) else scrub(inner)
            for name, inner in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [scrub(inner) for inner in value]
    return value


def scrub_json(text: str | None) -> str | None:
    """The same for a column of JSON text; unchanged to the byte where nothing is private."""
    if not text:
        return text
    try:
        value = json.loads(text)
    except ValueError:
        return scrub_text(text)
    clean = scrub(value)
    return text if clean == value else json.dumps(clean, sort_keys=True, ensure_ascii=False)
