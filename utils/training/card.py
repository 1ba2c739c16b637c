"""The model card: what a published editor is, how it was made, how to use it, and where it fails."""

from __future__ import annotations

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
from utils.licences import read_license_fields

LIMITATIONS = """\
- It learned from {datasets} and edits in the way of those pairs; an instruction of another kind is often ignored.
- Counting, writing, moving objects from place to place and exact spatial relations are weak, and fine detail is lost
  in the autoencoder. Faces may change although the instruction does not ask for it.
- Both scales matter: a higher `guidance_scale` edits more, a higher `image_guidance_scale` keeps more of the input.
  The pipeline turns all guidance off when `guidance_scale` is 1 or less, or `image_guidance_scale` less than 1.
- The base model learned from images and captions collected from the web. It shows their biases (of gender, skin colour,
  culture and language; it understands mostly English), and so does this editor.
- It must not be used to deceive, to harm, or to alter pictures of people without their consent."""


@dataclass(frozen=True)
class ModelFacts:
    """What the card tells. Paths are relative to the output folder; a local base model or dataset is named, not linked.

    `widget` pairs an input image with its instruction, `samples` are validation pictures, `results` held-out measures.
    """

    base_model: str
    command: Sequence[str]
    pipeline_class: str = "StableDiffusionInstructPix2PixPipeline"
    is_adapter: bool = False  # the folder holds a LoRA for the base, and not a whole pipeline
    is_base_widened: bool = False  # the base is a text-to-image model, whose first convolution must be widened
    repo_id: str | None = None
    datasets: Sequence[str] = ()
    hyperparameters: Mapping[str, object] = field(default_factory=dict)
    results: Mapping[str, float] = field(default_factory=dict)
    widget: Sequence[tuple[str, str]] = ()
    samples: Sequence[str] = ()
    curve: str | None = None
    resolution: int | None = None
    guidance_scale: float = 7.0
    image_guidance_scale: float = 1.5


def write_card(output_dir: str | Path, facts: ModelFacts, token: str | None = None) -> Path:
    """Write `README.md`, the model card, into a saved pipeline; no token gets into it, from wherever it comes."""
    output_dir, login = Path(output_dir), token or get_token()
    name = (facts.repo_id or output_dir.resolve().name).split("/")[-1]
    license_fields = read_license_fields(facts.base_model, token)
    metadata = _metadata(facts, name, license_fields)
    snippet = _snippet(facts, output_dir.name)
    body = _body(facts, name, license_fields, snippet, _scheduler_note(output_dir), login)
    # The metadata is redacted as text too: a prompt or a name could hold anything.
    card = ModelCard(redact(f"---\n{metadata.to_yaml()}\n---\n\n{body}\n", login))
    half_written = output_dir / ".README.md"
    card.save(half_written)
    return half_written.replace(output_dir / "README.md")


def _body(
    facts: ModelFacts, name: str, license_fields: Mapping[str, str], snippet: str, note: str, login: str | None
) -> str:
    shown = {key: value for key, value in facts.hyperparameters.items() if "token" not in key}
    sections = [
        f"# {name}",
        _summary(facts),
        "## Use",
        f"```python\n{snippet}\n```",
        note,
        *_pictures("## Samples", facts.samples, "validation sample"),
        *_table("## Results", ("measure", "value"), facts.results),
        "## Training",
        f"```bash\n{shlex.join(redact(list(facts.command), login))}\n```",
        *_pictures(None, [facts.curve] if facts.curve else [], "training curve"),
        *_table("### Hyper-parameters", ("name", "value"), shown),
        "## Limitations and bias",
        LIMITATIONS.format(datasets=_named(facts.datasets) or "its pairs"),
        "## Licence",
        _license_text(license_fields, facts.base_model),
    ]
    return "\n\n".join(section for section in sections if section)


