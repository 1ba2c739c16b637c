"""Schedulers by name, created from the configuration of a model's own scheduler. Nothing heavy is imported here."""

import inspect
from typing import Any

from utils.errors import InputError

# name of --scheduler -> (class of diffusers, changes of its configuration)
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
# Settings that mean different things in different classes: UniPC's solver "bh2" is unknown to DPM-Solver.
NOT_SHARED = ("algorithm_type", "solver_type", "solver_order", "final_sigmas_type", "sigma_schedule")
# Used where the model's configuration has no value: the defaults of diffusers are for diffusion on pixels.
LATENT_DEFAULTS = {"clip_sample": False, "set_alpha_to_one": False}
OWN_TIMESTEPS = ("LCMScheduler", "TCDScheduler")  # the distillation fixed their timesteps: no spacing


def choose_scheduler(
    own: Any, name: str | None = None, timestep_spacing: str | None = None, karras_sigmas: bool = False
) -> Any:
    """A scheduler with the noise schedule and prediction type of `own`, the model's, but another class or spacing.

    name: a key of `SCHEDULERS` or a class name among its values; None keeps the class. timestep_spacing: None keeps
    that of the model; "trailing" is best for few steps (arXiv 2305.08891). karras_sigmas: the noise levels of Karras et
    al. (arXiv 2206.00364, equation 5). Raises InputError for an unknown name, for noise levels that the model was not
    trained on, and for a spacing or sigmas that have no effect.
    """
    import diffusers

    own_class = type(own).__name__
    class_name, changes = SCHEDULERS.get(name or "", (name or own_class, {}))
    if class_name != own_class and class_name not in {kind for kind, _ in SCHEDULERS.values()}:
        raise InputError(f"--scheduler {name} is unknown: choose one of {', '.join(SCHEDULERS)}")
    if class_name.startswith("EDM") != own_class.startswith("EDM"):
        kind = "edm_euler or edm_dpm++" if own_class.startswith("EDM") else "one without edm_"
        raise InputError(f"--scheduler {name} has other noise levels than the {own_class} of this model: choose {kind}")
    if timestep_spacing is not None:
        if class_name in OWN_TIMESTEPS or class_name.startswith("EDM"):
            raise InputError(f"--timestep_spacing {timestep_spacing} has no effect on {class_name}: remove it")
        changes = changes | {"timestep_spacing": timestep_spacing}
    if karras_sigmas:
        if not _has_karras_sigmas(class_name):
            able = ", ".join(known for known, (kind, _) in SCHEDULERS.items() if _has_karras_sigmas(kind))
            raise InputError(f"--karras_sigmas has no effect on {class_name}: choose --scheduler {able}")
        changes = changes | {"use_karras_sigmas": True}
    config = dict(own.config)
    if class_name != own_class:
        unset = own.config.get("_use_default_values", ())
        config = LATENT_DEFAULTS | {key: value for key, value in config.items() if key not in (*NOT_SHARED, *unset)}
    try:
        return getattr(diffusers, class_name).from_config(config, **changes)
    except (ValueError, NotImplementedError) as error:
        raise InputError(
            f"--scheduler {name or own_class} does not support this model's configuration: {error}"
        ) from error


def _has_karras_sigmas(class_name: str) -> bool:
    import diffusers

    return "use_karras_sigmas" in inspect.signature(getattr(diffusers, class_name)).parameters
