"""The published few-step distillations of SD 1.5 and SDXL: their files, their bases, and how to run the result.

Ids, files and settings are those of the model pages; `unverified` names what could not be checked there. How well the
merged editors edit was not tested. docs/distillation.md explains what is not listed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SOURCE_FIELDS = ("subfolder", "weight_name", "variant", "revision")  # of a weight source; each has a flag
LORA_FILE = "pytorch_lora_weights.safetensors"
SD15, SDXL = "sd1.5", "sdxl"
SDXL_BASE = "stabilityai/stable-diffusion-xl-base-1.0"
LCM, TCD, DDIM, EULER = "LCMScheduler", "TCDScheduler", "DDIMScheduler", "EulerDiscreteScheduler"
TRAILING = {"timestep_spacing": "trailing"}  # starts at the last timestep, as these models were trained
NC, NC_ND = "cc-by-nc-4.0", "cc-by-nc-nd-4.0"


@dataclass(frozen=True)
class Preset:
    """A LoRA, or a distilled UNet from which the UNet of `base` is subtracted.

    scheduler: class name in diffusers; scheduler_settings override the editor's. licence: None if the source's model
    card has it. unverified: what was not checked on the model page.
    """

    family: str
    id: str
    scheduler: str
    steps: int
    weight_name: str | None = LORA_FILE
    subfolder: str | None = None
    variant: str | None = None
    base: str | None = None
    weight: float = 1.0
    scheduler_settings: dict[str, Any] = field(default_factory=dict)
    guidance_scale: float = 1.5
    image_guidance_scale: float = 1.0
    eta: float = 0.0
    lcm_guidance: float | None = None
    licence: str | None = None
    unverified: str = "licence"

    @property
    def kind(self) -> str:
        return "distilled" if self.base else "lora"


def _sdxl_unet(id: str, scheduler: str, steps: int, weight_name: str | None = None, **settings: Any) -> Preset:
    return Preset(SDXL, id, scheduler, steps, weight_name, base=SDXL_BASE, weight=0.5, **settings)


def _hyper(family: str, tag: str) -> dict[str, Preset]:
    """Hyper-SD (2404.13686): TCD for one step, DDIM for more; two were trained with guidance."""
    presets, repo, trailing = {}, "ByteDance/Hyper-SD", dict(scheduler_settings=TRAILING)
    one_step = f"Hyper-{tag}-1step-lora.safetensors"
    presets[f"hyper-{family}-1"] = Preset(family, repo, TCD, 1, one_step, eta=1.0, guidance_scale=1.0)
    for steps in (2, 4, 8):
        file = f"Hyper-{tag}-{steps}steps-lora.safetensors"
        presets[f"hyper-{family}-{steps}"] = Preset(family, repo, DDIM, steps, file, guidance_scale=1.0, **trailing)
    for steps in (8, 12):
        file = f"Hyper-{tag}-{steps}steps-CFG-lora.safetensors"
        presets[f"hyper-{family}-{steps}-cfg"] = Preset(family, repo, DDIM, steps, file, guidance_scale=5.0, **trailing)
    return presets


def _pcm(family: str, tag: str, unverified: str) -> dict[str, Preset]:
    """Phased Consistency Models (2405.18407)."""
    presets, repo = {}, "wangfuyun/PCM_Weights"
    ddim = TRAILING | {"clip_sample": False, "set_alpha_to_one": False}
    for kind, all_steps, scale in (("smallcfg", (2, 4, 8, 16), 1.5), ("normalcfg", (4, 8, 16), 3.0)):
        settings = dict(subfolder=tag, scheduler_settings=ddim, guidance_scale=scale, unverified=unverified)
        for steps in all_steps:
            file = f"pcm_{tag}_{kind}_{steps}step_converted.safetensors"
            presets[f"pcm-{family}-{kind}-{steps}"] = Preset(family, repo, DDIM, steps, file, **settings)
    file, settings = f"pcm_{tag}_lcmlike_lora_converted.safetensors", dict(unverified=f"scheduler, {unverified}")
    presets[f"pcm-{family}-lcmlike"] = Preset(family, repo, LCM, 4, file, subfolder=tag, **settings)
    return presets


def _lightning() -> dict[str, Preset]:
    """SDXL-Lightning (2402.13929): the number of steps must be that of the file."""
    presets, repo, settings = {}, "ByteDance/SDXL-Lightning", dict(scheduler_settings=TRAILING, guidance_scale=1.0)
    for steps in (2, 4, 8):
        file = f"sdxl_lightning_{steps}step"
        presets[f"lightning-sdxl-{steps}-lora"] = Preset(
            SDXL, repo, EULER, steps, f"{file}_lora.safetensors", **settings
        )
        presets[f"lightning-sdxl-{steps}"] = _sdxl_unet(repo, EULER, steps, f"{file}_unet.safetensors", **settings)
    return presets


TCD_SETTINGS = dict(eta=0.3, guidance_scale=1.0)  # TCDScheduler's default eta, which the pipelines replace by 0
DMD2_STEPS = {"original_inference_steps": 4}  # gives DMD2's timesteps 999, 749, 499, 249 with LCMScheduler
DMD2 = dict(scheduler_settings=DMD2_STEPS, guidance_scale=1.0, licence=NC, unverified="")
PRESETS: dict[str, Preset] = {
    # Reported to edit well at 4 steps, guidance scale 1 to 3, image guidance scale 1.
    "lcm-lora-sd1.5": Preset(SD15, "latent-consistency/lcm-lora-sdv1-5", LCM, 4),
    # Minus its own base: minus SD 1.5 would add DreamShaper's style.
    "lcm-dreamshaper-sd1.5": Preset(
        SD15,
        "SimianLuo/LCM_Dreamshaper_v7",
        LCM,
        4,
        None,
        subfolder="unet",
        base="Lykon/dreamshaper-7",
        lcm_guidance=4.0,
        unverified="the base's id, the guidance to fold, licence",
    ),
    **_hyper(SD15, "SD15"),
    "tcd-sd1.5": Preset(SD15, "h1t/TCD-SD15-LoRA", TCD, 4, **TCD_SETTINGS),
    **_pcm(SD15, "sd15", "licence"),
    "flash-sd1.5": Preset(SD15, "jasperai/flash-sd", LCM, 4, licence=NC, unverified="scheduler"),
    # Reported for both: 5 steps, guidance scale 2, 768 pixels only; turbo-sdxl with LCMScheduler.
    "lcm-sdxl": _sdxl_unet(
        "latent-consistency/lcm-sdxl",
        LCM,
        5,
        variant="fp16",
        guidance_scale=2.0,
        lcm_guidance=4.0,
        unverified="that it has a guidance embedding, the guidance to fold, licence",
    ),
    "lcm-lora-sdxl": Preset(SDXL, "latent-consistency/lcm-lora-sdxl", LCM, 4),  # reported to edit poorly,
    "turbo-sdxl": _sdxl_unet(
        "stabilityai/sdxl-turbo",
        "EulerAncestralDiscreteScheduler",
        5,
        subfolder="unet",
        variant="fp16",
        scheduler_settings=TRAILING,
        guidance_scale=2.0,
        licence="sai-nc-community",
        unverified="the licence's name",
    ),
    **_lightning(),
    **_hyper(SDXL, "SDXL"),
    "dmd2-sdxl-4": _sdxl_unet("tianweiy/DMD2", LCM, 4, "dmd2_sdxl_4step_unet_fp16.safetensors", **DMD2),
    "dmd2-sdxl-4-lora": Preset(SDXL, "tianweiy/DMD2", LCM, 4, "dmd2_sdxl_4step_lora.safetensors", **DMD2),
    "tcd-sdxl": Preset(SDXL, "h1t/TCD-SDXL-LoRA", TCD, 4, unverified="settings, licence", **TCD_SETTINGS),
    **_pcm(SDXL, "sdxl", "file names, licence"),
    "flash-sdxl": Preset(
        SDXL,
        "jasperai/flash-sdxl",
        LCM,
        4,
        scheduler_settings=TRAILING,
        guidance_scale=1.0,
        licence=NC_ND,
        unverified="",
    ),
}


def describe_presets() -> str:
    """The presets as a table, one per line."""
    rows = [["preset", "source", "minus", "weight", "scheduler", "steps", "guidance", "eta", "licence", "not verified"]]
    for name, preset in PRESETS.items():
        source = "/".join(part for part in (preset.id, preset.subfolder, preset.weight_name) if part)
        settings = ", ".join(f"{key}={value}" for key, value in preset.scheduler_settings.items())
        scheduler = preset.scheduler.removesuffix("Scheduler") + (f" ({settings})" if settings else "")
        scales = f"{preset.guidance_scale:g} / {preset.image_guidance_scale:g}"
        numbers = [f"{preset.steps}", scales, f"{preset.eta:g}"]
        row = [name, source, preset.base or "-", f"{preset.weight:g}", scheduler, *numbers]
        rows.append([*row, preset.licence or "-", preset.unverified or "-"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
