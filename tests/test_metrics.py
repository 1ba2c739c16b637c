"""Each score of an evaluation against an independent computation, and at its edges."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPSegForImageSegmentation, CLIPTokenizer, ViTImageProcessor, ViTModel

from evaluation.feature_metrics import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    cmmd,
    direction_similarity,
    load_image_encoder,
    load_image_text_encoder,
)
from evaluation.mask_model import load_mask_model
from evaluation.samples import DatasetOptions, Sample, open_samples
from evaluation.scoring import Scorer
from evaluation.statistics import area_under_front, bootstrap_mean, find_front, summarize
from tests.encoders import SIDE, save_clip, save_clipseg, save_dino
from tests.pairs import make_image
from utils.errors import InputError
from utils.pixel_metrics import MAX_PSNR, changed_area, pixel_scores, same_size, ssim

RNG = np.random.default_rng(0)


def noise(height: int, width: int) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dino(tmp_path_factory.mktemp("dino"))


def plain_ssim(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """SSIM of every window, by the sums of the paper, one window after the other."""
    offsets = np.arange(11) - 5
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    first, second = first / 255, second / 255
    values = np.empty((first.shape[0] - 10, first.shape[1] - 10, 3))
    for y, x, c in itertools.product(*map(range, values.shape)):
        a, b = first[y : y + 11, x : x + 11, c], second[y : y + 11, x : x + 11, c]
        mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
        var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
        covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
        numerator = (2 * mean_a * mean_b + 0.01**2) * (2 * covariance + 0.03**2)
        values[y, x, c] = numerator / ((mean_a**2 + mean_b**2 + 0.01**2) * (var_a + var_b + 0.03**2))
    return values


def test_pixel_scores_equal_plain_sums():
    first = noise(20, 17)
    second = np.clip(first.astype(int) + RNG.integers(-40, 40, first.shape), 0, 255).astype(np.uint8)
    mask = np.zeros((20, 17), bool)
    mask[4:15, 3:9] = True
    windows = plain_ssim(first, second)
    for area, inner in ((None, np.ones((10, 7), bool)), (mask, mask[5:-5, 5:-5])):
        scores = pixel_scores(first, second, area)
        chosen = np.ones((20, 17), bool) if area is None else area
        difference = (first[chosen] / 255 - second[chosen] / 255).ravel()
        squares = math.fsum(d * d for d in difference) / len(difference)
        assert scores["l1"] == pytest.approx(math.fsum(map(abs, difference)) / len(difference))
        assert scores["l2"] == pytest.approx(squares)
        assert scores["psnr"] == pytest.approx(10 * math.log10(1 / squares))
        assert scores["ssim"] == pytest.approx(windows[inner].mean())


def test_pixel_scores_at_their_edges():
    image, black, white = noise(24, 24), np.zeros((24, 24, 3), np.uint8), np.full((24, 24, 3), 255, np.uint8)
    assert pixel_scores(image, image) == {"l1": 0, "l2": 0, "psnr": MAX_PSNR, "ssim": pytest.approx(1)}
    assert pixel_scores(black, black)["ssim"] == pytest.approx(1)
    opposite = pixel_scores(black, white)
    assert (opposite["l1"], opposite["l2"], opposite["psnr"]) == (1, 1, 0)
    assert opposite["ssim"] == pytest.approx(0.01**2 / (1 + 0.01**2))
    assert all(math.isnan(value) for value in pixel_scores(image, black, np.zeros((24, 24), bool)).values())
    assert math.isnan(ssim(image[:8], black[:8]))  # smaller than a window
    larger = np.asarray(Image.fromarray(image).resize((48, 48), Image.Resampling.BICUBIC))
    assert same_size(larger, image).shape == image.shape and pixel_scores(larger, image)["psnr"] > 20
    changed = image.copy()
    changed[3:5, 7] ^= 255
    assert changed_area(image, changed).sum() == 2 and not changed_area(image, image).any()


def test_clip_similarities_equal_the_model_used_by_hand(clip):
    encoder, model = load_image_text_encoder(str(clip), "cpu"), CLIPModel.from_pretrained(clip)
    tokenizer = CLIPTokenizer.from_pretrained(clip)
    images, texts = [make_image(index, (50, 40 + index)) for index in range(2)], ["a cat", "a cat in the snow " * 40]
    pixels = []
    for image in images:  # the shorter side to the model's, bicubic, and the centre
        scale = SIDE / min(image.size)
        size = [round(side * scale) for side in image.size]
        left, top = ((side - SIDE) // 2 for side in size)
        crop = image.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + SIDE, top + SIDE))
        mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
        pixels.append(((np.asarray(crop) / 255 - mean) / std).transpose(2, 0, 1))
    with torch.no_grad():
        vision = model.vision_model(torch.tensor(np.array(pixels), dtype=torch.float32)).pooler_output
        expected_images = model.visual_projection(vision)
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=77, return_tensors="pt")
        expected_texts = model.text_projection(model.text_model(**tokens).pooler_output)
    found = encoder.encode_images(images), encoder.encode_texts(texts)
    for features, expected in zip(found, (expected_images, expected_texts), strict=True):
        torch.testing.assert_close(features, expected / expected.norm(dim=-1, keepdim=True), rtol=0, atol=0.02)
    image_change, text_change = ((pair[1] - pair[0]).double().numpy() for pair in found)
    cosine = image_change @ text_change / np.linalg.norm(image_change) / np.linalg.norm(text_change)
    assert float(direction_similarity(found[0][None], found[1][None])) == pytest.approx(cosine, abs=1e-6)
    unchanged = found[0][:1].repeat(2, 1)[None]
    assert float(direction_similarity(unchanged, found[1][None])) == 0


def test_legacy_preprocessing_has_the_faults_of_the_original(clip):
    """Squashed without antialiasing, and [-1, 1] normalised as if it were [0, 1]."""
    encoder, image = load_image_text_encoder(str(clip), "cpu", legacy=True), make_image(1, (64, 48))
    values = torch.tensor(np.asarray(image) / 255 * 2 - 1, dtype=torch.float32).permute(2, 0, 1)[None]
    squashed = torch.nn.functional.interpolate(values, size=(SIDE, SIDE), mode="bicubic", align_corners=False)
    mean, std = (
        [[[[m]] for m in row]] for row in ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    )
    pixels = (squashed - torch.tensor(mean)) / torch.tensor(std)
    assert squashed.min() < 0
    with torch.no_grad():
        model = encoder.model
        expected = model.visual_projection(model.vision_model(pixels).pooler_output)
    torch.testing.assert_close(encoder.encode_images([image]), expected / expected.norm(dim=-1, keepdim=True))


def test_dino_similarity_equals_the_model_used_by_hand(dino):
    encoder, images = load_image_encoder(str(dino), "cpu"), [make_image(index, (60, 45)) for index in range(2)]
    processor = ViTImageProcessor(size={"height": 37, "width": 49}, resample=3)
    resized = [image.resize((37, 49), Image.Resampling.BICUBIC) for image in images]
    centre = [image.crop((2, 8, 2 + SIDE, 8 + SIDE)) for image in resized]
    settings = dict(do_resize=False, image_mean=(0.485, 0.456, 0.406), image_std=(0.229, 0.224, 0.225))
    with torch.no_grad():
        pixels = processor(centre, return_tensors="pt", **settings).pixel_values
        expected = ViTModel.from_pretrained(dino)(pixels).last_hidden_state[:, 0]
    found = encoder.encode_images(images)
    torch.testing.assert_close(found, expected / expected.norm(dim=-1, keepdim=True), rtol=0, atol=1e-5)


def test_cmmd_equals_the_plain_sums():
    first, second = (torch.nn.functional.normalize(torch.randn(count, 8), dim=-1) for count in (5, 7))

    def kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        pairs = itertools.product(a.double(), b.double())
        return math.fsum(math.exp(-float(((x - y) ** 2).sum()) / 200) for x, y in pairs) / len(a) / len(b)

    expected = 1000 * (kernel(first, first) + kernel(second, second) - 2 * kernel(first, second))
    assert cmmd(first, second) == pytest.approx(expected, rel=1e-6)
    assert cmmd(first, first) == pytest.approx(0, abs=1e-9) and cmmd(first, second) > 0


def test_means_and_fronts():
    values = [*RNG.normal(3, 1, 200).tolist(), float("nan"), None]
    mean = bootstrap_mean(values)
    assert mean == bootstrap_mean(values) and mean.count == 200
    half = 1.96 * np.std(values[:200]) / math.sqrt(200)
    assert mean.low == pytest.approx(mean.value - half, abs=0.03) and mean.high == pytest.approx(
        mean.value + half, abs=0.03
    )
    assert math.isnan(bootstrap_mean([]).value) and summarize([{"a": 1.0}, {"b": float("nan")}]).keys() == {"a"}
    points = [(0.1, 0.9), (0.2, 0.8), (0.15, 0.5), (0.3, 0.2), (0.0, 1.0)]
    assert [points[index] for index in find_front(points)] == [(0.3, 0.2), (0.2, 0.8), (0.1, 0.9), (0.0, 1.0)]
    grid = (np.arange(1000) + 0.5) / 1000
    covered = np.any([(grid[:, None] < x) & (grid[None] < y) for x, y in points], axis=0).mean()
    assert area_under_front(points) == pytest.approx(covered, abs=2e-3)
    assert area_under_front([(0.0, 1.0)]) == area_under_front([(-0.5, 0.5)]) == 0


def save_samples(folder: Path) -> Path:
    """Four rows with captions and masks: of MagicBrush's kind, transparent where the edit belongs, and white ones."""
    images = [make_image(index, (48, 40)) for index in range(4)]
    edited, masks = [], []
    for index, image in enumerate(images):
        changed, mask = image.copy(), Image.new("L", image.size)
        changed.paste((255, 0, 0), (8, 8, 24, 24))
        mask.paste(255, (8, 8, 24, 24))
        if index % 2:
            transparent = image.convert("RGBA")
            transparent.putalpha(Image.eval(mask, lambda value: 255 - value))
            mask = transparent
        edited.append(changed)
        masks.append(mask)
    captions = [f"photo {index}" for index in range(4)]
    rows = dict(
        original_image=images, edit_prompt=["add red"] * 4, edited_image=edited, mask=masks, original_prompt=captions
    )
    rows["edited_prompt"] = [*(f"{caption}, red" for caption in captions[:3]), captions[3]]
    dataset = datasets.Dataset.from_dict(rows)
    for column in ("original_image", "edited_image", "mask"):
        dataset = dataset.cast_column(column, datasets.Image())
    dataset.save_to_disk(str(folder))
    return folder


