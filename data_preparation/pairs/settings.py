"""The settings of generate_pairs.py: their flags, presets and checks. Light imports only, so that --help is fast."""

import argparse
import dataclasses
from dataclasses import dataclass

from utils.editing.schedulers import SCHEDULERS, SPACINGS

# Heun's method runs the UNet twice per step, so its calls cannot be counted as shared steps.
FIRST_ORDER = [name for name in SCHEDULERS if name != "heun"]


@dataclass(frozen=True)
class PairSettings:
    """What determines the pairs of a caption; the fields are flags, the defaults those of the preset fast.

    num_samples: candidates per caption; max_out_samples: pairs kept of them; early_stop: stop sampling once that many
    have passed. share_range: the share of the steps with shared self-attention is drawn from it; share_steps: the
    number of these steps is, instead; both None: from 1 to all but one. guidance_range: the guidance scale is drawn
    from it; up to 1, the UNet runs without the unconditional branch. min_clip_*, max_clip_*: inclusive bounds of the
    scores (filters.py); min_change: mean absolute difference of the pixels in [0, 1]; None: no bound. resolution None:
    the native resolution of the model.
    """

    num_inference_steps: int = 4
    num_samples: int = 16
    max_out_samples: int = 4
    early_stop: bool = True
    guidance_range: tuple[float, float] = (0.0, 0.0)
    share_range: tuple[float, float] | None = None
    share_steps: tuple[int, int] | None = None
    scheduler: str | None = None
    timestep_spacing: str | None = None
    resolution: int | None = None
    strength: float = 0.6
    original: str = "generated"
    min_clip_image: float | None = 0.75
    min_clip_dir: float | None = 0.22
    min_clip_text: float | None = 0.2
    max_clip_image: float | None = 0.99
    max_clip_text: float | None = None
    min_change: float | None = 0.01


@dataclass(frozen=True)
class PairPreset:
    """model, vae: defaults of --model and --vae; captions_per_shard: what a killed worker loses at most."""

    settings: PairSettings
    model: str
    vae: str | None
    captions_per_shard: int


# ip2p: dataset_creation/generate_img_dataset.py of timothybrooks/instruct-pix2pix. It samples with Euler ancestral on
# sigmas spaced evenly from the last timestep to the first, which diffusers calls linspace.
IP2P = PairSettings(
    num_inference_steps=100,
    num_samples=100,
    early_stop=False,
    guidance_range=(7.5, 15.0),
    share_range=(0.1, 0.9),
    scheduler="euler_a",
    timestep_spacing="linspace",
    min_clip_image=0.7,
    min_clip_dir=0.2,
    max_clip_image=None,
    min_change=None,
)
# fast: the thresholds of UltraEdit (2407.05282), and bounds that reject pairs in which nothing has changed.
PRESETS = {
    "ip2p": PairPreset(IP2P, "stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/sd-vae-ft-mse", 2),
    "fast": PairPreset(PairSettings(), "stabilityai/sdxl-turbo", None, 50),
}


