"""The names of a UNet's layers: diffusers', those of the original Stable Diffusion, and kohya's, all in one table."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

ORIGINAL_PREFIX = "model.diffusion_model."
OTHER_PARTS = (
    "first_stage_model.",
    "cond_stage_model.",
    "conditioner.",
    "model_ema.",
    "vae.",
    "text_encoder",
    "lora_te",
    "te1_",
    "te2_",
    "alphas_",
    "betas",
    "sqrt_",
    "log_one_minus",
    "posterior_",
    "denoiser.",
    "logvar",
    "edm_vpred.",
    "v_pred",
    "ztsnr",
    "safety_checker.",
)
_OUTER = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
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


def modules_of(parameters: Iterable[str]) -> list[str]:
    """The layers that parameters belong to, each once."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in parameters))


def original_names(modules: Collection[str], layers_per_block: int | list[int]) -> dict[str, str]:
    """diffusers' name -> the original's, for the layers that have one; empty where blocks differ in their layers."""
    if not isinstance(layers_per_block, int):
        if len(set(layers_per_block)) != 1:
            return {}
        layers_per_block = layers_per_block[0]
    with_attention = {match[2] for name in modules if (match := _LAYER.match(name)) and _is_up_attention(match)}
    found = {name: _original_name(name, layers_per_block, with_attention) for name in modules}
    return {name: original for name, original in found.items() if original}


def _is_up_attention(match: re.Match) -> bool:
    return match[1] == "up_blocks" and match[3] == "attentions"


def _original_name(name: str, layers: int, with_attention: set[str]) -> str | None:
    if name in _OUTER:
        return _OUTER[name]
    if match := _MIDDLE.fullmatch(name):
        kind, index, rest = match.groups()
        place = f"middle_block.{2 * int(index) if kind == 'resnets' else 2 * int(index) + 1}"
        return f"{place}.{_RESNET.get(rest, rest) if kind == 'resnets' else rest}"
    if not (match := _LAYER.fullmatch(name)):
        return None
    side, block, kind, index, rest = match.groups()
    if side == "down_blocks":
        first = 1 + int(block) * (layers + 1)
        if kind == "downsamplers":
            return f"input_blocks.{first + layers}.0.op"
        place = f"input_blocks.{first + int(index)}"
    else:
        first = int(block) * (layers + 1)
        if kind == "upsamplers":
            return f"output_blocks.{first + layers}.{2 if block in with_attention else 1}.{rest}"
        place = f"output_blocks.{first + int(index)}"
    return f"{place}.0.{_RESNET.get(rest, rest)}" if kind == "resnets" else f"{place}.1.{rest}"


def match_parameters(
    stored: Iterable[str], parameters: Collection[str], layers_per_block: int | list[int]
) -> tuple[dict[str, str], list[str], list[str]]:
    """Find a UNet's parameters in a file: (parameter -> stored name, names of other parts, names that fit nothing).

    stored: diffusers' names, the same below "unet.", or the original's below "model.diffusion_model.".
    """
    originals = original_names(modules_of(parameters), layers_per_block)
    wanted = {name: name for name in parameters} | {f"unet.{name}": name for name in parameters}
    for name in parameters:
        module, _, leaf = name.rpartition(".")
        if module in originals:
            wanted[f"{ORIGINAL_PREFIX}{originals[module]}.{leaf}"] = name
    found, others, unknown = {}, [], []
    for key in stored:
        if key in wanted:
            found[wanted[key]] = key
        elif key.startswith(OTHER_PARTS):
            others.append(key)
        else:
            unknown.append(key)
    return found, others, unknown


def flat_names(parameters: Collection[str], layers_per_block: int | list[int]) -> dict[str, str]:
    """kohya's names of layers, with underscores for points, in diffusers' and the original's spelling -> layer."""
    modules = modules_of(parameters)
    originals = original_names(modules, layers_per_block)
    flat = {original.replace(".", "_"): name for name, original in originals.items()}
    return flat | {name.replace(".", "_"): name for name in modules}


def block_of(parameter: str) -> str:
    """The block that a report counts a parameter to: "down_blocks.1.resnets.0.conv1.weight" -> "down_blocks.1"."""
    parts = parameter.split(".")
    return ".".join(parts[:2]) if parts[0] in ("down_blocks", "up_blocks") else parts[0]
