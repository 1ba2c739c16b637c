"""Classifier-free guidance of InstructPix2Pix: which branches to evaluate, and how to combine their predictions.

A branch is one evaluation of the UNet per image and step:

    text      the prompt and the image latents
    image     the null prompt and the image latents
    uncond    the null prompt and zero image latents
"""

import torch

BRANCHES = ("text", "image", "uncond")
Coefficients = dict[str, float | list[float]]  # branch -> one weight for all images, or one for each


def branch_coefficients(guidance_scale: float, image_guidance_scale: float) -> dict[str, float]:
    """The weight of each branch that is needed, in the order of `BRANCHES`; at least one, and they sum to 1.

    InstructPix2Pix, equation 3, with s_T = `guidance_scale` and s_I = `image_guidance_scale` (any finite numbers):

        e = e_unc + s_I (e_img - e_unc) + s_T (e_txt - e_img) = s_T e_txt + (s_I - s_T) e_img + (1 - s_I) e_unc

    A branch whose weight is zero is not needed: s_I = 1 drops `uncond`, s_T = s_I drops `image`.
    """
    # Unlike diffusers: its pipelines drop all guidance when s_T <= 1 or s_I < 1, and evaluate all three otherwise.
    weights = (guidance_scale, image_guidance_scale - guidance_scale, 1.0 - image_guidance_scale)
    return {branch: weight for branch, weight in zip(BRANCHES, weights, strict=True) if abs(weight) >= 1e-12}


def batch_coefficients(scales: list[tuple[float, float]]) -> Coefficients:
    """`branch_coefficients` for B images with (text, image) scales of their own: every branch that any image needs."""
    images = [branch_coefficients(*pair) for pair in scales]
    branches = [branch for branch in BRANCHES if any(branch in weights for weights in images)]
    rows = {branch: [weights.get(branch, 0.0) for weights in images] for branch in branches}
    return {branch: weights if len(set(weights)) > 1 else weights[0] for branch, weights in rows.items()}


def combine(predictions: torch.Tensor, coefficients: Coefficients) -> torch.Tensor:
    """Weighted sum of the branches: (K*B, ...) stacked in the order of `coefficients` -> (B, ...), same dtype.

    Summed in at least float32: in half precision the weights (7.5, -6, -0.5) would magnify rounding errors.
    """
    if predictions.shape[0] % len(coefficients) != 0:
        raise ValueError(f"{predictions.shape[0]} predictions cannot be split into {len(coefficients)} branches")
    dtype = torch.promote_types(predictions.dtype, torch.float32)
    branches = predictions.to(dtype).unflatten(0, (len(coefficients), -1))  # (K, B, ...)
    weighted = (_weigh(branch, weight) for branch, weight in zip(branches, coefficients.values(), strict=True))
    return sum(weighted).to(predictions.dtype)


def rescale(combined: torch.Tensor, text: torch.Tensor, strength: float) -> torch.Tensor:
    """`combined` (B, ...) with its standard deviation drawn towards that of `text`, the text branch (B, ...).

    Guidance raises the contrast of the prediction, which overexposes images where the noise schedule ends at zero SNR.
    With strength phi in [0, 1]: combined * (phi * std(text) / std(combined) + 1 - phi), the standard deviations over
    all values of an image (arXiv 2305.08891, section 3.4, equations 15 and 16).
    """
    axes = tuple(range(1, combined.ndim))
    wide = combined.to(torch.promote_types(combined.dtype, torch.float32))
    ratio = text.to(wide.dtype).std(axes, keepdim=True) / wide.std(axes, keepdim=True)
    return (wide * (strength * ratio + 1 - strength)).to(combined.dtype)


def _weigh(predictions: torch.Tensor, weight: float | list[float]) -> torch.Tensor:
    """(B, ...) times one weight, or times one weight per row."""
    if not isinstance(weight, list):
        return weight * predictions
    weights = torch.tensor(weight, dtype=predictions.dtype, device=predictions.device)
    return weights.view(-1, *[1] * (predictions.ndim - 1)) * predictions


def coefficients_of_steps(
    coefficients: Coefficients, num_steps: int, interval: tuple[float, float] | None = None
) -> list[Coefficients]:
    """The coefficients of each of `num_steps` steps; outside `interval` only the text branch is evaluated.

    interval: (start, stop) as fractions of the steps, 0 is the first, noisiest step; None is (0, 1). A step is guided
    if its middle is in the interval. A limited interval saves time and can improve the result (arXiv 2404.07724).
    Raises ValueError for an invalid interval.
    """
    start, stop = interval or (0.0, 1.0)
    if not 0 <= start <= stop <= 1:
        raise ValueError(f"the guidance interval must be 0 <= START <= STOP <= 1, got {start} {stop}")
    is_guided = [start <= (step + 0.5) / num_steps <= stop for step in range(num_steps)]
    return [coefficients if guided else {"text": 1.0} for guided in is_guided]
