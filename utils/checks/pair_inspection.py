"""What can be wrong with one pair: used by data_preparation/check_dataset.py on all rows, by `--dry_run` on some.

A finding is a hint, judged from the pixels alone and tuned to keep silent when in doubt: docs/checking.md says what
each one means and what to do.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import cv2
import numpy as np

from utils.checks import image_measures as measures
from utils.checks.prompt_checks import MAX_TOKENS, CountTokens, estimate_tokens, guess_task, usable_prompts
from utils.data.geometry import Size, check_aspects, mentions_direction
from utils.pixels import BadRow, decode_with_size

WORKING_SIDE = 384  # longer side at which pictures are compared
TINY_SIDE, HUGE_PIXELS, HUGE_BYTES = 64, 50_000_000, 25_000_000
BLANK_DEVIATION = 1.0
# (PSNR in dB from which on, change of a tile of 1/16 of the sides in 0-255 up to which) nothing has been edited.
NEAR_IDENTICAL, NEAR_IDENTICAL_RESTORED = (35.0, 4.0), (48.0, 4.0)
MIN_SHIFT, MIN_LIKENESS, MIN_GAIN, MIN_DISTINCT = 1.0, 0.5, 0.05, 0.04
MAX_SHAKE = 0.08  # of the longer side: a shaken camera moves the picture too


class Cleaner(NamedTuple):
    """By which measure the edited picture of a restoring task is the better one, and from which step on it is not."""

    measure: str
    sign: int  # 1: more is better
    step: float  # of the measure's logarithm
    floor: float  # added to the measure
    words: str  # what the edited picture is if the pair is swapped
    needs_pixels: bool  # measured on stored pixels: resampling would change it


CLEANER = {
    "denoise": Cleaner("noise_level", -1, 0.2, 0.3, "noisier", True),
    "deblur": Cleaner("sharpness", 1, 0.15, 0.0, "less sharp", True),
    "sharpen": Cleaner("sharpness", 1, 0.15, 0.0, "less sharp", True),
    "super_resolve": Cleaner("sharpness", 1, 0.5, 0.0, "less sharp", True),
    "jpeg": Cleaner("blockiness", -1, 0.15, 0.0, "more blocky", True),
    "dehaze": Cleaner("veil", -1, 0.15, 3.0, "hazier", False),
    "derain": Cleaner("veil", -1, 0.1, 3.0, "more veiled by rain", False),
    "low_light": Cleaner("brightness", 1, 0.2, 3.0, "darker", False),
    "colorize": Cleaner("colourfulness", 1, 0.5, 2.0, "less colourful", False),
}
GRAY_MEASURES = ("noise_level", "sharpness", "blockiness")
RESTORING = {*CLEANER, "raindrop"}


class Finding(NamedTuple):
    """kind: a key of `utils.checks.findings.KINDS`."""

    kind: str
    detail: str


class Picture(NamedTuple):
    """What is kept of one picture of a row. hash: `perceptual_hash`; pixels: 64-bit digest of what was decoded."""

    size: Size
    num_bytes: int
    hash: int
    pixels: int
    brightness: float
    colourfulness: float


class Inspection(NamedTuple):
    """Of one row: everything found, and what is kept for comparing it with other rows."""

    findings: list[Finding]
    task: str | None = None
    num_tokens: int = 0
    prompt_digest: int = 0
    original: Picture | None = None
    edited: Picture | None = None


class _View(NamedTuple):
    pixels: np.ndarray  # uint8 RGB as decoded
    size: Size  # as stored


def inspect_row(
    original: object, edited: object, prompt: object, task: str | None = None, count_tokens: CountTokens | None = None
) -> Inspection:
    """Look at one row: two stored images (anything `decode_image` takes) and an instruction, or a list of them.

    task: the row's task where a column says it, else it is guessed from the instruction. Nothing is raised.
    """
    prompts = usable_prompts(prompt)
    findings, num_tokens = check_prompts(prompts, count_tokens)
    task = task or (guess_task(prompts[0]) if prompts else None)
    digest = short_digest("\n".join(prompts).strip().casefold().encode())
    views, pictures = [], []
    for what, value in (("original", original), ("edited", edited)):
        try:
            view = _View(*_decode(value, in_full=task in RESTORING))
            views.append(view)
            pictures.append(describe_picture(view.pixels, view.size, stored_bytes(value)))
            findings += check_picture(what, pictures[-1], view.pixels)
        except BadRow as error:
            findings.append(Finding("unreadable", f"{what} image: {error.reason}"))
            pictures.append(None)
    if len(views) == 2 and not any(finding.kind == "blank" for finding in findings):
        findings += check_pair(*views[0], *views[1], task)
    return Inspection(findings, task, num_tokens, digest, *pictures)


def check_prompts(prompts: list[str], count_tokens: CountTokens | None = None) -> tuple[list[Finding], int]:
    """Findings on the instructions of a row, and the tokens of the longest (by `count_tokens`, or estimated)."""
    if not prompts:
        return [Finding("no_prompt", "the instruction is empty")], 0
    findings, count = [], count_tokens or estimate_tokens
    num_tokens, longest = max((count(prompt), prompt) for prompt in prompts)
    if num_tokens > MAX_TOKENS:
        about = "" if count_tokens else "about "
        findings.append(Finding("long_prompt", f"{about}{num_tokens} tokens, {MAX_TOKENS} are read: {longest[:60]}..."))
    if direction := next(filter(mentions_direction, prompts), None):
        findings.append(Finding("direction", direction[:80]))
    return findings, num_tokens


def check_picture(what: str, picture: Picture, pixels: np.ndarray) -> list[Finding]:
    """Findings on one picture of a pair."""
    (height, width), findings = picture.size, []
    if pixels.reshape(-1, 3).std(axis=0).max() < BLANK_DEVIATION:
        colour = "#" + "".join(f"{round(value):02x}" for value in pixels.reshape(-1, 3).mean(axis=0))
        findings.append(Finding("blank", f"{what} image: all of one colour, {colour}"))
    if min(height, width) < TINY_SIDE:
        findings.append(Finding("tiny", f"{what} image: {width}x{height} pixels"))
    if height * width > HUGE_PIXELS or picture.num_bytes > HUGE_BYTES:
        megabytes = picture.num_bytes / 1e6
        findings.append(Finding("huge", f"{what} image: {width}x{height} pixels, {megabytes:.1f} MB"))
    return findings


def check_pair(
    original: np.ndarray, original_size: Size, edited: np.ndarray, edited_size: Size, task: str | None = None
) -> list[Finding]:
    """Findings on two decoded pictures, uint8 RGB (H, W, 3), with their sizes (h, w) as stored."""
    try:
        check_aspects(original_size, edited_size)
    except BadRow as error:
        return [Finding("aspect", error.reason)]
    findings = []
    if original_size != edited_size:
        sizes = " and ".join(f"{width}x{height}" for height, width in (original_size, edited_size))
        findings.append(Finding("size_differs", f"{sizes}: the edited one is brought to the original's size"))
    one, other = working_pair(original, edited)
    has_pixels = original.shape == edited.shape == (*original_size, 3)
    compared = (_crop(original), _crop(edited)) if has_pixels and task in RESTORING else (one, other)
    if unchanged := check_change(*compared, task):
        return [*findings, unchanged]
    if task in CLEANER and (has_pixels or not CLEANER[task].needs_pixels) and min(compared[0].shape[:2]) >= 16:
        findings += check_order(*compared, task)
    findings += check_alignment(one, other, original_size, task)
    return findings


def check_change(original: np.ndarray, edited: np.ndarray, task: str | None) -> Finding | None:
    """A finding where nothing was edited, unless the task is to leave the picture alone."""
    if task == "identity":
        return None
    likeness = measures.psnr(original, edited)
    if likeness == float("inf"):
        return Finding("identical", "the edited image is the original")
    least, most = NEAR_IDENTICAL_RESTORED if task in RESTORING else NEAR_IDENTICAL
    if likeness >= least and measures.largest_local_change(original, edited) <= most:
        return Finding("near_identical", f"{likeness:.1f} dB between the two images")
    return None


def check_order(original: np.ndarray, edited: np.ndarray, task: str) -> list[Finding]:
    """A finding where the edited picture of a restoring task is the worse one."""
    rule = CLEANER[task]
    measure = getattr(measures, rule.measure)
    pictures = [measures.to_gray(image) if rule.measure in GRAY_MEASURES else image for image in (original, edited)]
    before, after = (measure(picture) for picture in pictures)
    gained = rule.sign * float(np.log((after + rule.floor + 1e-6) / (before + rule.floor + 1e-6)))
    if gained > -rule.step:
        return []
    name = rule.measure.replace("_", " ")
    return [Finding("swapped", f"task {task}: the edited image is {rule.words} ({name} {before:.3g} -> {after:.3g})")]


def check_alignment(one: np.ndarray, other: np.ndarray, size: Size, task: str | None) -> list[Finding]:
    """A finding with the shift in pixels of the stored original, where moving the edited picture back fits better."""
    shift = measures.find_shift(measures.to_gray(one), measures.to_gray(other))
    if shift.length < MIN_SHIFT or shift.likeness < MIN_LIKENESS:
        return []
    if shift.gain < MIN_GAIN or shift.distinct < MIN_DISTINCT:
        return []
    if task == "deblur" and shift.length < MAX_SHAKE * max(one.shape):
        return []
    right, down = round(shift.x * size[1] / one.shape[1]), round(shift.y * size[0] / one.shape[0])
    ways = [(right, "to the right", "to the left"), (down, "down", "up")]
    words = " and ".join(f"{abs(step)} {ahead if step > 0 else back}" for step, ahead, back in ways if step)
    return [Finding("misaligned", f"the edited image is shifted by {words} (pixels)")]


def working_pair(original: np.ndarray, edited: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both pictures on one grid with a longer side of at most `WORKING_SIDE`."""
    height, width = original.shape[:2]
    scale = min(1.0, WORKING_SIDE / max(height, width))
    grid = max(8, round(width * scale)), max(8, round(height * scale))
    return tuple(_resize(image, grid) for image in (original, edited))