def _metadata(facts: ModelFacts, name: str, license_fields: Mapping[str, str]) -> ModelCardData:
    """The front matter. The Hub refuses a base model or a dataset that is no id, so local folders stay out of it."""
    family = "stable-diffusion-xl" if "XL" in facts.pipeline_class else "stable-diffusion"
    tags = [family, f"{family}-diffusers", "instruct-pix2pix", "image-to-image", "diffusers", "diffusers-training"]
    tags += ["lora"] if facts.is_adapter else []
    has_base = _is_hub_id(facts.base_model)
    address = f"{constants.ENDPOINT}/{facts.repo_id}/resolve/main/" if facts.repo_id else ""
    return ModelCardData(
        license=license_fields.get("license", "other"),
        license_name=license_fields.get("license_name"),
        license_link=license_fields.get("license_link"),
        base_model=facts.base_model if has_base else None,
        base_model_relation=("adapter" if facts.is_adapter else "finetune") if has_base else None,
        datasets=[dataset for dataset in facts.datasets if _is_hub_id(dataset)] or None,
        library_name="diffusers",
        pipeline_tag="image-to-image",
        tags=tags,
        widget=[{"src": address + quote(path), "prompt": prompt} for path, prompt in facts.widget] or None,
        model_name=name,
        eval_results=_scores(facts) or None,
    )


def _scores(facts: ModelFacts) -> list[EvalResult]:
    """The results as the Hub's model index wants them; a loss that is not finite is no result."""
    source = facts.datasets[0] if facts.datasets else "held-out rows"
    return [
        EvalResult(
            task_type="image-to-image",
            dataset_type=source if _is_hub_id(source) else "local",
            dataset_name=_short(source),
            metric_type=re.sub(r"\W+", "_", measure),
            metric_name=measure,
            metric_value=float(value),
        )
        for measure, value in facts.results.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    ]


def _summary(facts: ModelFacts) -> str:
    learned = f", trained on {_named(facts.datasets)}" if facts.datasets else ""
    size = f" at {facts.resolution}×{facts.resolution} pixels" if facts.resolution else ""
    kind = "A LoRA that makes an image editor" if facts.is_adapter else "An image editor"
    return (
        f"{kind} that follows instructions: [InstructPix2Pix](https://arxiv.org/abs/2211.09800) on "
        f"{_named([facts.base_model])}{learned}{size}."
    )


def _snippet(facts: ModelFacts, folder: str) -> str:
    """Code that edits the first widget image with stock diffusers and runs as it stands, on a GPU or without one."""
    path, prompt = facts.widget[0] if facts.widget else ("photograph.jpg", "make it a watercolor painting")
    image = _literal(path)
    if facts.widget:
        image = f"hf_hub_download(model, {_literal(path)})" if facts.repo_id else f'f"{{model}}/{path}"'
    size, is_sdxl = facts.resolution, "XL" in facts.pipeline_class
    lines = [
        "import torch",
        f"from diffusers import {facts.pipeline_class}{', UNet2DConditionModel' if facts.is_adapter else ''}",
        "from diffusers.utils import load_image",
        *(["from huggingface_hub import hf_hub_download"] if "hf_hub_download" in image else []),
        "",
        f"model = {_literal(facts.repo_id or folder)}",
        'device = "cuda" if torch.cuda.is_available() else "cpu"',
        'dtype = torch.float16 if device == "cuda" else torch.float32',
        *_loading(facts),
        "",
        f"image = load_image({image})",
        *([f"image.thumbnail(({size}, {size}))"] if size else []),
        "edited = pipeline(",
        f"    {_literal(prompt)},",
        "    image=image,",
        # The pipeline of SDXL would squash the picture into a square.
        *(["    height=image.height // 8 * 8,", "    width=image.width // 8 * 8,"] if is_sdxl else []),
        "    num_inference_steps=20,",
        f"    guidance_scale={facts.guidance_scale},",
        f"    image_guidance_scale={facts.image_guidance_scale},",
        "    generator=torch.manual_seed(0),",
        ").images[0]",
        'edited.save("edited.png")',
    ]
    return "\n".join(lines)


