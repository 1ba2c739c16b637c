"""Schedulers by name, made from the configuration of a model's own."""

from __future__ import annotations

from typing import Any

from utils.errors import InputError

# name: diffusers' class, and what it is set to. Nothing heavy is imported here: the names stand in --help.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm++_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "edm_euler": ("EDMEulerScheduler", {}),
    "edm_dpm++": ("EDMDPMSolverMultistepScheduler", {}),
}
SPACINGS = ("leading", "linspace", "trailing")
# Names that classes use for different things: UniPC's "bh2" is no solver of DPM-Solver, and so on.
NOT_SHARED = ("algorithm_type", "solver_type", "solver_order", "final_sigmas_type", "sigma_schedule")
# Where the model's configuration does not say it: diffusers' defaults are those of diffusion on pixels.
OF_LATENTS = {"clip_sample": False, "set_alpha_to_one": False}
OWN_TIMESTEPS = ("LCMScheduler", "TCDScheduler")  # their timesteps are those of their distillation, without spacing


def choose_scheduler(own: Any, name: str | None = None, timestep_spacing: str | None = None) -> Any:
    """A scheduler like `own`, the model's, with its betas and kind of prediction, and of another class or spacing.

    name: one of `SCHEDULERS` or the name of such a class; None keeps the class. Its timesteps are spaced as in the
    model's configuration unless `timestep_spacing` says otherwise; few steps want "trailing" (2305.08891).
    Raises InputError for a name that is none, and for what would have no effect or edit with the wrong noise.
    """
    import diffusers

    own_class = type(own).__name__
    class_name, changes = SCHEDULERS.get(name or "", (name or own_class, {}))
    if class_name != own_class and class_name not in {kind for kind, _ in SCHEDULERS.values()}:
        raise InputError(f"--scheduler {name} is not known: choose one of {', '.join(SCHEDULERS)}")
    if class_name.startswith("EDM") != own_class.startswith("EDM"):
        kind = "edm_euler or edm_dpm++" if own_class.startswith("EDM") else "one that is not of EDM"
        raise InputError(f"--scheduler {name} has other noise levels than this model's {own_class}: choose {kind}")
    if timestep_spacing is not None:
        if class_name in OWN_TIMESTEPS or class_name.startswith("EDM"):
            raise InputError(f"--timestep_spacing {timestep_spacing} has no effect on {class_name}: leave it out")
        changes = changes | {"timestep_spacing": timestep_spacing}
    config = dict(own.config)
    if class_name != own_class:
        unset = own.config.get("_use_default_values", ())
        config = OF_LATENTS | {key: value for key, value in config.items() if key not in (*NOT_SHARED, *unset)}
    try:
        return getattr(diffusers, class_name).from_config(config, **changes)
    except (ValueError, NotImplementedError) as error:
        raise InputError(f"--scheduler {name or own_class} cannot take this model's settings: {error}") from error
