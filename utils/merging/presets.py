"""The published few-step distillations of SD 1.5 and SDXL: where they are, what to subtract, and how to run the result.

Ids, files and settings are those of the models' pages, as far as they could be looked up; `unverified` says what was
not. The quality of the edits was tested for none of them, but where `note` says so. What is not here, and why:
docs/distillation.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PARTS = ("subfolder", "weight_name", "variant", "revision")  # of a source, each with a flag
TRAILING = {"timestep_spacing": "trailing"}  # starts at the last timestep, as these models were trained
SD15, SDXL = "sd1.5", "sdxl"
SD15_BASE, SDXL_BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-xl-base-1.0"
LCM, TCD, DDIM = "LCMScheduler", "TCDScheduler", "DDIMScheduler"
PCM_DDIM = TRAILING | {"clip_sample": False, "set_alpha_to_one": False}
NC, NC_ND = "cc-by-nc-4.0", "cc-by-nc-nd-4.0"


@dataclass(frozen=True)
class Preset:
    """kind: "lora", or "distilled" (a full UNet, from which that of `base` is subtracted).

    scheduler: diffusers' class; scheduler_settings take the place of the editor's own. licence: None where the source's
    card on the Hub is to say it. unverified: what was not looked up on the model's page.
    """

    family: str
    kind: str
    id: str
    scheduler: str
    steps: int
    weight_name: str | None = None
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
    note: str = ""
    unverified: str = ""


def _lora(family: str, id: str, weight_name: str, scheduler: str, steps: int, **settings: Any) -> Preset:
    return Preset(family, "lora", id, scheduler, steps, weight_name=weight_name, **settings)


def _hyper(family: str, tag: str) -> dict[str, Preset]:
    """Hyper-SD (2404.13686): TCD for one step, DDIM trailing for more, and two that were trained with guidance."""
    made = {}
    for steps in (1, 2, 4, 8):
        scheduler, settings, eta = (TCD, {}, 1.0) if steps == 1 else (DDIM, TRAILING, 0.0)
        name = f"Hyper-{tag}-{steps}step{'s' if steps > 1 else ''}-lora.safetensors"
        made[f"hyper-{family}-{steps}"] = _lora(
            family,
            "ByteDance/Hyper-SD",
            name,
            scheduler,
            steps,
            scheduler_settings=settings,
            eta=eta,
            guidance_scale=1.0,
            unverified="licence",
        )
    for steps in (8, 12):
        made[f"hyper-{family}-{steps}-cfg"] = _lora(
            family,
            "ByteDance/Hyper-SD",
            f"Hyper-{tag}-{steps}steps-CFG-lora.safetensors",
            DDIM,
            steps,
            scheduler_settings=TRAILING,
            guidance_scale=5.0,
            unverified="licence",
        )
    return made


def _pcm(family: str, tag: str, unverified: str) -> dict[str, Preset]:
    """Phased Consistency Models (2405.18407)."""
    made = {}
    for kind, all_steps, scale in (("smallcfg", (2, 4, 8, 16), 1.5), ("normalcfg", (4, 8, 16), 3.0)):
        for steps in all_steps:
            made[f"pcm-{family}-{kind}-{steps}"] = _lora(
                family,
                "wangfuyun/PCM_Weights",
                f"pcm_{tag}_{kind}_{steps}step_converted.safetensors",
                DDIM,
                steps,
                subfolder=tag,
                scheduler_settings=PCM_DDIM,
                guidance_scale=scale,
                unverified=unverified,
            )
    made[f"pcm-{family}-lcmlike"] = _lora(
        family,
        "wangfuyun/PCM_Weights",
        f"pcm_{tag}_lcmlike_lora_converted.safetensors",
        LCM,
        4,
        subfolder=tag,
        unverified=f"scheduler, {unverified}",
    )
    return made


def _lightning() -> dict[str, Preset]:
    """SDXL-Lightning (2402.13929): the steps must be those of the file."""
    made = {}
    settings = dict(scheduler_settings=TRAILING, guidance_scale=1.0, unverified="licence")
    for steps in (2, 4, 8):
        common = (SDXL, "ByteDance/SDXL-Lightning", f"sdxl_lightning_{steps}step_lora.safetensors")
        made[f"lightning-sdxl-{steps}-lora"] = _lora(*common, "EulerDiscreteScheduler", steps, **settings)
        made[f"lightning-sdxl-{steps}"] = Preset(
            SDXL,
            "distilled",
            "ByteDance/SDXL-Lightning",
            "EulerDiscreteScheduler",
            steps,
            base=SDXL_BASE,
            weight=0.5,
            weight_name=f"sdxl_lightning_{steps}step_unet.safetensors",
            **settings,
        )
    return made


DMD2 = dict(
    scheduler_settings={"original_inference_steps": 4},
    guidance_scale=1.0,
    licence=NC,
    note="LCMScheduler with 4 original steps gives DMD2's timesteps 999, 749, 499, 249",
)
PRESETS: dict[str, Preset] = {
    "lcm-lora-sd1.5": _lora(
        SD15,
        "latent-consistency/lcm-lora-sdv1-5",
        "pytorch_lora_weights.safetensors",
        LCM,
        4,
        note="reported to edit well at 4 steps, guidance 1 to 3, image guidance 1",
        unverified="licence",
    ),
    "lcm-dreamshaper-sd1.5": Preset(
        SD15,
        "distilled",
        "SimianLuo/LCM_Dreamshaper_v7",
        LCM,
        4,
        subfolder="unet",
        base="Lykon/dreamshaper-7",
        lcm_guidance=4.0,
        note="minus its own base: minus SD 1.5 would add DreamShaper's style",
        unverified="the base's id, the guidance to fold, licence",
    ),
    **_hyper(SD15, "SD15"),
    "tcd-sd1.5": _lora(
        SD15,
        "h1t/TCD-SD15-LoRA",
        "pytorch_lora_weights.safetensors",
        TCD,
        4,
        eta=0.3,
        guidance_scale=1.0,
        note="pipelines pass eta 0 in place of TCD's 0.3: give it",
        unverified="licence",
    ),
    **_pcm(SD15, "sd15", "licence"),
    "flash-sd1.5": _lora(
        SD15, "jasperai/flash-sd", "pytorch_lora_weights.safetensors", LCM, 4, licence=NC, unverified="scheduler"
    ),
    "lcm-sdxl": Preset(
        SDXL,
        "distilled",
        "latent-consistency/lcm-sdxl",
        LCM,
        5,
        variant="fp16",
        base=SDXL_BASE,
        weight=0.5,
        guidance_scale=2.0,
        lcm_guidance=4.0,
        note="reported: 5 steps, guidance 2, 768 pixels only",
        unverified="that it has a guidance embedding, the guidance to fold, licence",
    ),
    "lcm-lora-sdxl": _lora(
        SDXL,
        "latent-consistency/lcm-lora-sdxl",
        "pytorch_lora_weights.safetensors",
        LCM,
        4,
        note="reported to edit poorly",
        unverified="licence",
    ),
    "turbo-sdxl": Preset(
        SDXL,
        "distilled",
        "stabilityai/sdxl-turbo",
        "EulerAncestralDiscreteScheduler",
        5,
        subfolder="unet",
        variant="fp16",
        base=SDXL_BASE,
        weight=0.5,
        scheduler_settings=TRAILING,
        guidance_scale=2.0,
        licence="sai-nc-community",
        note="reported: 5 steps, guidance 2, 768 pixels only, with LCMScheduler",
        unverified="the licence's name",
    ),
    **_lightning(),
    **_hyper(SDXL, "SDXL"),
    "dmd2-sdxl-4": Preset(
        SDXL,
        "distilled",
        "tianweiy/DMD2",
        LCM,
        4,
        weight_name="dmd2_sdxl_4step_unet_fp16.safetensors",
        base=SDXL_BASE,
        weight=0.5,
        **DMD2,
    ),
    "dmd2-sdxl-4-lora": _lora(SDXL, "tianweiy/DMD2", "dmd2_sdxl_4step_lora.safetensors", LCM, 4, **DMD2),
    "tcd-sdxl": _lora(
        SDXL,
        "h1t/TCD-SDXL-LoRA",
        "pytorch_lora_weights.safetensors",
        TCD,
        4,
        eta=0.3,
        guidance_scale=1.0,
        note="pipelines pass eta 0 in place of TCD's 0.3: give it",
        unverified="settings, licence",
    ),
    **_pcm(SDXL, "sdxl", "file names, licence"),
    "flash-sdxl": _lora(
        SDXL,
        "jasperai/flash-sdxl",
        "pytorch_lora_weights.safetensors",
        LCM,
        4,
        scheduler_settings=TRAILING,
        guidance_scale=1.0,
        licence=NC_ND,
        note="its licence bars derivatives",
    ),
}


def describe_presets() -> str:
    """The table as text, one preset a line; a star marks what is not verified."""
    header = ("preset", "source", "minus", "weight", "scheduler", "steps", "guidance", "eta", "licence", "not verified")
    rows = [header]
    for name, preset in PRESETS.items():
        source = "/".join(part for part in (preset.id, preset.subfolder, preset.weight_name) if part)
        settings = ", ".join(f"{key}={value}" for key, value in preset.scheduler_settings.items())
        scheduler = preset.scheduler.removesuffix("Scheduler") + (f" ({settings})" if settings else "")
        rows.append(
            (
                name,
                source,
                preset.base or "-",
                f"{preset.weight:g}",
                scheduler,
                str(preset.steps),
                f"{preset.guidance_scale:g} / {preset.image_guidance_scale:g}",
                f"{preset.eta:g}",
                preset.licence or "-",
                preset.unverified or "-",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)
