"""The default cartoons: flat regions, smooth ink lines, and instructions that promise only what an image has."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from data_preparation.instructions import promises_outlines, read_phrasings
from data_preparation.photographs import centre_square, read_photograph
from data_preparation.tasks.cartoon import draw_cartoon
from data_preparation.tasks.flow import across_edges, edge_flow, smooth_along
from data_preparation.tasks.photograph_pairs import MAX_NO_INK, MIN_INK
from data_preparation.tasks.regions import find_regions
from tests.test_generate_dataset import generate
from utils.checks.image_measures import ink, to_gray

PHOTOS = Path(__file__).parent.parent / "assets" / "photos"
SUBJECTS = {
    "astronaut": "a face",
    "cat": "fur",
    "raccoon": "fur and leaves",
    "garden_2": "trees",
    "coffee": "an object",
}


def read_square(name: str, side: int) -> np.ndarray:
    return centre_square(read_photograph(PHOTOS / f"{name}.jpg"), side)


def flat_share(image: np.ndarray) -> float:
    return float((cv2.morphologyEx(to_gray(image), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) <= 2).mean())


def gray(value: int, side: int = 64) -> np.ndarray:
    return np.full((side, side, 3), value, np.uint8)


@pytest.fixture(scope="module")
def ring() -> np.ndarray:
    """A pale disc on gray with weak noise, uint8 RGB (256, 256, 3)"""
    image = gray(120, 256)
    cv2.circle(image, (128, 128), 80, (190, 180, 170), -1, cv2.LINE_AA)
    noise = np.random.default_rng(0).normal(0, 5, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("name", SUBJECTS)
def test_cartoons_are_flat_and_outlined(name):
    photograph = read_square(name, 256)
    inked, plain = draw_cartoon(photograph), draw_cartoon(photograph, has_ink=False)
    assert ink(photograph, inked) > 2 * MIN_INK and ink(photograph, plain) <= MAX_NO_INK
    assert flat_share(plain) > max(0.35, 1.5 * flat_share(photograph))
    saturation = [cv2.cvtColor(image, cv2.COLOR_RGB2HSV)[..., 1].mean() for image in (inked, photograph)]
    assert saturation[0] > saturation[1]
    # It still shows the same scene.
    small = [cv2.resize(to_gray(image), (32, 32), interpolation=cv2.INTER_AREA) for image in (inked, photograph)]
    assert np.corrcoef(small[0].ravel(), small[1].ravel())[0, 1] > 0.85


def test_cartoons_are_deterministic_and_alike_at_all_resolutions():
    cartoons = [draw_cartoon(read_square("astronaut", side)) for side in (256, 512)]
    assert np.array_equal(cartoons[0], draw_cartoon(read_square("astronaut", 256)))
    reduced = cv2.resize(cartoons[1], (256, 256), interpolation=cv2.INTER_AREA)
    difference = cv2.absdiff(*[cv2.GaussianBlur(image, (0, 0), 2) for image in (cartoons[0], reduced)])
    assert difference.mean() < 12


@pytest.mark.parametrize("value", [0, 128, 255])
def test_cartoon_of_a_uniform_image(value):
    cartoon = draw_cartoon(gray(value))
    assert np.ptp(cartoon) <= 2 and abs(int(cartoon[0, 0, 0]) - value) < 45


def test_a_small_strong_detail_is_kept_and_a_faint_gradient_is_not_outlined():
    image = np.repeat(np.linspace(150, 200, 256)[None, :, None], 256, axis=0).repeat(3, axis=2).astype(np.uint8)
    cv2.circle(image, (128, 128), 4, (30, 20, 20), -1, cv2.LINE_AA)
    cartoon = draw_cartoon(image)
    assert to_gray(cartoon)[128, 128] < 90
    lines = to_gray(cartoon) < to_gray(image) - 40
    lines[116:141, 116:141] = False
    assert not lines.any()


def test_ink_is_one_smooth_line_around_a_shape(ring):
    lines = to_gray(draw_cartoon(ring)) < 80
    rows, columns = np.nonzero(lines)
    distance, angle = np.hypot(rows - 128, columns - 128), np.arctan2(rows - 128, columns - 128)
    assert (np.abs(distance - 80) < 6).all(), "no specks"
    assert len(np.unique(np.round(angle * 18 / np.pi))) >= 35, "all around"
    assert cv2.connectedComponents(lines.astype(np.uint8))[0] == 2


def test_threshold_of_the_ink_is_relative_to_local_contrast():
    photograph = read_square("astronaut", 256)
    faint = np.clip(90 + 0.4 * (photograph.astype(np.float32) - 90), 0, 255).astype(np.uint8)
    strong, weak = (
        float((cartoon - plain < -25).mean()) for cartoon, plain in map(with_and_without, (photograph, faint))
    )
    assert weak > 0.6 * strong


def with_and_without(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return tuple(to_gray(draw_cartoon(image, has_ink)) for has_ink in (True, False))


def test_flow_follows_edges():
    image = np.zeros((40, 60, 3), np.float32)
    image[20:] = 50
    flow, coherence = edge_flow(image, 2)
    assert np.abs(flow[18:22, 5:-5, 0]).min() > 0.99 and coherence[18:22, 5:-5].min() > 0.95
    dashes = image[..., 0].copy()
    dashes[:, ::2] += 10
    smooth = smooth_along(np.dstack([dashes, dashes]), flow, 4, 1.0)[..., 0]
    assert np.ptp(smooth[19, 15:-15]) < 2 and smooth[21].mean() - smooth[18].mean() > 40, "along the edge, not across"
    darker = across_edges(image[..., 0], flow, 1.5)
    assert darker[19, 10:-10].min() > 0.5 and darker[20, 10:-10].max() < -0.5 and np.abs(darker[5]).max() < 0.01


def test_regions_of_shapes():
    lab = np.zeros((80, 80, 3), np.float32) + np.float32([40, 0, 0])
    cv2.circle(lab, (40, 40), 25, (70, 20, 10), -1)
    cv2.circle(lab, (32, 35), 3, (20, 0, 0), -1)  # an eye
    lab[..., 0] += np.random.default_rng(0).normal(0, 1, (80, 80)).astype(np.float32)
    labels, colours = find_regions(lab, np.ones((80, 80), np.float32), 110)
    assert len(colours) == 3 and labels.shape == (80, 80)
    assert colours[labels[40, 50]] == pytest.approx([70, 20, 10], abs=2)
    assert colours[labels[35, 32]] == pytest.approx([20, 0, 0], abs=4)
    assert len(find_regions(lab, np.ones((80, 80), np.float32), 1e6)[1]) < 3


# ---- instructions


def test_promises_of_phrasings():
    promises = {phrasing: promises_outlines(phrasing) for phrasing in read_phrasings("cartoonize", 0)[0]}
    assert promises["Give it bold ink outlines and flat colours"] is True
    assert promises["Cartoon in flat colours, without ink lines"] is False
    assert promises["Cartoonize"] is None and promises_outlines("Think of it as online pink") is None
    for phrasing, promise in promises.items():
        assert (promise is None) == (not any(word in phrasing.casefold() for word in (" ink", "outlin", "line"))), (
            phrasing
        )
        assert promise is not True or "no " not in phrasing
    assert list(promises.values()).count(True) >= 5 and list(promises.values()).count(False) >= 6


def test_outlines_are_promised_only_where_they_are(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.fromarray(read_square("cat", 96)).save(folder / "cat.png")
    sky = np.repeat(np.linspace(120, 200, 96)[:, None, None], 96, axis=1) + np.float32([-30, 0, 30])
    Image.fromarray(sky.astype(np.uint8)).save(folder / "sky.png")
    flags = ["--dataset_id", str(folder), "--task", "cartoonize", "--max_num_samples", "80", "--resolution", "96"]
    rows, promised = generate(tmp_path / "pairs", *flags), []
    for row in rows:
        promise, share = promises_outlines(row["edit_prompt"]), ink(row["original_image"], row["edited_image"])
        assert row["settings"]["ink"] or share <= MAX_NO_INK
        promised.append((row["source"], promise))
        assert share >= MIN_INK if promise else promise is None or share <= MAX_NO_INK
    assert {("cat.png", True), ("cat.png", False), ("cat.png", None), ("sky.png", False)} <= set(promised)
    assert ("sky.png", True) not in promised


def test_cartoons_without_a_fitting_instruction_are_rejected(tmp_path, capsys):
    """A teacher that draws no lines, and a file in which every phrasing promises them."""
    (tmp_path / "cartoonize.txt").write_text("Draw black outlines\nCartoonize it with ink lines\n")
    (tmp_path / "paint.py").write_text("def paint(image):\n    return image // 32 * 32\n")
    flags = ["--task", str(tmp_path / "cartoonize.txt"), "--teacher", f"python:{tmp_path / 'paint.py'}:paint"]
    with pytest.raises(SystemExit):
        generate(tmp_path / "pairs", *flags, "--heldout_phrasings", "0", "--max_num_samples", "4")
    assert "cartoon without the outlines of its instruction" in capsys.readouterr().err
