"""Model cards: metadata, code example, licences. The texts are in card_templates/.

Nothing that a user named can change the structure of a card, and no access token gets into it.
"""

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard, ModelCardData, constants, get_token

from utils.hub import redact
from utils.hub_names import is_hub_id, public_name
from utils.licences import Licence, is_hub_licence, license_fields, read_license_fields, restrictions_of

TEMPLATES = Path(__file__).parent / "card_templates"
SCHEDULER_SETTINGS = ("prediction_type", "timestep_spacing", "rescale_betas_zero_snr")


@dataclass(frozen=True)
class TrainedModel:
    """What the card of a trained editor says. Paths are relative to the output folder.

    needs_widening: an adapter's base is a text-to-image model, whose conv_in must be widened before loading.
    widget: (validation image, prompt) pairs; samples: contact sheets; results: evaluation results by name.
    """

    base_model: str
    command: Sequence[str]
    pipeline_class: str = "StableDiffusionInstructPix2PixPipeline"
    is_adapter: bool = False
    needs_widening: bool = False
    repo_id: str | None = None
    datasets: Sequence[str] = ()
    hyperparameters: Mapping[str, object] = field(default_factory=dict)
    results: Mapping[str, float] = field(default_factory=dict)
    widget: Sequence[tuple[str, str]] = ()
    samples: Sequence[str] = ()
    curve: str | None = None
    resolution: int | None = None


def write_trained_card(output_dir: Path, model: TrainedModel, token: str | None = None) -> Path:
    """Write `README.md` into the folder of a trained pipeline or adapter."""
    name = (model.repo_id or output_dir.resolve().name).split("/")[-1]
    base_fields = read_license_fields(model.base_model, token)
    license_name = base_fields.get("license_name") or base_fields.get("license", "")
    if not is_hub_licence(base_fields.get("license", "")):
        base_fields = license_fields(license_name)
    hyperparameters = {name: value for name, value in model.hyperparameters.items() if "token" not in name}
    scheduler_file = output_dir / "scheduler" / "scheduler_config.json"
    scheduler = json.loads(scheduler_file.read_text("utf-8")) if scheduler_file.is_file() else {}
    snippet = make_snippet(
        model.pipeline_class,
        model.repo_id or output_dir.name,
        {"num_inference_steps": 20, "guidance_scale": 7.0, "image_guidance_scale": 1.5},
        example=model.widget[0] if model.widget else None,
        is_on_hub=bool(model.repo_id),
        max_side=model.resolution,
        adapter_base=public_name(model.base_model) if model.is_adapter else None,
        needs_widening=model.needs_widening,
    )
    return save_card(
        output_dir,
        "trained_editor.md",
        _trained_metadata(model, name, base_fields),
        token,
        name=name,
        is_adapter=model.is_adapter,
        base=code_names([model.base_model]),
        datasets=code_names(model.datasets),
        resolution=model.resolution,
        snippet=snippet,
        scheduler=scheduler.get("_class_name"),
        scheduler_settings=", ".join(f"`{key}={scheduler[key]}`" for key in SCHEDULER_SETTINGS if key in scheduler),
        is_zero_snr=scheduler.get("rescale_betas_zero_snr"),
        samples=[quote(sample) for sample in model.samples],
        results=make_table(("measure", "value"), model.results),
        command=fence(shlex.join(redact(list(model.command), token or get_token())), "bash"),
        curve=quote(model.curve) if model.curve else None,
        hyperparameters=make_table(("name", "value"), hyperparameters),
        licences=describe_licences([Licence(model.base_model, license_name, restrictions_of(license_name))]),
    )


def _trained_metadata(model: TrainedModel, name: str, license_fields: Mapping[str, str]) -> ModelCardData:
    family = "stable-diffusion-xl" if "XL" in model.pipeline_class else "stable-diffusion"
    tags = [family, f"{family}-diffusers", "instruct-pix2pix", "image-to-image", "diffusers", "diffusers-training"]
    url = f"{constants.ENDPOINT}/{model.repo_id}/resolve/main/" if model.repo_id else ""
    dataset = model.datasets[0] if model.datasets else "held-out rows"
    results = [
        EvalResult(
            task_type="image-to-image",
            dataset_type=dataset if is_hub_id(dataset) else "local",
            dataset_name=public_name(dataset),
            metric_type=re.sub(r"\W+", "_", measure),
            metric_name=measure,
            metric_value=float(value),
        )
        for measure, value in model.results.items()
        if math.isfinite(value)
    ]
    return make_metadata(
        license_fields,
        [model.base_model],
        "adapter" if model.is_adapter else "finetune",
        tags + (["lora"] if model.is_adapter else []),
        datasets=[dataset for dataset in model.datasets if is_hub_id(dataset)] or None,
        widget=[{"src": url + quote(path), "prompt": prompt} for path, prompt in model.widget] or None,
        model_name=name,
        eval_results=results or None,
    )


# ---- what all cards share -------------------------------------------------------------------------------------------


def make_metadata(
    license_fields: Mapping[str, str], base_models: Sequence[str], relation: str, tags: list[str], **fields: object
) -> ModelCardData:
    """The YAML metadata of a card. The Hub only accepts ids as base models, so local folders are left out.

    relation: "adapter", "finetune" or "merge". fields: more fields of `ModelCardData`.
    """
    bases = [name for name in base_models if is_hub_id(name)]
    return ModelCardData(
        license=license_fields.get("license", "other"),
        license_name=license_fields.get("license_name"),
        license_link=license_fields.get("license_link"),
        base_model=(bases if len(bases) > 1 else bases[0]) if bases else None,
        base_model_relation=relation if bases else None,
        library_name="diffusers",
        pipeline_tag="image-to-image",
        tags=tags,
        **fields,
    )


