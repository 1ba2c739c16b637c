"""Guidance against the formula of the paper, in float64."""

import pytest
import torch

from utils.editing.guidance import BRANCHES, batch_coefficients, branch_coefficients, combine

SETTINGS = [(7.5, 1.5), (7.5, 1.0), (1.5, 1.5), (1.0, 1.0), (1.0, 1.5), (0.0, 1.5), (5.0, 0.5), (0.0, 0.0), (0.0, 1.0)]


@pytest.mark.parametrize(("text_scale", "image_scale"), SETTINGS)
def test_equals_equation_3(text_scale: float, image_scale: float) -> None:
    """With fewer branches the result is that of the three-branch formula."""
    generator = torch.Generator().manual_seed(0)
    parts = {name: torch.randn(3, 4, 5, 6, generator=generator, dtype=torch.float64) for name in ("t", "i", "u")}
    expected = parts["u"] + image_scale * (parts["i"] - parts["u"]) + text_scale * (parts["t"] - parts["i"])

    coefficients = branch_coefficients(text_scale, image_scale)
    combined = combine(torch.cat([parts[branch[0]] for branch in coefficients]), coefficients)

    assert combined.dtype == torch.float64
    torch.testing.assert_close(combined, expected, rtol=0, atol=1e-13)
    assert sum(coefficients.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("text_scale", "image_scale", "branches"),
    [
        (7.5, 1.5, ["text", "image", "uncond"]),
        (7.5, 1.0, ["text", "image"]),
        (1.5, 1.5, ["text", "uncond"]),
        (1.0, 1.0, ["text"]),
        (0.0, 1.5, ["image", "uncond"]),
        (0.0, 0.0, ["uncond"]),
        (0.0, 1.0, ["image"]),
        (0.1 + 0.2, 0.3, ["text", "uncond"]),  # zero except for rounding
    ],
)
def test_only_needed_branches(text_scale: float, image_scale: float, branches: list[str]) -> None:
    assert list(branch_coefficients(text_scale, image_scale)) == branches


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    """With nearly equal predictions, weights of 7.5 and -6 do not magnify rounding errors."""
    predictions = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    predictions = (predictions[:1] + 0.01 * predictions).to(dtype)
    coefficients = branch_coefficients(7.5, 1.5)
    exact = combine(predictions.double(), coefficients)
    combined = combine(predictions, coefficients)
    assert combined.dtype == dtype
    torch.testing.assert_close(combined.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_images_with_scales_of_their_own() -> None:
    """Each row equals its result alone, whatever branches the others need; equal scales give one weight."""
    scales = [(7.5, 1.5), (3.0, 1.0), (1.0, 1.0), (1.5, 1.5)]
    predictions = torch.randn(3, 4, 2, 5, generator=torch.Generator().manual_seed(0))  # (branches, images, ...)
    coefficients = batch_coefficients(scales)
    assert list(coefficients) == ["text", "image", "uncond"]
    together = combine(predictions.flatten(0, 1), coefficients)
    for row, pair in enumerate(scales):
        alone = branch_coefficients(*pair)
        own = torch.stack([predictions[BRANCHES.index(branch), row] for branch in alone])
        assert torch.equal(together[row : row + 1], combine(own, alone))
    assert batch_coefficients([(3.0, 1.0)] * 4) == branch_coefficients(3.0, 1.0)


def test_wrong_number_of_predictions() -> None:
    with pytest.raises(ValueError, match="4 predictions cannot be split into 3 branches"):
        combine(torch.zeros(4, 1), branch_coefficients(7.5, 1.5))
