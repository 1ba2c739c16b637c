"""Loading an editor, and fusing an adapter (LoRA, DoRA) in diffusers' format into it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from huggingface_hub import hf_hub_download

from utils.editing.edit_images import Editor
from utils.errors import InputError, explaining_load_errors
from utils.hub_names import looks_like_path
from utils.models.single_file import COMPONENTS, is_single_file, load_single_file, read_single_file
from utils.models.stable_diffusion import (
    EDITOR_CHANNELS,
    Configs,
    StableDiffusion,
    editor_class,
    make_editor,
    require_editor,
    widen_conv_in,
)
from utils.weight_files import read_header

NEEDED = "give an InstructPix2Pix editor of Stable Diffusion 1.x/2.x or SDXL"
CONV_IN = "unet.conv_in.lora_A.weight"  # (rank, channels, 3, 3)
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
ADAPTER_ADVICE = f"give the folder of an adapter, its {LORA_WEIGHT_NAME_SAFE}, or its id on the Hub"


@dataclass(frozen=True)
class Adapter:
    """An adapter's file, and the shapes of its tensors by their names."""

    name: str
    file: Path
    shapes: dict[str, tuple[int, ...]]

    @property
    def in_channels(self) -> int | None:
        """The input channels of its conv_in; None where it does not change conv_in."""
        return self.shapes[CONV_IN][1] if CONV_IN in self.shapes else None


def load_editor(
    path_or_id: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | Path | None = None,
    single_file_config: str | None = None,
    lora: str | Path | None = None,
    lora_scale: float = 1.0,
    safety_checker: bool = True,
) -> Editor:
    """Load an SD 1.x/2.x or SDXL editor from a folder, a Hub id or one .safetensors file.

    lora: an adapter (folder, file or Hub id) to fuse into the weights with `lora_scale`. An adapter that was trained on
    a text-to-image model turns that model into an editor. single_file_config: see `read_single_file`.

    Model and adapter are checked by their small files and headers before any weights are read or downloaded.
    Raises InputError where one is missing, damaged, out of reach, or not an editor.
    """
    name, place = str(path_or_id), {"revision": revision, "cache_dir": cache_dir}
    is_file = is_single_file(name)
    configs = Configs(*read_single_file(name, single_file_config, cache_dir)) if is_file else _read_configs(name, place)
    adapter = inspect_adapter(str(lora), cache_dir) if lora else None
    if not adapter or configs.unet.get("in_channels", 4) != 4:
        require_editor(configs, name)
    if adapter:
        _require_matching(adapter, configs.unet, name)
    with explaining_load_errors(f"the model {name}"):
        if is_file:
            parts = StableDiffusion(**load_single_file(name, single_file_config, cache_dir))
            pipeline = make_editor(parts, parts.scheduler).to(dtype)
        else:
            # Always a dtype: without it, diffusers and transformers would choose different ones.
            settings = dict(dtype=dtype, variant=variant)
            pipeline = editor_class(configs.is_sdxl).from_pretrained(name, **settings, **place)
    if getattr(pipeline, "is_cosxl_edit", False):
        pipeline.register_to_config(is_cosxl_edit=True)  # stock diffusers would not save it
    if not safety_checker and getattr(pipeline, "safety_checker", None) is not None:
        pipeline.register_modules(safety_checker=None)
    pipeline.to(device)
    if adapter:
        if pipeline.unet.config.in_channels != EDITOR_CHANNELS:
            widen_conv_in(pipeline.unet)
        fuse_adapter(pipeline, adapter, lora_scale)
    return pipeline


def _read_configs(name: str, place: dict) -> Configs:
    """The UNet's configuration of a pipeline. Raises `InputError` for anything but Stable Diffusion."""
    if not Path(name).is_dir() and looks_like_path(name):
        raise InputError(f"the model folder {name} does not exist")
    with explaining_load_errors(f"the model {name}"):
        index = DiffusionPipeline.load_config(name, **place)
        if missing := [part for part, source in index.items() if _is_missing(name, part, source)]:
            raise InputError(f"the model {name} is incomplete: missing {', '.join(missing)}")
        kind = index.get("_class_name", "pipeline without a class")
        if missing := [part for part in COMPONENTS if index.get(part, [None])[0] is None]:
            raise InputError(f"the model {name} is a {kind} without {', '.join(missing)}: {NEEDED}")
        unet = UNet2DConditionModel.load_config(name, subfolder="unet", **place)
    configs = Configs(unet=unet, vae={}, scheduler={})
    if configs.is_sdxl != ("text_encoder_2" in index) or unet.get("_class_name") != "UNet2DConditionModel":
        raise InputError(f"the model {name} is a {kind} with a {unet.get('_class_name')}: {NEEDED}")
    return configs