def _loading(facts: ModelFacts) -> list[str]:
    """The lines that load the pipeline onto `device`; for an adapter, onto the base, widened where it must be."""
    if not facts.is_adapter:
        return [f"pipeline = {facts.pipeline_class}.from_pretrained(model).to(device, dtype)"]
    lines = [
        "",
        f"base = {_literal(facts.base_model if _is_hub_id(facts.base_model) else _short(facts.base_model))}",
        'unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")',
    ]
    if facts.is_base_widened:
        lines += [
            "# Four more input channels, for the picture: zeros, which the adapter fills.",
            "old = unet.conv_in",
            'weights = {"weight": torch.nn.functional.pad(old.weight, (0, 0, 0, 0, 0, 4)), "bias": old.bias}',
            "unet.conv_in = torch.nn.Conv2d(8, old.out_channels, old.kernel_size, padding=old.padding)",
            "unet.conv_in.load_state_dict(weights)",
            "unet.register_to_config(in_channels=8)",
        ]
    return [
        *lines,
        f"pipeline = {facts.pipeline_class}.from_pretrained(base, unet=unet)",
        "pipeline.load_lora_weights(model)",
        "pipeline = pipeline.to(device, dtype)",
    ]


def _literal(text: str) -> str:
    """A Python literal in double quotes; JSON's are the same."""
    return json.dumps(text, ensure_ascii=False)


def _scheduler_note(output_dir: Path) -> str:
    config = _read_json(output_dir / "scheduler" / "scheduler_config.json")
    if not config:
        return ""
    settings = ("prediction_type", "timestep_spacing", "rescale_betas_zero_snr")
    known = ", ".join(f"`{key}={config[key]}`" for key in settings if key in config)
    note = (
        f"The saved scheduler is `{config.get('_class_name')}`{f' with {known}' if known else ''}. Another one is "
        "taken by `SchedulerClass.from_config(pipeline.scheduler.config)`, so that these settings pass on to it."
    )
    if config.get("rescale_betas_zero_snr"):
        note += " The noise ends at zero signal: choose a scheduler that knows `rescale_betas_zero_snr`."
    return note


def _license_text(fields: Mapping[str, str], base_model: str) -> str:
    base = _named([base_model])
    if not fields:
        return (
            f"The licence of the base model {base} is not known to the script that wrote this card: **fill in "
            "`license` above before publishing**. Its terms pass on to this model, as do those of the training data."
        )
    name = fields.get("license_name") or fields["license"]
    text = (
        f"This model is derived from {base} and carries its licence, `{name}`. Use restrictions of that licence "
        "pass on to this model, to what is derived from it and to its users."
    )
    if "openrail" in name.lower():
        text += " An OpenRAIL licence forbids, among others, the uses listed in its Attachment A."
    return text + " The training data may set further terms."


def _pictures(title: str | None, paths: Sequence[str], label: str) -> list[str]:
    pictures = [f"![{label}]({quote(path)})" for path in paths]
    return [title, *pictures] if title and pictures else pictures


def _table(title: str, header: tuple[str, str], rows: Mapping[str, object]) -> list[str]:
    def cell(value: object) -> str:
        text = f"{value:.6g}" if isinstance(value, float) else str(value)
        return text.replace("|", "\\|").replace("\n", " ")

    lines = [f"| {key} | {cell(value)} |" for key, value in rows.items()]
    return [title, "\n".join([f"| {header[0]} | {header[1]} |", "|---|---|", *lines])] if lines else []


def _named(ids: Sequence[str]) -> str:
    """The ids in words: `a`, `b` and `c`; of a local folder only its name, for its path is the trainer's own affair."""
    names = [f"`{_short(name)}`" for name in ids]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _short(name: str) -> str:
    return name if _is_hub_id(name) else Path(name).resolve().name


def _is_hub_id(name: str) -> bool:
    return bool(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name)) and not Path(name).exists()


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}
