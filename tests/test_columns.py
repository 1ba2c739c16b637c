"""Column names and types: known datasets need no flag, and nothing is guessed by position."""

from __future__ import annotations

import datasets
import pytest

from utils.dataset.columns import KNOWN, Columns, resolve_columns
from utils.errors import InputError

IMAGE, TEXT = datasets.Image(), datasets.Value("string")
# The columns of notes/data_and_evaluation.md, section 1, in the datasets' own order, with what else they hold.
PUBLISHED = {
    "timbrooks/instructpix2pix-clip-filtered": dict(
        original_prompt=TEXT, original_image=IMAGE, edit_prompt=TEXT, edited_prompt=TEXT, edited_image=IMAGE
    ),
    "fusing/instructpix2pix-1000-samples": dict(input_image=IMAGE, edit_prompt=TEXT, edited_image=IMAGE),
    "instruction-tuning-sd/cartoonization": dict(original_image=IMAGE, edit_prompt=TEXT, cartoonized_image=IMAGE),
    "instruction-tuning-sd/low-level-image-proc": dict(instruction=TEXT, input_image=IMAGE, ground_truth_image=IMAGE),
    "osunlp/MagicBrush": dict(
        img_id=TEXT, turn_index=datasets.Value("int32"), source_img=IMAGE, mask_img=IMAGE,
        instruction=TEXT, target_img=IMAGE,
    ),
    "BleachNick/UltraEdit": dict(
        clip_sim_source=datasets.Value("float64"), source_image=IMAGE, edited_image=IMAGE,
        mask_image=datasets.Value("null"), edit_prompt=TEXT, edit_object=datasets.Value("null"),
    ),
    "UCSC-VLAA/HQ-Edit": dict(
        input=TEXT, input_image=IMAGE, edit=TEXT, inverse_edit=TEXT, output=TEXT, output_image=IMAGE
    ),
    "TIGER-Lab/OmniEdit-Filtered-1.2M": dict(
        omni_edit_id=TEXT, task=TEXT, src_img=IMAGE, edited_img=IMAGE, edited_prompt_list=datasets.List(TEXT)
    ),
    "Bin1117/AnyEdit": dict(
        edit_type=TEXT, edit_instruction=TEXT, input=TEXT, output=TEXT,
        visual_input=IMAGE, image_file=IMAGE, edited_file=IMAGE,
    ),
    "AILab-CVC/SEED-Data-Edit-Part2-3": dict(source_image=IMAGE, instruction=TEXT, target_image=IMAGE),
    "BryanW/HumanEdit": dict(EDITING_INSTRUCTION=TEXT, INPUT_IMG=IMAGE, MASK_IMG=IMAGE, OUTPUT_IMG=IMAGE),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("is_local_copy", [False, True])
def test_published_datasets_need_no_flag(name: str, is_local_copy: bool) -> None:
    features = datasets.Features(PUBLISHED[name])
    assert resolve_columns("copies/of-it" if is_local_copy else name, features) == KNOWN[name]


def test_our_own_schema_is_recognised() -> None:
    features = datasets.Features(original_image=IMAGE, edit_prompt=TEXT, edited_image=IMAGE, task=TEXT)
    assert resolve_columns("demo-output/pairs", features) == Columns("original_image", "edit_prompt", "edited_image")


def test_flags_win_one_by_one() -> None:
    features = datasets.Features(**PUBLISHED["UCSC-VLAA/HQ-Edit"])
    columns = resolve_columns("UCSC-VLAA/HQ-Edit", features, prompt="inverse_edit")
    assert columns == Columns("input_image", "inverse_edit", "output_image")
    swapped = resolve_columns("UCSC-VLAA/HQ-Edit", features, "output_image", "inverse_edit", "input_image")
    assert swapped == Columns("output_image", "inverse_edit", "input_image")


def test_one_flag_completes_a_known_triple() -> None:
    features = datasets.Features(original_image=IMAGE, edit_prompt=TEXT, cartoon=IMAGE)
    assert resolve_columns("x", features, edited="cartoon").original == "original_image"


@pytest.mark.parametrize(
    ("features", "flags", "words"),
    [
        (
            dict(a=IMAGE, b=TEXT, c=IMAGE),
            {},
            ["not known", "--original_image_column", "a (image), b (string), c (image)"],
        ),
        (dict(a=IMAGE, b=TEXT, c=IMAGE), dict(original="z", prompt="b", edited="c"), ["no column 'z'", "b (string)"]),
        (
            dict(a=IMAGE, b=TEXT, c=IMAGE),
            dict(original="b", prompt="a", edited="c"),
            ["--original_image_column: column 'b' holds string", "--edit_prompt_column: column 'a' holds image"],
        ),
        (dict(a=IMAGE, b=TEXT, c=IMAGE), dict(original="a", prompt="b", edited="a"), ["both name 'a'"]),
        (
            dict(a=IMAGE, b=datasets.Value("int64"), c=IMAGE),
            dict(original="a", prompt="b", edited="c"),
            ["holds int64"],
        ),
        (dict(a=datasets.List(IMAGE), b=TEXT, c=IMAGE), dict(original="a", prompt="b", edited="c"), ["list of image"]),
        (dict(original_image=TEXT, edit_prompt=TEXT, edited_image=IMAGE), {}, ["original_image (string)"]),
    ],
)
def test_wrong_columns_are_refused(features: dict, flags: dict, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        resolve_columns("some/dataset", datasets.Features(features), **flags)
    assert all(word in str(caught.value) for word in words), caught.value


def test_two_known_triples_are_ambiguous() -> None:
    features = datasets.Features(
        original_image=IMAGE, source_image=IMAGE, edit_prompt=TEXT, edited_image=IMAGE
    )  # ours and UltraEdit's
    with pytest.raises(InputError, match="several known datasets"):
        resolve_columns("x", features)
    assert resolve_columns("x", features, original="source_image").original == "source_image"


def test_a_known_dataset_with_other_columns_is_refused() -> None:
    with pytest.raises(InputError, match="no column 'source_img'"):
        resolve_columns("osunlp/MagicBrush", datasets.Features(a=IMAGE, instruction=TEXT, target_img=IMAGE))


def test_img_edit_says_what_to_do() -> None:
    with pytest.raises(InputError, match="unpack the archives"):
        resolve_columns("sysuyy/ImgEdit", datasets.Features(input_images=datasets.List(TEXT), prompt=TEXT))