def _is_missing(name: str, part: str, source: object) -> bool:
    """Whether a local pipeline has no folder for a component of its index (`"unet": ["diffusers", "UNet…"]`)."""
    is_component = isinstance(source, list) and source[0] is not None
    return is_component and Path(name).is_dir() and not (Path(name) / part).is_dir()


def inspect_adapter(name: str, cache_dir: str | Path | None = None) -> Adapter:
    """The adapter in a folder or file, or downloaded from the Hub; only its header is read. Raises `InputError`."""
    file = _find_adapter_file(name, cache_dir)
    shapes, _ = read_header(file, f"the adapter {name}")
    if not any("lora" in key for key in shapes):
        raise InputError(f"the adapter {name} has no LoRA weights: {ADAPTER_ADVICE}")
    return Adapter(name, file, shapes)


def _find_adapter_file(name: str, cache_dir: str | Path | None) -> Path:
    path = Path(name)
    if path.suffix.lower() in PICKLES:
        raise InputError(f"the adapter {name} is not a .safetensors file: other formats can run code, convert it")
    if path.is_file():
        return path
    if path.is_dir():
        if (path / LORA_WEIGHT_NAME_SAFE).is_file():
            return path / LORA_WEIGHT_NAME_SAFE
        raise InputError(f"the adapter {name} is incomplete: missing {LORA_WEIGHT_NAME_SAFE}")
    if looks_like_path(name) or path.suffix == ".safetensors":
        raise InputError(f"the adapter {name} does not exist ({ADAPTER_ADVICE})")
    with explaining_load_errors(f"the adapter {name}", ADAPTER_ADVICE):
        return Path(hf_hub_download(name, LORA_WEIGHT_NAME_SAFE, cache_dir=cache_dir))


def _require_matching(adapter: Adapter, unet_config: dict, model: str) -> None:
    """Compare shapes, without loading weights. Raises `InputError` if the adapter is for another model."""
    if unet_config.get("in_channels", 4) != EDITOR_CHANNELS and adapter.in_channels is None:
        raise InputError(
            f"the adapter {adapter.name} cannot turn the text-to-image model {model} into an editor: it has no conv_in "
            f"for {EDITOR_CHANNELS} channels. If it was trained on an editor, give that editor as the model"
        )
    if adapter.in_channels not in (None, EDITOR_CHANNELS):
        raise InputError(
            f"the adapter {adapter.name} is for a UNet with {adapter.in_channels} input channels: an editor has "
            f"{EDITOR_CHANNELS}"
        )
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config({**unet_config, "in_channels": EDITOR_CHANNELS})
    if problem := _find_mismatch(adapter, unet):
        raise InputError(f"the adapter {adapter.name} was trained on another model than {model}: {problem}")


def _find_mismatch(adapter: Adapter, unet: UNet2DConditionModel) -> str | None:
    """The first layer of the adapter that the UNet does not have, or has in another size; None if all match."""
    modules = dict(unet.named_modules())
    for key, shape in adapter.shapes.items():
        for part, side, kind in ((".lora_A.weight", 1, "inputs"), (".lora_B.weight", 0, "outputs")):
            if not (key.startswith("unet.") and key.endswith(part)):  # other formats are left to diffusers
                continue
            layer = key.removeprefix("unet.").removesuffix(part)
            if layer not in modules:
                return f"the model has no layer {layer}"
            size = modules[layer].weight.shape[side]
            if shape[side] != size:
                return f"its {layer} has {shape[side]} {kind}, the model's has {size}"
    return None


@torch.no_grad()
def fuse_adapter(pipeline: DiffusionPipeline, adapter: Adapter, scale: float = 1.0) -> None:
    """Add the adapter to the weights of a pipeline, so that it costs no time per step. Raises `InputError`.

    pipeline: any of Stable Diffusion or SDXL whose shapes match; scale: factor of the adapter's change of the weights.
    """
    with explaining_load_errors(f"the adapter {adapter.name}", ADAPTER_ADVICE):
        pipeline.load_lora_weights(str(adapter.file.parent), weight_name=adapter.file.name)
        if not any(pipeline.get_list_adapters().values()):
            raise InputError(f"the adapter {adapter.name} changes nothing in a {type(pipeline).__name__}")
        pipeline.fuse_lora(lora_scale=scale, safe_fusing=True)
        pipeline.unload_lora_weights()
