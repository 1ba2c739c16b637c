"""Column names and types: known datasets need no flags, and no column is guessed by position."""

import datasets
import pytest

from tests.published import IMAGE, SHAPES, TEXT
from utils.data.columns import KNOWN_COLUMNS, Columns, resolve_columns
from utils.errors import InputError

PUBLISHED = {name: shape.features for name, shape in SHAPES.items()}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("is_local_copy", [False, True])
def test_published_datasets_need_no_flag(name: str, is_local_copy: bool) -> None:
    features = datasets.Features(PUBLISHED[name])
    assert resolve_columns("copies/of-it" if is_local_copy else name, features) == KNOWN_COLUMNS[name]


def test_our_own_columns_are_known() -> None:
    features = datasets.Features(original_image=IMAGE, edit_prompt=TEXT, edited_image=IMAGE, task=TEXT)
    assert resolve_columns("demo-output/pairs", features) == Columns("original_image", "edit_prompt", "edited_image")


def test_each_flag_overrides_a_known_column() -> None:
    features = datasets.Features(**PUBLISHED["UCSC-VLAA/HQ-Edit"])
    columns = resolve_columns("UCSC-VLAA/HQ-Edit", features, prompt="inverse_edit")
    assert columns == Columns("input_image", "inverse_edit", "output_image")
    swapped = resolve_columns("UCSC-VLAA/HQ-Edit", features, "output_image", "inverse_edit", "input_image")
    assert swapped == Columns("output_image", "inverse_edit", "input_image")


@pytest.mark.parametrize(
    ("original", "prompt", "edited"),
    [
        ("control_path", "caption", "image_path"),
        ("edit_image", "prompt", "image"),  # DiffSynth: the image to edit, and the result
        ("image", "instruction", "edited"),
        ("original", "text", "edit_image"),
        ("source.path", "meta.prompt", "target.path"),
        ("input_images", "prompts", "output_images"),
        ("conditioning_image", "text", "image"),
    ],
)
def test_the_columns_of_other_trainers_are_known_by_name(original: str, prompt: str, edited: str) -> None:
    """In any order of the columns, and beside columns of other roles."""
    for names in ((original, prompt, edited, "mask"), ("mask", edited, prompt, original)):
        features = datasets.Features({name: TEXT if name == prompt else IMAGE for name in names})
        assert resolve_columns("x", features) == Columns(original, prompt, edited)


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
        (
            dict(image=IMAGE, edit_image=IMAGE, edited_image=IMAGE, text=TEXT),
            {},
            ["ambiguous", "--original_image_column could be image or edit_image"],
        ),
        (dict(source=IMAGE, target=IMAGE, caption=TEXT, prompt=TEXT), {}, ["could be caption or prompt"]),
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


def test_img_edit_is_refused_with_advice() -> None:
    with pytest.raises(InputError, match="unpack the archives"):
        resolve_columns("sysuyy/ImgEdit", datasets.Features(input_images=datasets.List(TEXT), prompt=TEXT))