def test_all_scores_of_a_sample(clip, dino, tmp_path):
    samples = open_samples(DatasetOptions(str(save_samples(tmp_path / "data"))))
    assert [int(sample.mask.sum()) for sample in samples] == [256] * 4
    scorer = Scorer(load_image_text_encoder(str(clip), "cpu"), load_image_encoder(str(dino), "cpu"))
    perfect, discrepancy = scorer.score(samples, [sample.edited for sample in samples])
    copied, larger = scorer.score(samples, [sample.original for sample in samples])
    assert discrepancy == pytest.approx(0, abs=1e-6) and larger > 0
    for best, copy in zip(perfect, copied, strict=True):
        assert best["l1"] == best["inside_l1"] == best["outside_l1"] == copy["outside_l1"] == copy["source_l1"] == 0
        assert [best[name] for name in ("ssim", "clip_target", "dino_target")] == pytest.approx([1, 1, 1])
        assert copy["clip_image"] == pytest.approx(1)
        assert copy["inside_l1"] > copy["l1"] > 0 and best["source_l1"] > 0
    assert [row.get("clip_direction") is not None for row in copied] == [True] * 3 + [False]  # equal captions: none
    assert copied[0]["clip_direction"] == 0


def test_samples_of_other_datasets(tmp_path):
    folder = str(save_samples(tmp_path / "data"))
    columns = dict(original_image_column="original_image", edit_prompt_column="edit_prompt")
    samples = open_samples(DatasetOptions(folder, edited_image_column="none", **columns, num_samples=2, seed=1))
    assert len(samples) == 2 and samples[0].edited is None
    exact = open_samples(DatasetOptions(folder, mask_column="exact"))
    assert all((sample.mask == (sample.pixels != sample.target_pixels).any(axis=2)).mean() > 0.9 for sample in exact)
    assert [sample.mask[8:24, 8:24].mean() > 0.9 and sample.mask.sum() <= 256 for sample in exact] == [True] * 4
    with pytest.raises(InputError, match="--mask_column exact compares"):
        open_samples(DatasetOptions(folder, edited_image_column="none", **columns, mask_column="exact"))
    with pytest.raises(InputError, match="--mask_column area"):
        open_samples(DatasetOptions(folder, mask_column="area"))
    with pytest.raises(InputError, match="--original_image_column None"):
        open_samples(DatasetOptions(folder, edited_image_column="none"))


