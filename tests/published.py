"""Small copies of published editing datasets, with their columns, types, splits and peculiarities."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from tests.pairs import encode

IMAGE, TEXT, NULL = datasets.Image(), datasets.Value("string"), datasets.Value("null")
FLOAT, INT = datasets.Value("float64"), datasets.Value("int64")
RED, BLUE = (200, 20, 10), (10, 30, 220)  # of all original and of all edited images
Size = tuple[int, int]  # (h, w)


@dataclass(frozen=True)
class Shape:
    """features: in the order of the dataset. sizes: (h, w) of the original and the edited image."""

    features: dict[str, Any]
    original: str
    prompt: str
    edited: str
    split: str = "train"
    sizes: tuple[Size, Size] = ((48, 64), (48, 64))
    other_splits: tuple[str, ...] = ()
    file_format: str = "PNG"


SHAPES = {
    "timbrooks/instructpix2pix-clip-filtered": Shape(
        dict(original_prompt=TEXT, original_image=IMAGE, edit_prompt=TEXT, edited_prompt=TEXT, edited_image=IMAGE),
        "original_image",
        "edit_prompt",
        "edited_image",
        file_format="JPEG",
    ),
    "fusing/instructpix2pix-1000-samples": Shape(
        dict(input_image=IMAGE, edit_prompt=TEXT, edited_image=IMAGE), "input_image", "edit_prompt", "edited_image"
    ),
    "instruction-tuning-sd/cartoonization": Shape(
        dict(original_image=IMAGE, edit_prompt=TEXT, cartoonized_image=IMAGE),
        # Only the cartoon is resized, to a shorter side of 720, and cut to multiples of 8.
        "original_image",
        "edit_prompt",
        "cartoonized_image",
        sizes=((1000, 1503), (720, 1080)),
    ),
    "instruction-tuning-sd/low-level-image-proc": Shape(
        dict(instruction=TEXT, input_image=IMAGE, ground_truth_image=IMAGE),
        "input_image",
        "instruction",
        "ground_truth_image",
        sizes=((183, 275), (183, 275)),
    ),
    "osunlp/MagicBrush": Shape(
        dict(
            img_id=TEXT,
            turn_index=datasets.Value("int32"),
            source_img=IMAGE,
            mask_img=IMAGE,
            instruction=TEXT,
            target_img=IMAGE,
        ),
        "source_img",
        "instruction",
        "target_img",
        other_splits=("dev",),
    ),
    "BleachNick/UltraEdit": Shape(
        dict(
            clip_sim_source=FLOAT,
            clip_sim_target=FLOAT,
            clip_sim_dir=FLOAT,
            clip_sim_image=FLOAT,
            dinov2_sim=FLOAT,
            ssim=FLOAT,
            source_caption=TEXT,
            target_caption=TEXT,
            source_image=IMAGE,
            edited_image=IMAGE,
            mask_image=NULL,
            edit_prompt=TEXT,
            edit_object=NULL,
        ),
        "source_image",
        "edit_prompt",
        "edited_image",
        split="FreeForm_0",
        other_splits=("FreeForm_1",),
    ),
    "BleachNick/UltraEdit_Region_Based_100k": Shape(
        dict(source_image=IMAGE, edited_image=IMAGE, mask_image=IMAGE, edit_prompt=TEXT, edit_object=TEXT),
        "source_image",
        "edit_prompt",
        "edited_image",
    ),
    "UCSC-VLAA/HQ-Edit": Shape(
        dict(input=TEXT, input_image=IMAGE, edit=TEXT, inverse_edit=TEXT, output=TEXT, output_image=IMAGE),
        "input_image",
        "edit",
        "output_image",
        sizes=((90, 90), (90, 90)),
    ),
    "TIGER-Lab/OmniEdit-Filtered-1.2M": Shape(
        dict(
            omni_edit_id=TEXT,
            task=TEXT,
            src_img=IMAGE,
            edited_img=IMAGE,
            edited_prompt_list=datasets.List(TEXT),
            width=INT,
            height=INT,
            sc_score_1=INT,
            sc_score_2=INT,
            sc_reasoning=TEXT,
            pq_score=INT,
            o_score=FLOAT,
        ),
        "src_img",
        "edited_prompt_list",
        "edited_img",
        other_splits=("dev",),
    ),
    "Bin1117/AnyEdit": Shape(
        dict(
            edit_type=TEXT,
            edit_instruction=TEXT,
            input=TEXT,
            output=TEXT,
            visual_input=IMAGE,
            image_file=IMAGE,
            edited_file=IMAGE,
        ),
        "image_file",
        "edit_instruction",
        "edited_file",
        other_splits=("validation",),
    ),
    "AILab-CVC/SEED-Data-Edit-Part2-3": Shape(  # as a dataset, after unpacking its archives
        dict(source_image=IMAGE, instruction=TEXT, target_image=IMAGE), "source_image", "instruction", "target_image"
    ),
    "BryanW/HumanEdit": Shape(
        dict(
            IMAGE_ID=TEXT,
            EDITING_TYPE=TEXT,
            CORE=INT,
            MASK=INT,
            EDITING_INSTRUCTION=TEXT,
            OUTPUT_DESCRIPTION=TEXT,
            INPUT_CAPTION_BY_LLAMA=TEXT,
            OUTPUT_CAPTION_BY_LLAMA=TEXT,
            INPUT_IMG=IMAGE,
            MASK_IMG=IMAGE,
            OUTPUT_IMG=IMAGE,
        ),
        "INPUT_IMG",
        "EDITING_INSTRUCTION",
        "OUTPUT_IMG",
    ),
}


def save_shape(folder: Path, shape: Shape, num_rows: int = 4) -> Path:
    """Write data/<split>-00000-of-00001.parquet, as on the Hub, for each split."""
    rows = [_row(shape, index) for index in range(num_rows)]
    table = datasets.Dataset.from_list(rows, features=datasets.Features(shape.features))
    (folder / "data").mkdir(parents=True)
    for split in (shape.split, *shape.other_splits):
        table.to_parquet(str(folder / f"data/{split}-00000-of-00001.parquet"))
    return folder


def _row(shape: Shape, index: int) -> dict[str, Any]:
    row = {name: _value(name, feature, index) for name, feature in shape.features.items()}
    for name, colour, size in zip((shape.original, shape.edited), (RED, BLUE), shape.sizes, strict=True):
        row[name] = _image(colour, size, shape.file_format)
    if "visual_input" in row:
        row["visual_input"] = None
    return row


def _value(name: str, feature: Any, index: int) -> Any:
    if feature == IMAGE:
        return _image((0, 255, 0), (30, 30), "PNG")  # a mask in another colour than all images
    if isinstance(feature, datasets.List):
        return [f"{name} {index}", f"{name} {index} again"]
    return {"string": f"{name} {index}", "null": None, "float64": 0.25}.get(feature.dtype, index)


def _image(colour: tuple[int, int, int], size: Size, file_format: str) -> dict[str, Any]:
    return {"bytes": encode(Image.new("RGB", size[::-1], colour), file_format), "path": None}
