"""Names of UNet layers: diffusers', the original Stable Diffusion's, and kohya's."""

import re
from collections.abc import Collection, Iterable, Sequence

from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING

ORIGINAL_PREFIX = "model.diffusion_model."
# How the names of other components, and of constants, begin in files of whole models.
OTHER_PREFIXES = (
    *("first_stage_model.", "cond_stage_model.", "conditioner.", "model_ema.", "vae.", "text_encoder", "lora_te"),
    *("te1_", "te2_", "alphas_", "betas", "sqrt_", "log_one_minus", "posterior_", "denoiser.", "logvar"),
    *("edm_vpred.", "v_pred", "ztsnr", "safety_checker."),
)
_LDM = DIFFUSERS_TO_LDM_MAPPING["unet"]
_OUTER = {  # layers outside the blocks
    name.removesuffix(".weight"): original.removesuffix(".weight")
    for name, original in (_LDM["layers"] | _LDM["addition_embed_type"]).items()
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_LAYER = re.compile(r"(down_blocks|up_blocks)\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def layers_of(parameters: Iterable[str]) -> list[str]:
    """The distinct layers of parameters: "conv_in.weight" -> "conv_in"."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in parameters))


def original_names(layers: Collection[str], layers_per_block: int | list[int]) -> dict[str, str]:
    """diffusers' layer name -> original name; empty if the blocks have different numbers of layers."""
    counts = {layers_per_block} if isinstance(layers_per_block, int) else set(layers_per_block)
    if len(counts) != 1:
        return {}
    matches = [match for name in layers if (match := _LAYER.match(name))]
    with_attention = {match[2] for match in matches if (match[1], match[3]) == ("up_blocks", "attentions")}
    names = {name: _original_name(name, *counts, with_attention) for name in layers}
    return {name: original for name, original in names.items() if original}


def _original_name(name: str, layers_per_block: int, with_attention: set[str]) -> str | None:
    """with_attention: numbers of the up blocks with attention layers, whose upsampler has another index."""
    if name in _OUTER:
        return _OUTER[name]
    if match := _MIDDLE.fullmatch(name):
        kind, index, rest = match.groups()
        if kind == "attentions":
            return f"middle_block.{2 * int(index) + 1}.{rest}"
        return f"middle_block.{2 * int(index)}.{_RESNET.get(rest, rest)}"
    if not (match := _LAYER.fullmatch(name)):
        return None
    side, block, kind, index, rest = match.groups()
    first = int(block) * (layers_per_block + 1) + (side == "down_blocks")  # input_blocks.0 is conv_in
    blocks = "input_blocks" if side == "down_blocks" else "output_blocks"
    if kind == "downsamplers":
        return f"{blocks}.{first + layers_per_block}.0.op"
    if kind == "upsamplers":
        return f"{blocks}.{first + layers_per_block}.{2 if block in with_attention else 1}.{rest}"
    if kind == "attentions":
        return f"{blocks}.{first + int(index)}.1.{rest}"
    return f"{blocks}.{first + int(index)}.0.{_RESNET.get(rest, rest)}"


def match_parameters(
    stored: Iterable[str], parameters: Collection[str], layers_per_block: int | list[int]
) -> tuple[dict[str, str], list[str], list[str]]:
    """Find a UNet's parameters in a file: (parameter -> stored name, names of other components, unknown names).

    Stored names are diffusers', optionally after "unet.", or the original ones after "model.diffusion_model.".
    """
    originals = original_names(layers_of(parameters), layers_per_block)
    expected = {name: name for name in parameters} | {f"unet.{name}": name for name in parameters}
    for name in parameters:
        layer, _, leaf = name.rpartition(".")
        if layer in originals:
            expected[f"{ORIGINAL_PREFIX}{originals[layer]}.{leaf}"] = name
    found, others, unknown = {}, [], []
    for key in stored:
        if key in expected:
            found[expected[key]] = key
        else:
            (others if key.startswith(OTHER_PREFIXES) else unknown).append(key)
    return found, others, unknown


def block_of(parameter: str) -> str:
    """The block of a parameter in the report: "down_blocks.1.resnets.0.conv1.weight" -> "down_blocks.1"."""
    parts = parameter.split(".")
    return ".".join(parts[:2]) if parts[0] in ("down_blocks", "up_blocks") else parts[0]


def shorten_list(names: Sequence[str], limit: int = 5) -> str:
    """The first names, for a message."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
