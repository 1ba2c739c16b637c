"""Checks of pairs: exact where possible, no false alarms on good pairs, independent of style."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_preparation.tasks.degradations import DEGRADATIONS
from data_preparation.toy_edits import EDITS
from tests.pairs import make_rows, make_source
from utils.checks import image_measures as measures
from utils.checks.findings import KINDS, Findings, printable, quick_check
from utils.checks.pair_inspection import RESTORATION_RULES, inspect_row
from utils.checks.prompt_checks import estimate_tokens, guess_task

PHOTOS = Path(__file__).resolve().parents[1] / "assets/photos"
NAMES = ("coffee", "city_1", "garden_2", "quay_3", "cat", "lobby_1", "rocket", "meadow_3")


def photograph(name: str, size: tuple[int, int] = (128, 128), top_left: tuple[int, int] = (0, 0)) -> np.ndarray:
    """A crop of `size` (h, w) of a photograph resized to 176 pixels high."""
    image = Image.open(PHOTOS / f"{name}.jpg").convert("RGB")
    image = image.resize((round(image.width * 176 / image.height), 176), Image.Resampling.LANCZOS)
    (top, left), (height, width) = top_left, size
    return np.ascontiguousarray(np.asarray(image)[top : top + height, left : left + width])


def encoded(pixels: np.ndarray, file_format: str = "PNG", **options) -> dict:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, file_format, **options)
    return {"bytes": content.getvalue(), "path": None}


def kinds_of(original: np.ndarray, edited: np.ndarray, prompt: str = "change it", task: str | None = None) -> list[str]:
    return [kind for kind, _ in inspect_row(encoded(original), encoded(edited), prompt, task).findings]


@pytest.mark.parametrize("task", EDITS)
@pytest.mark.parametrize("size", [(64, 64), (128, 120)])
def test_no_false_alarms_on_exact_edits(task, size):
    for name in NAMES:
        image = photograph(name, size)
        assert kinds_of(image, EDITS[task](image)) == [], name


@pytest.mark.parametrize("task", DEGRADATIONS)
def test_no_false_alarms_on_degradations(task):
    for seed, name in enumerate(NAMES):
        clean = photograph(name)
        degraded = DEGRADATIONS[task](clean, np.random.default_rng(seed))[0]
        assert kinds_of(degraded, clean, task=task) == [], name


@pytest.mark.parametrize("task", RESTORATION_RULES)
def test_swapped_restoration_pairs_are_found(task):
    found = 0
    for seed, name in enumerate(NAMES):
        clean = photograph(name)
        degraded = DEGRADATIONS[task](clean, np.random.default_rng(seed))[0]
        found += kinds_of(clean, degraded, task=task) == ["swapped"]
    assert found >= len(NAMES) * (0.6 if task in ("super_resolve", "derain") else 0.85)


@pytest.mark.parametrize("task", ["grayscale", "negative", "night", "thermal", "fog", "cartoonize", "sketch"])
@pytest.mark.parametrize("shift", [(5, 0), (-3, 4), (12, -9)])
def test_shifts_are_found_to_the_pixel_in_all_styles(task, shift):
    x, y = shift
    found = 0
    for name in NAMES:
        original = photograph(name, (128, 128), (20, 20))
        edited = EDITS[task](photograph(name, (128, 128), (20 - y, 20 - x)))
        shift_found = measures.find_shift(measures.to_gray(original), measures.to_gray(edited))
        is_found = "misaligned" in kinds_of(original, edited)
        assert not is_found or max(abs(shift_found.x - x), abs(shift_found.y - y)) <= 1, (name, shift_found)
        found += is_found
    # Along straight edges, and under strong ink lines, a shift cannot be determined and is not reported.
    assert found >= len(NAMES) - (4 if task in ("cartoonize", "sketch") else 2)


def test_shifts_of_large_images_are_reported_in_stored_pixels():
    big = np.asarray(Image.fromarray(photograph("coffee", (176, 176))).resize((900, 900), Image.Resampling.LANCZOS))
    findings = inspect_row(encoded(big[50:850, 50:850]), encoded(255 - big[50:850, 29:829]), "negative").findings
    assert [kind for kind, _ in findings] == ["misaligned"]
    assert findings[0].detail.endswith("to the right (pixels)")
    assert abs(int(findings[0].detail.split()[-5]) - 21) <= 1


def test_unrelated_images_have_no_shift():
    for one, other in zip(NAMES, NAMES[1:], strict=False):
        assert kinds_of(photograph(one), photograph(other)) == []


def test_unedited_pairs_are_found_despite_compression_and_small_edits_are_not():
    image = photograph("coffee")
    assert kinds_of(image, image) == ["identical"]
    assert kinds_of(image, image, task="identity") == []
    assert kinds_of(image, image, "Do nothing") == []
    again = np.asarray(Image.open(io.BytesIO(encoded(image, "JPEG", quality=93)["bytes"])))
    assert kinds_of(image, again) == ["near_identical"]
    small_edit = image.copy()
    small_edit[40:50, 40:50] = (250, 20, 20)
    assert kinds_of(image, small_edit) == []


def test_unusable_images():
    good = encoded(photograph("coffee"))
    cut = {"bytes": good["bytes"][:2000], "path": None}
    cases = {
        "unreadable": (good, cut),
        "blank": (good, encoded(np.zeros((128, 128, 3), np.uint8))),
        "aspect": (good, encoded(photograph("coffee", (128, 100)))),
    }
    for kind, pair in cases.items():
        assert [found for found, _ in inspect_row(*pair, "change it").findings] == [kind]
    small = photograph("coffee", (32, 32))
    assert set(kinds_of(small, 255 - small)) == {"tiny"}
    assert "size_differs" in kinds_of(photograph("cat"), 255 - photograph("cat")[::2, ::2])
    assert inspect_row(None, None, None).original is None


@pytest.mark.parametrize("size", [(8, 8), (9, 900), (1500, 20), (16, 17), (50, 1000), (23, 24)])
def test_extreme_sizes_are_checked_without_warnings(size, recwarn):
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    for task in (None, *RESTORATION_RULES):
        assert "unreadable" not in kinds_of(noise, 255 - noise, task=task)
    assert not recwarn.list


def test_instructions():
    image = photograph("coffee")
    edited = 255 - image
    assert (
        kinds_of(image, edited, "") == kinds_of(image, edited, None) == kinds_of(image, edited, [" "]) == ["no_prompt"]
    )
    assert kinds_of(image, edited, "move the cup to the left") == ["direction"]
    assert kinds_of(image, edited, "a bright red car, " * 20) == ["long_prompt"]
    assert kinds_of(image, edited, ["make it red", "a bright red car, " * 20]) == ["long_prompt"]
    assert estimate_tokens("Make it winter, 2024!") == 2 + 3 + 1 + 4 + 1
    assert guess_task("Please denoise this photo") == "denoise" and guess_task("remove the rain") == "derain"
    assert guess_task("Get rid of the grain") == "denoise" and guess_task("Reduce the compression noise") == "jpeg"
    assert guess_task("Keep the image unchanged") == "identity"
    assert guess_task("add noise") is None and guess_task("make it rain") is None


def test_hashes_survive_resizing_and_compression():
    grays = {name: measures.to_gray(photograph(name, (176, 240))) for name in NAMES}
    hashes = {name: measures.perceptual_hash(gray) for name, gray in grays.items()}
    for name, value in hashes.items():
        image = Image.fromarray(photograph(name, (176, 240))).resize((120, 88), Image.Resampling.BICUBIC)
        again = Image.open(io.BytesIO(encoded(np.asarray(image), "JPEG", quality=50)["bytes"]))
        other = measures.perceptual_hash(measures.to_gray(np.asarray(again)))
        assert (value ^ other).bit_count() <= 4
        assert all((value ^ different).bit_count() > 14 for key, different in hashes.items() if key != name)
    assert measures.perceptual_hash(np.full((64, 64), 80, np.float32)) == 0


def test_findings_keep_all_rows_and_the_worst_kind():
    findings = Findings()
    for kind, row in (("tiny", 3), ("identical", 1), ("tiny", 3), ("swapped", 1), ("swapped", 2)):
        findings.add(kind, row, f"words on {row}")
    assert list(findings.kinds()) == ["identical", "swapped", "tiny"] and findings.count("tiny") == 1
    assert findings.details["tiny"][3] == "words on 3; words on 3"
    assert findings.dropped() == {1: "identical", 2: "swapped"} and findings.dropped({"swapped"}) == {1: "identical"}
    assert printable("a\x1b[31m\nb") == "a [31m b"
    assert all(kind.severity in ("error", "warning", "info") for kind in KINDS.values())


def test_quick_check_names_rows_and_reports_no_infos():
    rows = make_rows(6)
    source = make_source(6, edited_image={4: rows["original_image"][4]}, edit_prompt={1: "left", 2: ""})
    lines = quick_check([source], seed=0)
    assert lines[0].startswith("a quick check of 6 rows found") and "left" not in "".join(lines)
    assert any("train[4]: the edited image is the original" in line for line in lines)
    assert any("no instruction: 1 row, such as train[2]" in line for line in lines)
    big = [encoded(photograph(name)) for name in NAMES]
    good = make_source(
        8,
        original_image=dict(enumerate(big)),
        edited_image=dict(enumerate(encoded(255 - photograph(name)) for name in NAMES)),
    )
    assert quick_check([good, good], seed=0) == ["a quick check of 16 rows found no problems"]
    assert quick_check([good], seed=0, max_seconds=0) == ["a quick check of 1 rows found no problems"]
