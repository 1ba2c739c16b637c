"""Checks of one pair, used by data_preparation/check_dataset.py on all rows and by `--dry_run` on some.

A finding is a hint from the pixels alone, tuned to report nothing when in doubt: docs/checking.md explains each one.
"""

from typing import NamedTuple

import cv2
import numpy as np
import xxhash

from utils.checks import image_measures as measures
from utils.checks.prompt_checks import MAX_TOKENS, CountTokens, estimate_tokens, guess_task
from utils.data.columns import usable_prompts
from utils.data.geometry import Size, check_aspects, mentions_direction
from utils.pixels import BadRow, decode, num_frames

WORKING_SIDE = 384  # longer side at which images are compared
ALIGNMENT_SIDE = 256  # at which shifts are measured
TINY_SIDE, HUGE_PIXELS, HUGE_BYTES = 64, 50_000_000, 25_000_000
BLANK_DEVIATION = 1.0
# Nothing is edited from this PSNR in dB, if no tile of 1/16 of the sides changed by more than this (of 255).
NEAR_IDENTICAL, NEAR_IDENTICAL_RESTORATION = (35.0, 4.0), (48.0, 4.0)
MIN_SHIFT, MIN_CORRELATION, MIN_GAIN, MIN_DISTINCTNESS = 1.0, 0.5, 0.05, 0.04
MAX_SHAKE = 0.08  # of the longer side: camera shake also shifts the image


class RestorationRule(NamedTuple):
    """How to tell that the images of a restoration task are swapped."""

    measure: str
    sign: int  # 1: the restored image has more of it
    min_step: float  # of the measure's logarithm
    offset: float  # added to the measure
    comparison: str  # what the edited image is compared with the original, if swapped
    needs_full_size: bool  # resampling would change the measure


RESTORATION_RULES = {
    "denoise": RestorationRule("noise_level", -1, 0.2, 0.3, "noisier", True),
    "deblur": RestorationRule("sharpness", 1, 0.15, 0.0, "less sharp", True),
    "sharpen": RestorationRule("sharpness", 1, 0.15, 0.0, "less sharp", True),
    "super_resolve": RestorationRule("sharpness", 1, 0.3, 0.0, "less sharp", True),
    "jpeg": RestorationRule("blockiness", -1, 0.15, 0.0, "more blocky", True),
    "dehaze": RestorationRule("veil", -1, 0.15, 3.0, "hazier", False),
    "derain": RestorationRule("veil", -1, 0.1, 3.0, "more veiled by rain", False),
    "low_light": RestorationRule("brightness", 1, 0.2, 3.0, "darker", False),
    "colorize": RestorationRule("colourfulness", 1, 0.5, 2.0, "less colourful", False),
}
GRAY_MEASURES = ("noise_level", "sharpness", "blockiness")
RESTORATION_TASKS = {*RESTORATION_RULES, "raindrop"}


class Finding(NamedTuple):
    """kind: a key of `utils.checks.findings.KINDS`."""

    kind: str
    detail: str


class ImageSummary(NamedTuple):
    """What is kept of an image to compare it with other rows. hash: perceptual; pixels: 64-bit digest of the pixels."""

    size: Size
    num_bytes: int
    hash: int
    pixels: int
    brightness: float
    colourfulness: float


class Inspection(NamedTuple):
    """All findings on one row, and what is kept to compare it with other rows; an unreadable image is None."""

    findings: list[Finding]
    task: str | None
    num_tokens: int
    prompt_digest: int
    original: ImageSummary | None
    edited: ImageSummary | None


