"""Labels in any script."""

import logging

import numpy as np
import pytest
from PIL import Image, ImageDraw

from utils.contact_sheets import draw_grid
from utils.fonts import fit_font

NO_FONT_HAS_IT = "\U000f1234"  # private use


def draw(text: str) -> bytes:
    image = Image.new("L", (200, 30))
    shown, font = fit_font(text, 20)
    ImageDraw.Draw(image).text((2, 2), shown, fill=255, font=font)
    return image.tobytes()


@pytest.mark.parametrize("text", ["été", "зима", "καλημέρα", "شتاء", "שלג", "Ağaç", "naïve — “x”"])
def test_a_font_that_covers_the_text_is_chosen(text: str) -> None:
    """The letters are drawn: different texts give different pixels, none of them the box of a missing letter."""
    shown, font = fit_font(text, 20)
    assert shown == text
    assert len({draw(letter) for letter in set(text) - set(" ")}) == len(set(text) - set(" "))
    boxes = {font.getmask(letter).getbbox() for letter in text if letter != " "}
    assert None not in boxes
    assert draw(text) != draw(NO_FONT_HAS_IT)


def test_ascii_keeps_its_font() -> None:
    image = Image.new("L", (200, 30))
    ImageDraw.Draw(image).text((2, 2), "make it winter", fill=255, font_size=20)
    assert draw("make it winter") == image.tobytes()


def test_letters_without_a_font_are_shown_by_their_code_point(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("utils.fonts._told", set())
    with caplog.at_level(logging.WARNING):
        assert fit_font(f"snow {NO_FONT_HAS_IT}", 20)[0] == "snow <U+F1234>"
        fit_font(f"{NO_FONT_HAS_IT} again", 20)
    assert caplog.text.count("no font of this machine shows U+F1234: install a font") == 1


def test_a_sheet_has_the_label_of_each_script() -> None:
    cells = [[Image.new("RGB", (200, 20), "white")]]
    sheets = [np.asarray(draw_grid(cells, [text], 200)) for text in ("Сделай зиму", "Сделай лето", "make it winter")]
    assert sheets[0].shape == (36, 200, 3) and sheets[0].min() < 100
    assert (sheets[0] != sheets[1]).any() and (sheets[0] != sheets[2]).any()