def test_a_segmentation_model_finds_masks(tmp_path):
    """Its processor and the model used by hand find the same; a mask of the dataset takes precedence."""
    folder, image = save_clipseg(tmp_path / "clipseg"), make_image(3, (48, 40))
    masks = load_mask_model(str(folder), "cpu")
    settings = dict(size={"height": SIDE, "width": SIDE}, resample=3, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)
    pixels = ViTImageProcessor(**settings)([image], return_tensors="pt").pixel_values
    tokens = CLIPTokenizer.from_pretrained(folder)(["the sky"], return_tensors="pt")
    with torch.no_grad():
        logits = CLIPSegForImageSegmentation.from_pretrained(folder)(pixel_values=pixels, **tokens).logits
    expected = np.asarray(
        Image.fromarray(logits.reshape(SIDE, SIDE).numpy()).resize(image.size, Image.Resampling.BILINEAR)
    )
    found = masks.find(image, "the sky")
    assert found.shape == (48, 40) and (found == (expected >= 0)).mean() > 0.95
    sample = Sample(0, image, "the sky", image)
    area = np.zeros((48, 40), bool)
    changed = Image.fromarray(np.where(found[..., None], 0, np.asarray(image)))
    rows = Scorer(mask_model=masks).score([sample, replace(sample, mask=area)], [changed, changed])[0]
    assert 0 < found.mean() < 1 and rows[0]["outside_l1"] == 0 < rows[0]["inside_l1"]
    assert rows[1]["outside_l1"] == rows[1]["source_l1"]


@pytest.mark.parametrize("load", [load_image_text_encoder, load_image_encoder, load_mask_model])
def test_encoders_that_do_not_load(load, tmp_path):
    with pytest.raises(InputError, match="_model .*give the folder or Hub id of"):
        load(str(tmp_path), "cpu")