def add_settings_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags named after the fields of `PairSettings`, except --strength and --original."""
    add = parser.add_argument_group("sampling; these flags override the preset").add_argument
    preset_help = "ip2p: as in the paper; fast: few steps, stops at --max_out_samples (default fast)"
    add("--preset", choices=PRESETS, default="fast", help=preset_help)
    add("--num_inference_steps", type=int, metavar="N", help="denoising steps (ip2p 100, fast 4)")
    add("--num_samples", type=int, metavar="N", help="most candidates per caption (ip2p 100, fast 16)")
    add("--max_out_samples", type=int, metavar="N", help="most pairs kept per caption (4)")
    stop_help = "stop at --max_out_samples passed candidates, instead of keeping the best of all (fast: on)"
    add("--early_stop", action=argparse.BooleanOptionalAction, help=stop_help)
    pair = {"nargs": 2, "metavar": ("LOW", "HIGH")}
    add("--share_range", type=float, **pair, help="range of the share of steps with shared attention (ip2p 0.1 0.9)")
    add("--share_steps", type=int, **pair, help="range of the number of such steps (fast: 1 to all but one)")
    guidance_help = "range of the guidance scale; up to 1 is no guidance, at half the cost (ip2p 7.5 15, fast 0 0)"
    add("--guidance_range", type=float, **pair, help=guidance_help)
    add("--scheduler", choices=FIRST_ORDER, metavar="NAME", help="%(choices)s (ip2p euler_a, fast: the model's)")
    add("--timestep_spacing", choices=SPACINGS, help="timestep spacing (ip2p linspace, fast: the model's)")
    add("--resolution", type=int, metavar="PIXELS", help="side of the images (default: native to the model)")
    add = parser.add_argument_group("CLIP filter: bounds of cosine similarities, a number or none").add_argument
    add("--clip_model", default="openai/clip-vit-large-patch14", metavar="MODEL", help="default %(default)s")
    for name, text in {
        "min_clip_image": "between the two images (ip2p 0.7, fast 0.75)",
        "min_clip_dir": "between the changes of image and caption (ip2p 0.2, fast 0.22)",
        "min_clip_text": "between each image and its caption (0.2)",
        "max_clip_image": "between the two images, to reject unchanged pairs (ip2p none, fast 0.99)",
        "min_change": "mean absolute pixel difference in [0, 1], for the same purpose (ip2p none, fast 0.01)",
        "max_clip_text": "between the two captions; such captions are not sampled (none)",
    }.items():
        add(f"--{name}", type=read_bound, metavar="X", help=text)


def read_bound(text: str) -> float | str:
    return "none" if text == "none" else float(text)


def choose_settings(args: argparse.Namespace) -> PairSettings:
    """The settings of the preset, overridden by the flags."""
    given = {}
    for name in (each.name for each in dataclasses.fields(PairSettings)):
        value = getattr(args, name, None)
        if value is not None:
            given[name] = None if value == "none" else tuple(value) if isinstance(value, list) else value
    if "share_steps" in given:
        given.setdefault("share_range", None)
    if "scheduler" in given:  # the spacing of the preset belongs to its own scheduler
        given.setdefault("timestep_spacing", None)
    settings = PRESETS[args.preset].settings
    if "num_samples" in given:
        given.setdefault("max_out_samples", min(settings.max_out_samples, max(given["num_samples"], 1)))
    return dataclasses.replace(settings, **given)


def find_pair_problems(settings: PairSettings, has_photographs: bool = False) -> list[str]:
    """One line for each invalid value, with the name of its flag."""
    problems, steps, used_steps = [], settings.num_inference_steps, num_used_steps(settings, has_photographs)
    bounds = ("min_clip_image", "min_clip_dir", "min_clip_text", "max_clip_image", "max_clip_text", "min_change")
    for name, low, high in (
        ("num_inference_steps", 2, 1000),
        ("num_samples", 1, 100_000),
        ("max_out_samples", 1, settings.num_samples),
        ("resolution", 8, 4096),
        *((bound, -1, 1) for bound in bounds),
    ):
        value = getattr(settings, name)
        if value is not None and not low <= value <= high:
            problems.append(f"--{name} {value}: must be from {low} to {high}")
    low, high = settings.guidance_range
    if not (0 <= low <= high <= 100 and (high <= 1 or low >= 1)):
        problems.append(f"--guidance_range {low} {high}: must be LOW <= HIGH, both from 1 to 100 or both from 0 to 1")
    if settings.share_steps is not None:
        low, high = settings.share_steps
        if not 0 <= low <= high <= used_steps:
            problems.append(f"--share_steps {low} {high}: must be LOW <= HIGH, from 0 to the {used_steps} steps")
    elif settings.share_range is not None:
        low, high = settings.share_range
        if not 0 <= low <= high <= 1.5:
            problems.append(f"--share_range {low} {high}: must be LOW <= HIGH, shares of the steps from 0 to 1")
    if has_photographs and not 0 < settings.strength <= 1:
        problems.append(f"--strength {settings.strength}: must be above 0 and at most 1")
    elif has_photographs and used_steps < 2:
        problems.append(f"--strength {settings.strength}: leaves {used_steps} of {steps} steps, and 2 are needed")
    if settings.original == "real" and not has_photographs:
        problems.append("--original real: needs --init_images, the real photographs")
    return problems


def num_used_steps(settings: PairSettings, has_photographs: bool) -> int:
    """Denoising steps that run: starting from photographs, as many as in the image-to-image pipelines of diffusers."""
    steps = settings.num_inference_steps
    return min(int(steps * settings.strength), steps) if has_photographs else steps