def inspect_row(
    original: object, edited: object, prompt: object, task: str | None = None, count_tokens: CountTokens | None = None
) -> Inspection:
    """Check one row: two stored images (anything `decode_image` accepts) and an instruction or a list of them.

    task: by default guessed from the instruction. Never raises BadRow.
    """
    prompts = usable_prompts(prompt)
    findings, num_tokens = check_prompts(prompts, count_tokens)
    task = task or (guess_task(prompts[0]) if prompts else None)
    decoded, summaries = [], []  # decoded: uint8 RGB (H, W, 3) and the stored size (h, w)
    working: list[np.ndarray] = []  # the decoded images at working size, each at that of its own size
    for name, value in (("original", original), ("edited", edited)):
        try:
            shorter_side = None if task in RESTORATION_TASKS else WORKING_SIDE // 2
            image = decode(value, shorter_side=shorter_side)
        except BadRow as error:
            findings.append(Finding("unreadable", f"{name} image: {error.reason}"))
            summaries.append(None)
            continue
        if (count := num_frames(value)) > 1:
            findings.append(Finding("animated", f"{name} image: {count} frames or pages"))
        if image.alpha is not None:
            findings.append(Finding("transparent", f"{name} image"))
        pixels = np.asarray(image.rgb)
        decoded.append((pixels, image.stored_size))
        working.append(_resize(pixels, _working_size(pixels)))
        summaries.append(_summarize(working[-1], image.stored_size, value))
        findings += check_image(name, summaries[-1], pixels)
    if len(decoded) == 2 and not any(finding.kind == "blank" for finding in findings):
        is_aligned = working[0].shape == working[1].shape
        findings += check_pair(*decoded[0], *decoded[1], task, tuple(working) if is_aligned else None)
    digest = _short_digest("\n".join(prompts).strip().casefold().encode())
    return Inspection(findings, task, num_tokens, digest, *summaries)


def check_prompts(prompts: list[str], count_tokens: CountTokens | None = None) -> tuple[list[Finding], int]:
    """Findings on the instructions of a row, and the number of tokens of the longest (by default an estimate)."""
    if not prompts:
        return [Finding("no_prompt", "the instruction is empty")], 0
    findings, count = [], count_tokens or estimate_tokens
    num_tokens, longest = max((count(prompt), prompt) for prompt in prompts)
    if num_tokens > MAX_TOKENS:
        about = "" if count_tokens else "about "
        findings.append(Finding("long_prompt", f"{about}{num_tokens} of {MAX_TOKENS} tokens: {longest[:60]}..."))
    if direction := next(filter(mentions_direction, prompts), None):
        findings.append(Finding("direction", direction[:80]))
    return findings, num_tokens


def check_image(name: str, summary: ImageSummary, pixels: np.ndarray) -> list[Finding]:
    """Findings on one image of a pair."""
    (height, width), findings = summary.size, []
    mean, deviation = measures.mean_and_deviation(pixels)
    if deviation.max() < BLANK_DEVIATION:
        colour = "#" + "".join(f"{round(value):02x}" for value in mean)
        findings.append(Finding("blank", f"{name} image: only the colour {colour}"))
    if min(height, width) < TINY_SIDE:
        findings.append(Finding("tiny", f"{name} image: {width}x{height} pixels"))
    if height * width > HUGE_PIXELS or summary.num_bytes > HUGE_BYTES:
        megabytes = summary.num_bytes / 1e6
        findings.append(Finding("huge", f"{name} image: {width}x{height} pixels, {megabytes:.1f} MB"))
    return findings


def check_pair(
    original: np.ndarray,
    original_size: Size,
    edited: np.ndarray,
    edited_size: Size,
    task: str | None = None,
    working: tuple[np.ndarray, np.ndarray] | None = None,
) -> list[Finding]:
    """Findings on two decoded images, uint8 RGB (H, W, 3), with their stored sizes (h, w).

    working: `working_pair` of them, where it is known.
    """
    try:
        check_aspects(original_size, edited_size)
    except BadRow as error:
        return [Finding("aspect", error.reason)]
    findings = []
    if original_size != edited_size:
        sizes = " and ".join(f"{width}x{height}" for height, width in (original_size, edited_size))
        findings.append(Finding("size_differs", f"{sizes}: training resizes the edited image to the original's size"))
    one, other = working or working_pair(original, edited)
    is_full_size = original.shape == edited.shape == (*original_size, 3)
    compared = (_crop(original), _crop(edited)) if is_full_size and task in RESTORATION_TASKS else (one, other)
    if unchanged := _check_change(*compared, task):
        return [*findings, unchanged]
    rule = RESTORATION_RULES.get(task)
    if rule and (is_full_size or not rule.needs_full_size) and min(compared[0].shape[:2]) >= 16:
        findings += _check_order(*compared, task)
    return findings + _check_alignment(one, other, original_size, task)


