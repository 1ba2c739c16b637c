"""Pipelines in one file with the names of the original code (LDM, SGM, open_clip), which diffusers converts back."""

import re
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

UNET = "model.diffusion_model."
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
VAE = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
    "downsamplers.0.conv": "downsample.conv",
    "upsamplers.0.conv": "upsample.conv",
}
OPEN_CLIP = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_model.encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "fc1": "c_fc",
    "fc2": "c_proj",
    "self_attn": "attn",
    "text_projection.weight": "text_projection",
}


def unet_name(name: str, layers: int) -> str:
    """The original name of a UNet's weight; `layers` per block."""
    for ours, original in ENDS.items():
        if name.startswith(f"{ours}."):
            return UNET + name.replace(ours, original)
    match = re.fullmatch(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|\w+samplers)\.(\d+)\.(.+)", name)
    side, block, kind, index, rest = match.groups()
    block, index = int(block or 0), int(index)
    if kind == "resnets":
        part, _, value = rest.partition(".")
        rest = f"{RESNET[part]}.{value}"
    if side == "mid":
        return f"{UNET}middle_block.{1 if kind == 'attentions' else 2 * index}.{rest}"
    first = block * (layers + 1)
    if kind == "downsamplers":
        return f"{UNET}input_blocks.{1 + first + layers}.0.{rest.replace('conv', 'op')}"
    place = f"input_blocks.{1 + first + index}" if side == "down" else f"output_blocks.{first + index}"
    return f"{UNET}{place}.{0 if kind == 'resnets' else 1}.{rest}"


def unet_weights(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    layers, weights = unet.config.layers_per_block, {}
    for name, value in unet.state_dict().items():
        if "upsamplers" in name:  # after the attention, if the block has one
            block = int(name.split(".")[1])
            position = 2 if "CrossAttn" in unet.config.up_block_types[block] else 1
            end = name.split("upsamplers.0.")[1]
            weights[f"{UNET}output_blocks.{block * (layers + 1) + layers}.{position}.{end}"] = value
        else:
            weights[unet_name(name, layers)] = value
    return weights


def vae_weights(vae: torch.nn.Module) -> dict[str, torch.Tensor]:
    blocks, weights = len(vae.config.up_block_types), {}
    for name, value in vae.state_dict().items():
        if ".attentions." in name and name.endswith("weight") and value.ndim == 2:
            value = value[:, :, None, None]  # a convolution of size 1 there
        for ours, original in VAE.items():
            name = name.replace(f"{ours}.", f"{original}.")
        name = re.sub(r"down_blocks\.(\d+)", r"down.\1", name)
        name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{blocks - 1 - int(match[1])}", name)
        weights[f"first_stage_model.{name.replace('resnets', 'block')}"] = value
    return weights


def clip_weights(text_encoder: torch.nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}text_model.{n.removeprefix('text_model.')}": v for n, v in text_encoder.state_dict().items()}


def open_clip_weights(text_encoder: torch.nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    state = {  # transformers names the same weights with and without the model's own name
        name if name.startswith("text_") else f"text_model.{name}": value
        for name, value in text_encoder.state_dict().items()
    }
    weights = {}
    for name, value in state.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:  # one matrix for q, k and v
            value = torch.cat([state[name.replace("q_proj", f"{kind}_proj")] for kind in "qkv"])
            name = name.replace("q_proj.", "in_proj_")
        if name == "text_projection.weight":
            value = value.T
        for ours, original in OPEN_CLIP.items():
            name = name.replace(ours, original)
        weights[prefix + name] = value
    return weights | {f"{prefix}logit_scale": torch.tensor(4.6)}


def original_weights(pipeline: DiffusionPipeline) -> dict[str, torch.Tensor]:
    """The weights of an SD 1.x or SDXL pipeline by their original names."""
    weights = unet_weights(pipeline.unet) | vae_weights(pipeline.vae)
    if getattr(pipeline, "text_encoder_2", None) is None:
        return weights | clip_weights(pipeline.text_encoder, "cond_stage_model.transformer.")
    weights |= clip_weights(pipeline.text_encoder, "conditioner.embedders.0.transformer.")
    return weights | open_clip_weights(pipeline.text_encoder_2, "conditioner.embedders.1.model.")


def write_single_file(pipeline: DiffusionPipeline, path: Path, extra: dict[str, torch.Tensor] | None = None) -> Path:
    """Write the pipeline's weights, and extra tensors, into one file."""
    weights = original_weights(pipeline) | (extra or {})
    save_file({name: value.clone().contiguous() for name, value in weights.items()}, path)
    return path
