"""The settings of phase two, and the presets that fill them. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PairSettings:
    """What decides which pairs come out of a caption; the fields are flags.

    num_samples: candidates for each caption; max_out_samples: pairs kept of them; early_stop: no more candidates once
    so many have passed. share_range: the reference's threshold is drawn from it (shares of the steps); share_steps:
    the number of shared steps itself is, in its place; both None: from 1 to all but one. guidance_range:
    classifier-free guidance is drawn from it; up to 1 the UNet runs without the unconditional rows. min_clip_*,
    max_clip_*: bounds of the scores (`clip_filter`), inclusive; min_change: mean absolute difference of the pixels in
    [0, 1]. None: no bound. resolution None: what the model was made for.
    """

    num_inference_steps: int
    num_samples: int
    max_out_samples: int
    early_stop: bool
    guidance_range: tuple[float, float]
    share_range: tuple[float, float] | None = None
    share_steps: tuple[int, int] | None = None
    scheduler: str | None = None
    timestep_spacing: str | None = None
    resolution: int | None = None
    strength: float = 0.6
    original: str = "generated"
    min_clip_image: float | None = None
    min_clip_dir: float | None = None
    min_clip_text: float | None = None
    max_clip_image: float | None = None
    max_clip_text: float | None = None
    min_change: float | None = None


# ip2p: dataset_creation/generate_img_dataset.py of timothybrooks/instruct-pix2pix. Its sampler is Euler ancestral on
# sigmas that are evenly spaced from the last timestep to the first, which diffusers calls linspace.
# fast: the thresholds of UltraEdit (2407.05282), and bounds against pairs in which nothing has changed.
PRESETS = {
    "ip2p": PairSettings(
        num_inference_steps=100,
        num_samples=100,
        max_out_samples=4,
        early_stop=False,
        guidance_range=(7.5, 15.0),
        share_range=(0.1, 0.9),
        scheduler="euler_a",
        timestep_spacing="linspace",
        min_clip_image=0.7,
        min_clip_dir=0.2,
        min_clip_text=0.2,
    ),
    "fast": PairSettings(
        num_inference_steps=4,
        num_samples=16,
        max_out_samples=4,
        early_stop=True,
        guidance_range=(0.0, 0.0),
        min_clip_image=0.75,
        min_clip_dir=0.22,
        min_clip_text=0.2,
        max_clip_image=0.99,
        min_change=0.01,
    ),
}
# (model, autoencoder of its own) where --model does not say otherwise.
PRESET_MODELS = {
    "ip2p": ("stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/sd-vae-ft-mse"),
    "fast": ("stabilityai/sdxl-turbo", None),
}
PRESET_FILE_ITEMS = {"ip2p": 2, "fast": 50}  # captions in a file: what a kill loses at most, for each worker


def find_setting_problems(settings: PairSettings, has_photographs: bool = False) -> list[str]:
    """What cannot be, one line each, with the flags' names."""
    problems, steps = [], settings.num_inference_steps
    if not 2 <= steps <= 1000:
        problems.append(f"--num_inference_steps {steps}: must be from 2 to 1000, some shared and some not")
    if not 1 <= settings.num_samples <= 100_000:
        problems.append(f"--num_samples {settings.num_samples}: must be from 1 to 100000")
    if not 1 <= settings.max_out_samples <= settings.num_samples:
        problems.append(
            f"--max_out_samples {settings.max_out_samples}: must be from 1 to --num_samples {settings.num_samples}"
        )
    low, high = settings.guidance_range
    if not (0 <= low <= high <= 100 and (high <= 1 or low >= 1)):
        problems.append(
            f"--guidance_range {low} {high}: must be LOW <= HIGH, both from 1 to 100, or both at most 1 (no guidance)"
        )
    problems += _find_sharing_problems(settings, effective_steps(settings) if has_photographs else steps)
    if settings.resolution is not None and not 8 <= settings.resolution <= 4096:
        problems.append(f"--resolution {settings.resolution}: must be from 8 to 4096")
    if has_photographs and not 0 < settings.strength <= 1:
        problems.append(f"--strength {settings.strength}: must be above 0, and 1 at most")
    elif has_photographs and effective_steps(settings) < 2:
        problems.append(
            f"--strength {settings.strength} leaves {effective_steps(settings)} of {steps} steps: give more of either, "
            "2 must be left"
        )
    if settings.original == "real" and not has_photographs:
        problems.append("--original real: needs --init_images, the real photographs")
    for name in ("min_clip_image", "min_clip_dir", "min_clip_text", "max_clip_image", "max_clip_text", "min_change"):
        value = getattr(settings, name)
        if value is not None and not -1 <= value <= 1:
            problems.append(f"--{name} {value}: must be from -1 to 1, or none")
    return problems


def _find_sharing_problems(settings: PairSettings, steps: int) -> list[str]:
    if settings.share_steps is not None:
        low, high = settings.share_steps
        if not 0 <= low <= high <= steps:
            return [f"--share_steps {low} {high}: must be LEAST <= MOST, from 0 to the {steps} steps"]
    elif settings.share_range is not None:
        low, high = settings.share_range
        if not 0 <= low <= high <= 1.5:
            return [f"--share_range {low} {high}: must be LOW <= HIGH, shares of the steps from 0 to 1"]
    return []


def effective_steps(settings: PairSettings) -> int:
    """Steps that are left of those of a schedule when it starts from photographs, as diffusers' img2img counts."""
    return min(int(settings.num_inference_steps * settings.strength), settings.num_inference_steps)
