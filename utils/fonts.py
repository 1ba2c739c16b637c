"""Fonts for labels in any script: for each text, one whose characters cover it.

Fonts of the system are found by matplotlib, which also ships DejaVu (Latin, Greek, Cyrillic, Arabic, ...).
Where no font has a character, it is shown by its code point, such as "<U+6771>", and the user is told once.
"""

import logging
from functools import cache, lru_cache
from unicodedata import category, name

from PIL import ImageFont, features

logger = logging.getLogger(__name__)

ADVICE = "install a font for it (on Debian and Ubuntu: apt install fonts-noto-cjk fonts-noto-core)"
# Tried before the other fonts of the system, because they are drawn for labels.
PREFERRED = (
    "DejaVu Sans",
    "Noto Sans",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Arial Unicode MS",
    "WenQuanYi Zen Hei",
)
PREFERRED += ("PingFang SC", "Hiragino Sans", "Microsoft YaHei", "Malgun Gothic", "Nirmala UI", "Segoe UI")
UNUSABLE = ("Emoji", "Symbol", "Last Resort", "LastResort", "Math")  # bitmap or placeholder fonts
JOINERS = {0x200B, 0x200C, 0x200D, 0x200E, 0x200F, 0xFE0E, 0xFE0F, 0xFEFF}  # invisible, and needed by no font

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def fit_font(text: str, size: int) -> tuple[str, Font]:
    """(the text to draw, a font of `size` pixels that covers it).

    Characters that no font of the machine has are replaced by their code points. Text of right-to-left scripts is laid
    out by Pillow where it has libraqm.
    """
    text = "".join(letter for letter in text if ord(letter) not in JOINERS and category(letter) not in ("Cc", "Cf"))
    letters = frozenset(map(ord, text)) - set(map(ord, " "))
    if all(letter < 0x7F for letter in letters):  # Pillow's own font
        return text, _default_font(size)
    path, missing = _best_font(letters)
    if missing:
        _tell_once(frozenset(_block(letter) for letter in missing))
        text = "".join(f"<U+{ord(letter):04X}>" if ord(letter) in missing else letter for letter in text)
    return text, _load(path, size) if path else _default_font(size)


@cache
def _default_font(size: int) -> Font:
    return ImageFont.load_default(size)


@lru_cache(maxsize=64)
def _load(path: tuple[str, int], size: int) -> Font:
    engine = ImageFont.Layout.RAQM if features.check("raqm") else ImageFont.Layout.BASIC
    return ImageFont.truetype(path[0], size, index=path[1], layout_engine=engine)


@lru_cache(maxsize=1024)
def _best_font(letters: frozenset[int]) -> tuple[tuple[str, int] | None, frozenset[int]]:
    """(path and index of the font that covers most letters, the letters that it does not have)."""
    best, missing = None, letters
    for path in _font_files():
        lacks = letters - _coverage(path)
        if len(lacks) < len(missing):
            best, missing = path, frozenset(lacks)
        if not missing:
            break
    return best, missing


@cache
def _font_files() -> list[tuple[str, int]]:
    """(file, index in it) of all regular fonts, the preferred ones first."""
    from matplotlib import font_manager

    regular = {}
    for entry in font_manager.fontManager.ttflist:
        is_usable = not any(word in entry.name for word in UNUSABLE)
        if entry.style == "normal" and entry.weight in (400, "normal", "regular", "book") and is_usable:
            regular.setdefault((entry.fname, getattr(entry, "index", 0)), entry.name)
    order = {name: number for number, name in enumerate(PREFERRED)}
    return sorted(regular, key=lambda path: (order.get(regular[path], len(order)), path))


@cache
def _coverage(path: tuple[str, int]) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(path[0]).get_charmap())
    except (RuntimeError, OSError):
        return frozenset()


def _block(letter: int) -> str:
    """The script of a character, for a message."""
    return name(chr(letter), f"U+{letter:04X}").split()[0].title()


_told: set[str] = set()


def _tell_once(scripts: frozenset[str]) -> None:
    if new := scripts - _told:
        _told.update(new)
        logger.warning("no font of this machine shows %s: %s", ", ".join(sorted(new)), ADVICE)
