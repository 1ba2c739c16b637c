"""The names under which adapters store the layers of a model: `adapter_files` says which tools write which."""

import re
from collections.abc import Iterable, Mapping

from utils.models.unet_names import original_names

_SUFFIXES = (  # what a stored name ends in -> the part of the layer
    (r"[._]lora_A(\.\w+)?\.weight", "down"),
    (r"[._]lora_B(\.\w+)?\.weight", "up"),
    (r"\.lora_down\.weight", "down"),
    (r"\.lora_up\.weight", "up"),
    (r"\.lora_mid\.weight", "mid"),
    (r"[._]lora\.down\.weight", "down"),
    (r"[._]lora\.up\.weight", "up"),
    (r"\.lora_linear_layer\.down\.weight", "down"),
    (r"\.lora_linear_layer\.up\.weight", "up"),
    (r"\.alpha", "alpha"),
    (r"\.dora_scale", "magnitude"),
    (r"\.lora_magnitude_vector(\.\w+)?(\.weight)?", "peft_magnitude"),
    (r"\.lora_B(\.\w+)?\.bias", "bias"),
)
_SUFFIX = [(re.compile(rf"(.+?){pattern}\Z"), part) for pattern, part in _SUFFIXES]
EMBEDDING = re.compile(r"bundle_emb\.([^.]+)\.|(?:emb_params|string_to_param)\b")
# The prefixes of a component in stored names; the first that fits decides.
_PREFIXES = {
    "unet": ("unet.base_model.model.", "unet.", "model.diffusion_model.", "diffusion_model.", "lora_unet_"),
    "text_encoder_2": ("text_encoder_2.", "lora_te2_"),
    "text_encoder": ("text_encoder.", "lora_te1_", "lora_te_"),
}


def split_name(name: str) -> tuple[str, str | None]:
    """(layer, part) of a stored name; (name, None) for a whole weight."""
    for pattern, part in _SUFFIX:
        if match := pattern.match(name):
            return match[1], part
    return name, None


def known_names(component: str, parameters: Iterable[str], layers_per_block: int | list[int]) -> dict[str, str]:
    """The names that files use for a layer, without a component's prefix -> the layer."""
    layers = {name.removesuffix(".weight") for name in parameters if name.endswith(".weight")}
    names = {layer: layer for layer in layers}
    if component == "unet":
        names |= {original: layer for layer, original in original_names(layers, layers_per_block).items()}
    else:
        names |= {f"text_model.{layer}": layer for layer in layers}
        names |= {layer.removeprefix("text_model."): layer for layer in layers}
    names |= {name.replace(".", "_"): layer for name, layer in names.items()}
    return names


def find_layer(stored: str, known: Mapping[str, Mapping[str, str]]) -> tuple[str | None, str | None]:
    """(component, layer) of a stored layer name; (None, None) for a component that is not asked for."""
    for component, prefixes in _PREFIXES.items():
        if prefix := next((prefix for prefix in prefixes if stored.startswith(prefix)), None):
            if component not in known:
                return None, None
            return component, _match(stored.removeprefix(prefix), known[component])
    return "unet", _match(stored, known["unet"])


def _match(stored: str, names: Mapping[str, str]) -> str | None:
    stored = stored.removeprefix("base_model.model.").removesuffix(".base_layer")
    stored = re.sub(r"\.modules_to_save(\.\w+)?$", "", stored)
    if stored in names:
        return names[stored]
    # diffusers before 0.17: attn1.processor.to_q_lora, and to_out_lora for to_out.0; self_attn.to_q_lora for q_proj
    old = stored.replace(".processor", "")
    for before, after in (
        ("to_out", "to_out.0"),
        *((f"to_{x}", f"{x}_proj") for x in ("q", "k", "v")),
        ("to_out", "out_proj"),
    ):
        candidate = re.sub(rf"{before}(_lora)?$", after, old)
        if candidate in names:
            return names[candidate]
    return names.get(old.removesuffix("_lora"))
