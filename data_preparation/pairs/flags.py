"""The flags of what decides which pairs come out of a caption. Nothing heavy is imported here."""

from __future__ import annotations

import argparse
import dataclasses

from data_preparation.pairs.presets import PRESETS, PairSettings
from utils.editing.schedulers import SCHEDULERS, SPACINGS

ORDER_ONE = [name for name in SCHEDULERS if name != "heun"]  # its steps ask the UNet twice, which are no shared halves


def add_settings_flags(parser: argparse.ArgumentParser) -> None:
    """The groups of the sampling's and of the filter's flags, named as the fields of `PairSettings`."""
    add = parser.add_argument_group("settings").add_argument
    add(
        "--preset",
        choices=PRESETS,
        default="fast",
        help="ip2p: the original's settings; fast: a few-step model, and "
        "an end as soon as enough has passed (default fast). Every flag below overrides it",
    )
    add("--num_inference_steps", type=int, metavar="N", help="ip2p 100, fast 4")
    add("--num_samples", type=int, metavar="N", help="candidates for each caption, at most (ip2p 100, fast 16)")
    add("--max_out_samples", type=int, metavar="N", help="pairs kept of a caption, at most (4)")
    add(
        "--early_stop",
        action=argparse.BooleanOptionalAction,
        help="no more candidates once --max_out_samples have passed; else the best by direction are kept (fast: on)",
    )
    add(
        "--share_range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="the share of the steps in which a pair shares its self-attention is drawn from it (ip2p 0.1 0.9)",
    )
    add(
        "--share_steps",
        type=int,
        nargs=2,
        metavar=("LEAST", "MOST"),
        help="the number of these steps is, in its place (fast: 1 to all but one)",
    )
    add(
        "--guidance_range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="classifier-free guidance is drawn from "
        "it; up to 1 there is none, at half the cost (ip2p 7.5 15, fast 0 0)",
    )
    add("--scheduler", choices=ORDER_ONE, metavar="NAME", help="%(choices)s (ip2p euler_a, fast the model's own)")
    add("--timestep_spacing", choices=SPACINGS, help="which steps it takes (ip2p linspace, fast the model's own)")
    add("--resolution", type=int, metavar="PIXELS", help="side of the pictures (default: what the model was made for)")
    add = parser.add_argument_group("filter: cosines of CLIP; a number, or none").add_argument
    add("--clip_model", default="openai/clip-vit-large-patch14", metavar="MODEL", help="default %(default)s")
    add("--min_clip_image", type=bound, metavar="X", help="of the two images (ip2p 0.7, fast 0.75)")
    add("--min_clip_dir", type=bound, metavar="X", help="of the change of image and caption (ip2p 0.2, fast 0.22)")
    add("--min_clip_text", type=bound, metavar="X", help="of each image with its caption (0.2)")
    add(
        "--max_clip_image",
        type=bound,
        metavar="X",
        help="of the two images, against pairs in which nothing has changed (ip2p none, fast 0.99)",
    )
    add(
        "--min_change",
        type=bound,
        metavar="X",
        help="mean absolute difference of the pixels in [0, 1], likewise (ip2p none, fast 0.01)",
    )
    add("--max_clip_text", type=bound, metavar="X", help="of the two captions: more alike ones cost nothing (none)")


def bound(text: str) -> float | str:
    return "none" if text == "none" else float(text)


def pick_settings(args: argparse.Namespace) -> PairSettings:
    """The preset, with what the flags say in the place of what it says."""
    given = {}
    for name in (each.name for each in dataclasses.fields(PairSettings)):
        value = getattr(args, name, None)
        if value is not None:
            given[name] = None if value == "none" else tuple(value) if isinstance(value, list) else value
    if "share_steps" in given:
        given.setdefault("share_range", None)
    if "scheduler" in given:  # the preset's spacing is its own scheduler's
        given.setdefault("timestep_spacing", None)
    preset = PRESETS[args.preset]
    if "num_samples" in given:
        given.setdefault("max_out_samples", min(preset.max_out_samples, max(given["num_samples"], 1)))
    return dataclasses.replace(preset, **given)