def describe_picture(pixels: np.ndarray, size: Size, num_bytes: int) -> Picture:
    """What is kept of a picture. pixels: uint8 RGB as decoded; size (h, w) as stored."""
    small = working_pair(pixels, pixels)[0]
    return Picture(
        size,
        num_bytes,
        measures.perceptual_hash(measures.to_gray(small)),
        short_digest(small.tobytes()),
        measures.brightness(small),
        measures.colourfulness(small),
    )


def short_digest(content: bytes) -> int:
    """64 bits of a digest."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def stored_bytes(value: object) -> int:
    """Bytes of a stored image; 0 where it is a file of its own."""
    content = value.get("bytes") if isinstance(value, dict) else value
    return len(content) if isinstance(content, (bytes, bytearray)) else 0


def _decode(value: object, in_full: bool) -> tuple[np.ndarray, Size]:
    image, size = decode_with_size(value, shorter_side=None if in_full else WORKING_SIDE // 2)
    return np.asarray(image), size


def _crop(image: np.ndarray) -> np.ndarray:
    """The middle at stored resolution, cut along the borders of JPEG's blocks."""
    top, left = (max(0, (side - WORKING_SIDE) // 16 * 8) for side in image.shape[:2])
    return np.ascontiguousarray(image[top : top + WORKING_SIDE, left : left + WORKING_SIDE])


def _resize(image: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    if image.shape[1::-1] == grid:
        return image
    shrinks = image.shape[1] > grid[0]
    return cv2.resize(image, grid, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
