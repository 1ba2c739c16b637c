"""Images whose numbers mean other colours than sRGB's."""

from PIL import Image

from utils.colour_profiles import ADOBE_RGB_CHROMATICITIES, ADOBE_RGB_GAMMA, SRGB_CHROMATICITIES, make_profile

# Chromaticities of white, red, green, blue (SMPTE EG 432-1, ITU-R BT.2020).
DISPLAY_P3 = make_profile((0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06))
ADOBE_RGB = make_profile(ADOBE_RGB_CHROMATICITIES, ADOBE_RGB_GAMMA)
SRGB = make_profile(SRGB_CHROMATICITIES)
P3_RED = (234, 51, 35)  # what Display P3 calls sRGB's red


def solid(colour: tuple[int, ...], mode: str = "RGB", size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.new(mode, size, colour)
