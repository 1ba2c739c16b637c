"""Decoding of images in all formats and conditions, and the geometry of a pair."""

import base64
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.colours import ADOBE_RGB, DISPLAY_P3, P3_RED, SRGB, solid
from tests.pairs import encode, make_image
from utils.data.geometry import Geometry, make_buckets, mentions_direction, nearest_bucket, prepare_pair
from utils.pixels import BadRow, decode, decode_animation, decode_image, num_frames, peek_size

LANCZOS, BILINEAR = Image.Resampling.LANCZOS, Image.Resampling.BILINEAR
GREY = np.tile(np.arange(48, dtype=np.uint8) * 5, (40, 1))  # (40, 48), a ramp from left to right


def png_header(width: int, height: int) -> bytes:
    """A PNG file with a header of this size and no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT\x35\xaf\x06\x1e\0\0\0\0IEND\xaeB\x60\x82"


def palette_with_transparency() -> bytes:
    image = Image.fromarray(GREY).convert("P")
    return encode(image, transparency=0)


def animated_gif() -> bytes:
    first, second = make_image(0).convert("P"), make_image(9).convert("P")
    return encode(first, "GIF", save_all=True, append_images=[second])


# ---- images that can be used ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: encode(Image.fromarray(GREY)),
        lambda: encode(Image.fromarray(GREY.astype(np.uint16) * 257)),  # I;16
        lambda: encode(Image.fromarray(GREY.astype(np.int32) * 257), "TIFF"),  # I, of 16 bits
        lambda: encode(Image.fromarray(GREY.astype(np.int32)), "TIFF"),  # I, of 8 bits
        lambda: encode(Image.fromarray(GREY.astype(np.float32) / 255), "TIFF"),  # F in [0, 1]
        lambda: encode(Image.fromarray(GREY.astype(np.float32)), "TIFF"),  # F in [0, 255]
        lambda: encode(Image.fromarray(GREY).convert("P")),
        lambda: encode(Image.fromarray(GREY).convert("LA")),
        lambda: encode(Image.fromarray(GREY).convert("RGBA")),
        lambda: Image.fromarray(GREY),
        lambda: {"bytes": encode(Image.fromarray(GREY)), "path": "gone.png"},
        lambda: bytearray(encode(Image.fromarray(GREY), "WEBP", lossless=True)),
        lambda: encode(Image.fromarray(GREY), "BMP"),
        lambda: [encode(Image.fromarray(GREY))],
        lambda: [{"bytes": encode(Image.fromarray(GREY)), "path": None}],
        lambda: base64.b64encode(encode(Image.fromarray(GREY))).decode(),
        lambda: "data:image/png;base64," + base64.b64encode(encode(Image.fromarray(GREY))).decode(),
        lambda: encode(Image.fromarray(GREY), icc_profile=SRGB),
        lambda: encode(Image.fromarray(GREY), icc_profile=DISPLAY_P3[:200]),  # damaged: counts as sRGB
        lambda: encode(Image.fromarray(GREY), icc_profile=DISPLAY_P3),  # of other channels
    ],
)
def test_all_modes_decode_to_the_same_image(make: Callable[[], object]) -> None:
    image = decode_image(make())
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.repeat(GREY[..., None], 3, axis=-1))
    assert peek_size(make()) == (40, 48)


def test_alpha_is_composited_on_white() -> None:
    rgba = np.full((10, 10, 4), (200, 0, 0, 255), dtype=np.uint8)
    rgba[:5, :, 3] = 0  # hidden
    rgba[5:, :5, 3] = 128
    pixels = np.asarray(decode_image(encode(Image.fromarray(rgba))))
    assert (pixels[:5] == 255).all()
    assert np.abs(pixels[5:, :5].astype(int) - (227, 127, 127)).max() <= 1
    assert (pixels[5:, 5:] == (200, 0, 0)).all()
    pixels = np.asarray(decode_image(palette_with_transparency()))
    is_hidden = np.asarray(Image.open(io.BytesIO(palette_with_transparency()))) == 0
    assert is_hidden.any()
    assert (pixels[is_hidden] == 255).all()
    assert (pixels[~is_hidden] == np.repeat(GREY[..., None], 3, -1)[~is_hidden]).all()


def test_cmyk_and_one_bit() -> None:
    pixels = np.asarray(decode_image(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")))
    assert np.abs(pixels.astype(int) - (255, 0, 0)).max() < 8
    pixels = np.asarray(decode_image(encode(Image.new("1", (16, 16), 1))))
    assert (pixels == 255).all()


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF", "HEIF"])
def test_an_embedded_profile_is_converted_to_srgb(file_format: str) -> None:
    """Display P3's (234, 51, 35) is sRGB's (255, 0, 0); with alpha and as a palette, too."""
    options = dict(JPEG=dict(quality=100, subsampling=0), WEBP=dict(lossless=True), AVIF=dict(quality=100))
    if file_format == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    options = options.get(file_format, {}) | dict(icc_profile=DISPLAY_P3)
    pixels = np.asarray(decode_image(encode(solid(P3_RED), file_format, **options)))
    assert np.abs(pixels.astype(int) - (255, 0, 0)).max() <= (0 if file_format in ("PNG", "WEBP", "TIFF") else 6)
    if file_format == "PNG":
        transparent = decode(encode(solid((*P3_RED, 128), "RGBA"), **options))
        assert transparent.rgb.getpixel((0, 0)) == (255, 127, 127) and transparent.alpha.getpixel((0, 0)) == 128
        assert decode_image(encode(solid(P3_RED).quantize(2), **options)).getpixel((0, 0)) == (255, 0, 0)


def test_colours_without_an_icc_profile() -> None:
    """Adobe RGB as cameras mark it, gAMA and cHRM of a PNG, LAB; expected values from the formulas in float64."""
    linear = (np.array([100, 150, 200]) / 255) ** (563 / 256)
    to_xyz = np.array([[0.57667, 0.18556, 0.18823], [0.29734, 0.62736, 0.07529], [0.02703, 0.07069, 0.99134]])
    to_srgb = np.array([[3.24045, -1.53714, -0.49853], [-0.96927, 1.87601, 0.04156], [0.05564, -0.20403, 1.05723]])
    rgb = np.clip(to_srgb @ to_xyz @ linear, 0, 1)
    expected = 255 * np.where(rgb <= 0.0031308, 12.92 * rgb, 1.055 * rgb ** (1 / 2.4) - 0.055)
    exif = Image.Exif()
    exif.get_ifd(0x8769).update({0xA001: 0xFFFF, 0xA005: {1: "R03"}})
    marked = encode(solid((100, 150, 200)), "JPEG", exif=exif, quality=100, subsampling=0)
    embedded = encode(solid((100, 150, 200)), icc_profile=ADOBE_RGB)
    assert np.abs(np.asarray(decode_image(marked))[0, 0] - expected).max() <= 2
    assert np.abs(np.asarray(decode_image(embedded))[0, 0] - expected).max() <= 1

    def png_with(chunk: bytes, *values: int) -> bytes:
        content = chunk + struct.pack(f">{len(values)}I", *values)
        added = struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
        stored = encode(solid((55, 128, 188)))
        return stored[:33] + added + stored[33:]

    assert np.abs(np.asarray(decode_image(png_with(b"gAMA", 100_000)))[0, 0] - (129.0, 188.0, 222.0)).max() <= 1.5
    assert decode_image(png_with(b"gAMA", 45_455)).getpixel((0, 0)) == (55, 128, 188)
    p3 = [31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000]
    assert decode_image(png_with(b"cHRM", *p3)).getpixel((0, 0))[0] < 30  # outside sRGB: less red
    grey = decode_image(encode(Image.new("LAB", (16, 16), (128, 128, 128)), "TIFF")).getpixel((0, 0))
    assert max(grey) - min(grey) <= 1 and abs(grey[0] - 119) <= 1  # L* 50.2


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations(file_format: str) -> None:
    frames = [solid(colour, size=(40, 30)) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    options = dict(lossless=True) if file_format == "WEBP" else {}
    if file_format != "TIFF":
        options |= dict(duration=[50, 70, 90], loop=3)
    stored = encode(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    animation = decode_animation(stored)
    assert num_frames(stored) == 3 and animation.alphas == [None] * 3
    for decoded, frame in zip(animation.frames, frames, strict=True):
        np.testing.assert_array_equal(np.asarray(decoded), np.asarray(frame))
    if file_format != "TIFF":
        assert (animation.durations, animation.loop) == ([50, 70, 90], 3)
    with pytest.raises(BadRow, match="3 frames, at most 2"):
        decode_animation(stored, max_frames=2)
    still = encode(frames[0], file_format)
    assert num_frames(still) == len(decode_animation(still).frames) == 1


def test_a_replacement_image_is_not_a_frame_of_an_apng() -> None:
    frames = [solid(colour) for colour in ((9, 9, 9), (250, 0, 0), (0, 250, 0))]
    stored = encode(frames[0], save_all=True, append_images=frames[1:], default_image=True)
    assert num_frames(stored) == 2
    assert [frame.getpixel((0, 0)) for frame in decode_animation(stored).frames] == [(250, 0, 0), (0, 250, 0)]
    assert decode_image(stored).getpixel((0, 0)) == (250, 0, 0)


def test_alpha_on_a_chosen_background() -> None:
    stored = encode(solid((200, 0, 0, 0), "RGBA"))
    assert decode(stored, background="#0000ff").rgb.getpixel((0, 0)) == (0, 0, 255)
    assert decode(encode(solid((200, 0, 0, 255), "RGBA"))).alpha is None  # opaque


def test_heic_without_pillow_heif_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.pixels.register_heif", lambda: False)
    with pytest.raises(BadRow, match="pip install pillow-heif"):
        decode_image(b"\0\0\0\x18ftypheic" + bytes(40))


def test_animated_gif_gives_its_first_frame() -> None:
    pixels = np.asarray(decode_image(animated_gif())).astype(int)
    assert np.abs(pixels - np.asarray(make_image(0).convert("P").convert("RGB"))).max() == 0


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation(orientation: int, file_format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = encode(make_image(0), file_format, exif=exif)
    upright = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, 1),
    }[orientation]
    image = decode_image(stored)
    assert (image.height, image.width) == peek_size(stored) == ((48, 40) if orientation > 4 else (40, 48))
    unturned = Image.open(io.BytesIO(encode(make_image(0), file_format))).convert("RGB")
    np.testing.assert_array_equal(np.asarray(image), upright(np.asarray(unturned)))


def test_an_image_with_damaged_exif_is_used() -> None:
    stored = encode(make_image(0), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert decode_image(stored).size == (48, 40)


def test_jpeg_is_decoded_at_a_reduced_size() -> None:
    stored = encode(make_image(0, (800, 1200)), "JPEG", quality=95)
    assert decode_image(stored, shorter_side=64).size == (300, 200)  # a quarter; an eighth would be under twice 64
    assert decode_image(stored, shorter_side=512).size == (1200, 800)
    geometry = Geometry(64)
    small = prepare_pair(stored, stored, geometry)
    full = prepare_pair(Image.open(io.BytesIO(stored)).copy(), Image.open(io.BytesIO(stored)).copy(), geometry)
    assert small.original_size == full.original_size == (800, 1200)
    assert np.abs(small.original.astype(int) - full.original).mean() < 1.5


@pytest.mark.parametrize("side, decoded", [(256, 256), (200, 256), (129, 256), (128, 128), (64, 128), (32, 64)])
def test_training_decodes_a_jpeg_at_the_needed_size(side, decoded) -> None:
    """At half or a quarter of its size: nearer to Lanczos interpolation of all pixels than bilinear is."""
    photo = Image.open("assets/photos/raccoon.jpg").convert("RGB").crop((0, 0, 400, 400)).resize((512, 512))
    stored = encode(photo, "JPEG", quality=95)
    assert min(decode(stored, shorter_side=side, is_tight=True).rgb.size) == decoded
    target, full = side // 8 * 8, Image.open(io.BytesIO(stored))
    lanczos, bilinear = (np.asarray(full.resize((target, target), way), int) for way in (LANCZOS, BILINEAR))
    reduced = prepare_pair(stored, stored, Geometry(target)).original.transpose(1, 2, 0)
    assert np.square(reduced - lanczos).mean() < np.square(bilinear - lanczos).mean()


def test_a_very_long_image_is_used() -> None:
    pair = prepare_pair(make_image(0, (100, 20_000)), make_image(0, (100, 20_000)), Geometry(64), (0.0, 0.999))
    assert pair.original.shape == (3, 64, 64)
    assert pair.crop_top_left == (0, int(0.999 * (12_800 - 64 + 1)))


def test_files(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode(make_image(3)))
    for value in (tmp_path / "a.png", str(tmp_path / "a.png"), {"bytes": None, "path": str(tmp_path / "a.png")}):
        np.testing.assert_array_equal(np.asarray(decode_image(value)), np.asarray(make_image(3)))
        assert peek_size(value) == (40, 48)


# ---- bad images -----------------------------------------------------------------------------------------------------

BAD_IMAGES = {
    "nothing": (lambda: None, "no image"),
    "empty dict": (lambda: {"bytes": None, "path": None}, "no image"),
    "zero bytes": (lambda: {"bytes": b"", "path": "a.png"}, "0 bytes"),
    "text": (lambda: b"make it a cartoon", "not an image in a format"),
    "missing file": (lambda: "/no/such/file.png", "no such file: /no/such/file.png"),
    "folder": (lambda: "/tmp", "is a folder: /tmp"),
    "device": (lambda: "/dev/zero", "is not a regular file"),
    "number": (lambda: 7, "not an image but int"),
    "empty list": (list, "no image"),
    "list of two": (lambda: [make_image(0), make_image(1)], "a list of 2 images"),
    "EPS named .png": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\nshowpage\n", "EPS or PostScript"),
    "TGA": (lambda: encode(make_image(0), "TGA"), "not an image in a format"),
    "Photoshop": (lambda: b"8BPS\0\1" + bytes(40), "a Photoshop file"),
    "JPEG XL": (lambda: b"\xff\x0a" + bytes(40), "a JPEG XL image"),
    "camera's raw file": (lambda: encode(make_image(0), "TIFF", tiffinfo={50706: b"\1\4\0\0"}), "camera's raw file"),
    "raw file with a thumbnail": (lambda: encode(make_image(0), "TIFF", tiffinfo={254: 1}), "camera's raw file"),
    "video": (lambda: b"\0\0\0\x20ftypisom" + bytes(40), "a video"),
    "web page": (lambda: b"\n<!DOCTYPE html><html>", "a web page"),
    "SVG": (lambda: b'<?xml version="1.0"?>\n<!-- x --><svg width="9">', "an SVG"),
    "Git LFS pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\n", "run git lfs pull"),
    "one pixel": (lambda: encode(Image.new("RGB", (1, 1))), "too small: 1x1"),
    "narrow": (lambda: encode(Image.new("RGB", (7, 900))), "too small: 7x900"),
    "20,000 pixels square": (lambda: png_header(20_000, 20_000), "too large"),
    "13,400 pixels square": (lambda: png_header(13_400, 13_400), "too large"),
}
BAD_PIXELS = {
    "truncated PNG": (lambda: encode(make_image(0, (90, 90)))[:-40], "cannot be decoded"),
    "truncated JPEG": (lambda: encode(make_image(0, (90, 90)), "JPEG")[:-300], "cannot be decoded"),
    "damaged PNG": (lambda: png_header(64, 64), "cannot be decoded"),
    "not finite": (lambda: encode(Image.fromarray(np.full((9, 9), np.nan, np.float32)), "TIFF"), "outside 0..65535"),
    "negative": (lambda: encode(Image.fromarray(np.full((9, 9), -3, np.int32)), "TIFF"), "outside 0..65535"),
}


@pytest.mark.parametrize("case", [*BAD_IMAGES, *BAD_PIXELS])
def test_bad_images_give_a_reason(case: str) -> None:
    make, reason = (BAD_IMAGES | BAD_PIXELS)[case]
    with pytest.raises(BadRow, match=reason):
        decode_image(make())
    if case in BAD_IMAGES:
        with pytest.raises(BadRow):
            peek_size(make())
    with pytest.raises(BadRow, match="edited image: "):
        prepare_pair(make_image(0), make(), Geometry(16))


def test_max_pixels() -> None:
    with pytest.raises(BadRow, match="too large: 48x40 pixels, at most 1,000"):
        decode_image(make_image(0), max_pixels=1000)


# ---- geometry -------------------------------------------------------------------------------------------------------


def test_crop_equals_resizing_then_cropping() -> None:
    """Resampling only the crop equals resizing everything and cropping, to one grey level."""
    image = make_image(1, (333, 517))
    whole = np.asarray(image.resize((99, 64), Image.Resampling.LANCZOS)).astype(int)
    for u_x in (0.0, 0.31, 0.999):
        pair = prepare_pair(image, image, Geometry(64), (0.7, u_x))
        top, left = pair.crop_top_left
        assert (top, left) == (0, int(u_x * (99 - 64 + 1)))
        expected = whole[top : top + 64, left : left + 64].transpose(2, 0, 1)
        assert np.abs(pair.original.astype(int) - expected).max() <= 1
        np.testing.assert_array_equal(pair.original, pair.edited)
        assert pair.original.dtype == np.uint8
        assert pair.original.flags["C_CONTIGUOUS"]
        assert (pair.original_size, pair.target_size) == ((333, 517), (64, 64))


def test_center_crop_and_squash() -> None:
    image = make_image(1, (64, 96))
    assert prepare_pair(image, image, Geometry(64, center_crop=True), (0.0, 0.0)).crop_top_left == (0, 16)
    squashed = prepare_pair(image, image, Geometry(64, "squash"), (0.9, 0.9))
    assert squashed.crop_top_left == (0, 0)
    expected = np.asarray(image.resize((64, 64), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    np.testing.assert_array_equal(squashed.original, expected)


def test_an_edited_image_of_another_size_is_aligned_with_the_original() -> None:
    """As in cartoonization: only the edited image was resized, and cropped to multiples of 8."""
    original = make_image(1, (500, 1003))
    edited = original.resize((720, 360), Image.Resampling.LANCZOS)
    pair = prepare_pair(original, edited, Geometry(128), (0.4, 0.4))
    assert np.abs(pair.original.astype(int) - pair.edited).mean() < 8
    with pytest.raises(BadRow, match=r"differ by more than 2% \(1003x500 and 720x400\)"):
        prepare_pair(original, original.resize((720, 400)), Geometry(128))
    with pytest.raises(BadRow, match="aspect"):
        prepare_pair(original, original.transpose(Image.Transpose.ROTATE_90), Geometry(128))


def test_mirroring() -> None:
    image, edited = make_image(1, (64, 96)), make_image(2, (64, 96))
    geometry = Geometry(64, random_flip=True)
    plain = prepare_pair(image, edited, geometry, (0.0, 0.25), 0.5, "make it red")
    mirrored = prepare_pair(image, edited, geometry, (0.0, 0.25), 0.49, "make it red")
    assert not plain.is_flipped
    assert mirrored.is_flipped
    np.testing.assert_array_equal(mirrored.original, plain.original[:, :, ::-1])
    np.testing.assert_array_equal(mirrored.edited, plain.edited[:, :, ::-1])
    # The crop is that of the mirrored image, which the model sees.
    assert mirrored.crop_top_left == (0, 32 - plain.crop_top_left[1])
    assert not prepare_pair(image, edited, Geometry(64), u_flip=0.0).is_flipped
    assert not prepare_pair(image, edited, geometry, u_flip=0.0, prompt="the dog on the LEFT").is_flipped


DIRECTIONS = [
    "move left",
    "Right side up",
    "the leftmost cat",
    "left-hand",
    "rotate clockwise",
    "turn counter-clockwise",
    "anticlockwise",
    "look rightwards.",
]


@pytest.mark.parametrize("prompt", DIRECTIONS)
def test_direction_words(prompt: str) -> None:
    assert mentions_direction(prompt)


@pytest.mark.parametrize("prompt", ["make it bright", "copyright sign", "cleft chin", "add an upright piano", ""])
def test_words_without_direction(prompt: str) -> None:
    assert not mentions_direction(prompt)


@pytest.mark.parametrize("resolution", [32, 64, 128, 256, 320, 512, 768, 1024])
def test_buckets(resolution: int) -> None:
    buckets = make_buckets(resolution)
    assert (resolution, resolution) in buckets
    assert 3 <= len(buckets) <= 30
    for height, width in buckets:
        assert height % 8 == width % 8 == 0
        assert 0.6 * resolution**2 <= height * width <= resolution**2
        assert 0.4 <= height / width <= 2.5
        assert (width, height) in buckets
    assert nearest_bucket((100, 101), buckets) == (resolution, resolution)
    tall, wide = nearest_bucket((1000, 10), buckets), nearest_bucket((10, 1000), buckets)
    assert tall[0] / tall[1] > 1.4
    assert wide[1] / wide[0] > 1.4


def test_bucket_geometry_covers_the_bucket() -> None:
    image = make_image(1, (300, 500))
    pair = prepare_pair(image, image, Geometry(256, "bucket"), (0.5, 0.5))
    height, width = pair.target_size
    assert (height, width) == nearest_bucket((300, 500), make_buckets(256))
    assert pair.original.shape == (3, height, width)
    assert prepare_pair(image, image, Geometry(256, "bucket"), bucket=(384, 128)).original.shape == (3, 384, 128)


def test_unknown_resize_mode() -> None:
    with pytest.raises(ValueError, match="--resize_mode is 'stretch'; use one of crop, squash, bucket"):
        Geometry(64, "stretch")