def save_card(folder: Path, template: str, metadata: ModelCardData, token: str | None = None, **values: object) -> Path:
    """Render a template of card_templates/ and save it as `README.md`, without access tokens."""
    card = ModelCard.from_template(metadata, template_path=str(TEMPLATES / template), **values)
    unfinished = folder / ".README.md"
    ModelCard(redact(str(card), token or get_token())).save(unfinished)
    return unfinished.replace(folder / "README.md")


def make_snippet(
    pipeline_class: str,
    model: str,
    settings: Mapping[str, float],
    *,
    example: tuple[str, str] | None = None,
    is_on_hub: bool = False,
    max_side: int | None = None,
    adapter_base: str | None = None,
    needs_widening: bool = False,
) -> str:
    """A fenced Python example that edits an image with stock diffusers, on a GPU or the CPU.

    model: Hub id or folder. settings: arguments of the pipeline call. example: (image in the model's repository or
    folder, prompt). adapter_base: the base model that `model` is a LoRA of.
    """
    image, prompt = '"photograph.jpg"', "make it a watercolor painting"
    if example:
        path, prompt = _literal(example[0]), example[1]
        image = f"hf_hub_download(model, {path})" if is_on_hub else f'model + "/" + {path}'
    # Without a size, the SDXL pipeline squashes the image into a square.
    size = {"height": "image.height // 8 * 8", "width": "image.width // 8 * 8"} if "XL" in pipeline_class else {}
    lines = [
        "import torch",
        f"from diffusers import {pipeline_class}{', UNet2DConditionModel' if adapter_base else ''}",
        "from diffusers.utils import load_image",
        *(["from huggingface_hub import hf_hub_download"] if "hf_hub_download" in image else []),
        "",
        f"model = {_literal(model)}",
        'device = "cuda" if torch.cuda.is_available() else "cpu"',
        'dtype = torch.float16 if device == "cuda" else torch.float32',
        *_loading(pipeline_class, adapter_base, needs_widening),
        "",
        f"image = load_image({image})",
        *([f"image.thumbnail(({max_side}, {max_side}))"] if max_side else []),
        "edited = pipeline(",
        f"    {_literal(prompt)},",
        "    image=image,",
        *(f"    {name}={value}," for name, value in (size | dict(settings)).items()),
        "    generator=torch.manual_seed(0),",
        ").images[0]",
        'edited.save("edited.png")',
    ]
    return fence("\n".join(lines), "python")


def _loading(pipeline_class: str, adapter_base: str | None, needs_widening: bool) -> list[str]:
    """The lines that load the pipeline onto `device`, or the adapter onto its base."""
    if not adapter_base:
        return [f"pipeline = {pipeline_class}.from_pretrained(model).to(device, dtype)"]
    widening = [
        "# Four more input channels for the image latents; the adapter fills them.",
        "old = unet.conv_in",
        'weights = {"weight": torch.nn.functional.pad(old.weight, (0, 0, 0, 0, 0, 4)), "bias": old.bias}',
        "unet.conv_in = torch.nn.Conv2d(8, old.out_channels, old.kernel_size, padding=old.padding)",
        "unet.conv_in.load_state_dict(weights)",
        "unet.register_to_config(in_channels=8)",
    ]
    return [
        "",
        f"base = {_literal(adapter_base)}",
        'unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")',
        *(widening if needs_widening else []),
        f"pipeline = {pipeline_class}.from_pretrained(base, unet=unet)",
        "pipeline.load_lora_weights(model)",
        "pipeline = pipeline.to(device, dtype)",
    ]


def describe_licences(licences: Sequence[Licence]) -> str:
    """A list of the licences that apply to the model."""
    lines = []
    for licence in licences:
        text = "**unknown; look it up and fill in `license` in the metadata before publishing**"
        if licence.name:
            text = f"`{licence.name}`"
        if licence.restrictions:
            text += f"; it is **{' and '.join(licence.restrictions)}**"
        text += ". Its terms apply to this model, to models derived from it and to their users."
        if "openrail" in licence.name.lower():
            text += " OpenRAIL licences forbid the uses listed in their Attachment A."
        lines.append(f"- {code_names([licence.source])}: {text}")
    return "\n".join(lines)


def make_table(header: tuple[str, str], rows: Mapping[str, object]) -> str:
    """A Markdown table of names and values; "" without rows."""

    def cell(value: object) -> str:
        text = json.dumps(value) if isinstance(value, (dict, list)) else str(value)
        text = f"{value:.6g}" if isinstance(value, float) else text
        return text.replace("|", "\\|").replace("\n", " ")

    lines = [f"| {key} | {cell(value)} |" for key, value in rows.items()]
    return "\n".join([f"| {header[0]} | {header[1]} |", "|---|---|", *lines]) if rows else ""


def code_names(names: Sequence[str]) -> str:
    """Models or datasets in words, such as "`a`, `b` and `c`". Of a local path only the last part is shown."""
    shown = ["`" + " ".join(public_name(name).replace("`", "'").split()) + "`" for name in names]
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def fence(code: str, language: str) -> str:
    """A Markdown code block that the code cannot end."""
    marks = "`" * max([3, *(len(run) + 1 for run in re.findall("`{3,}", code))])
    return f"{marks}{language}\n{code}\n{marks}"


def _literal(text: str) -> str:
    """A Python string literal in double quotes, without backticks, which could end the code block."""
    return json.dumps(text, ensure_ascii=False).replace("`", "\\u0060")