def _check_change(original: np.ndarray, edited: np.ndarray, task: str | None) -> Finding | None:
    """A finding if nothing was edited, unless that is the task."""
    if task == "identity":
        return None
    psnr = measures.psnr(original, edited)
    if psnr == float("inf"):
        return Finding("identical", "the edited image is the original")
    min_psnr, max_change = NEAR_IDENTICAL_RESTORATION if task in RESTORATION_TASKS else NEAR_IDENTICAL
    if psnr >= min_psnr and measures.largest_local_change(original, edited) <= max_change:
        return Finding("near_identical", f"{psnr:.1f} dB between the two images")
    return None


def _check_order(original: np.ndarray, edited: np.ndarray, task: str) -> list[Finding]:
    """A finding if the edited image of a restoration task is the degraded one."""
    rule = RESTORATION_RULES[task]
    measure = getattr(measures, rule.measure)
    images = [measures.to_gray(image) if rule.measure in GRAY_MEASURES else image for image in (original, edited)]
    before, after = (measure(image) for image in images)
    gained = rule.sign * float(np.log((after + rule.offset + 1e-6) / (before + rule.offset + 1e-6)))
    if gained > -rule.min_step:
        return []
    values = f"{rule.measure.replace('_', ' ')} {before:.3g} -> {after:.3g}"
    return [Finding("swapped", f"task {task}: the edited image is {rule.comparison} ({values})")]


def _check_alignment(one: np.ndarray, other: np.ndarray, size: Size, task: str | None) -> list[Finding]:
    """A finding if shifting the edited image back fits better; the detail is in pixels of the stored original."""
    one, other = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in (one, other))
    one, other = (_resize(image, _working_size(image, ALIGNMENT_SIDE)).astype(np.float32) for image in (one, other))
    shift = measures.find_shift(one, other)
    is_shift = shift.length >= MIN_SHIFT and shift.correlation >= MIN_CORRELATION
    is_certain = shift.gain >= MIN_GAIN and shift.distinctness >= MIN_DISTINCTNESS
    if not (is_shift and is_certain) or (task == "deblur" and shift.length < MAX_SHAKE * max(one.shape)):
        return []
    right, down = round(shift.x * size[1] / one.shape[1]), round(shift.y * size[0] / one.shape[0])
    directions = [(right, "to the right", "to the left"), (down, "down", "up")]
    words = " and ".join(f"{abs(step)} {ahead if step > 0 else back}" for step, ahead, back in directions if step)
    return [Finding("misaligned", f"the edited image is shifted by {words} (pixels)")]


def working_pair(original: np.ndarray, edited: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both images resized to one size, with a longer side of at most `WORKING_SIDE`."""
    size = _working_size(original)
    return _resize(original, size), _resize(edited, size)


def _working_size(image: np.ndarray, longer_side: int = WORKING_SIDE) -> tuple[int, int]:
    """(width, height)."""
    height, width = image.shape[:2]
    scale = min(1.0, longer_side / max(height, width))
    return max(8, round(width * scale)), max(8, round(height * scale))


def _resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize to (width, height)."""
    if image.shape[1::-1] == size:
        return image
    factor = image.shape[1] / size[0]
    # Up to a factor of 2, linear interpolation uses every pixel, too, and takes a quarter of the time.
    method = cv2.INTER_CUBIC if factor < 1 else cv2.INTER_LINEAR if factor < 2 else cv2.INTER_AREA
    return cv2.resize(image, size, interpolation=method)


def _summarize(small: np.ndarray, size: Size, value: object) -> ImageSummary:
    """small: uint8 RGB at working size; size (h, w) and value as stored."""
    content = value.get("bytes") if isinstance(value, dict) else value
    num_bytes = len(content) if isinstance(content, (bytes, bytearray)) else 0  # 0: a file of its own
    image_hash = measures.perceptual_hash(measures.to_gray(small))
    colours = measures.brightness(small), measures.colourfulness(small)
    return ImageSummary(size, num_bytes, image_hash, _short_digest(small.tobytes()), *colours)


def _short_digest(content: bytes) -> int:
    """A digest of 64 bits."""
    return xxhash.xxh3_64_intdigest(content)


def _crop(image: np.ndarray) -> np.ndarray:
    """The centre at stored resolution, cropped along JPEG's 8x8 blocks."""
    top, left = (max(0, (side - WORKING_SIDE) // 16 * 8) for side in image.shape[:2])
    return np.ascontiguousarray(image[top : top + WORKING_SIDE, left : left + WORKING_SIDE])
