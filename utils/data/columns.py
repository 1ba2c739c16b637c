"""Which three columns of a dataset hold the original image, the prompt and the edited image; usable prompts."""

from dataclasses import dataclass

import datasets
import numpy as np

from utils.data.column_words import find_image_pair, find_prompt
from utils.errors import InputError


@dataclass(frozen=True)
class Columns:
    """Names of the three columns of an editing dataset."""

    original: str
    prompt: str
    edited: str


DEFAULT_COLUMNS = Columns("original_image", "edit_prompt", "edited_image")
KNOWN_COLUMNS: dict[str, Columns] = {
    "timbrooks/instructpix2pix-clip-filtered": DEFAULT_COLUMNS,
    "fusing/instructpix2pix-1000-samples": Columns("input_image", "edit_prompt", "edited_image"),
    "hf-internal-testing/instructpix2pix-10-samples": Columns("input_image", "edit_prompt", "edited_image"),
    "instruction-tuning-sd/cartoonization": Columns("original_image", "edit_prompt", "cartoonized_image"),
    "instruction-tuning-sd/low-level-image-proc": Columns("input_image", "instruction", "ground_truth_image"),
    "osunlp/MagicBrush": Columns("source_img", "instruction", "target_img"),
    "BleachNick/UltraEdit": Columns("source_image", "edit_prompt", "edited_image"),
    "BleachNick/UltraEdit_500k": Columns("source_image", "edit_prompt", "edited_image"),
    "BleachNick/UltraEdit_Region_Based_100k": Columns("source_image", "edit_prompt", "edited_image"),
    "UCSC-VLAA/HQ-Edit": Columns("input_image", "edit", "output_image"),
    "TIGER-Lab/OmniEdit-Filtered-1.2M": Columns("src_img", "edited_prompt_list", "edited_img"),
    "Bin1117/AnyEdit": Columns("image_file", "edit_instruction", "edited_file"),
    "AILab-CVC/SEED-Data-Edit-Part1-Openimages": Columns("source_image", "instruction", "target_image"),
    "AILab-CVC/SEED-Data-Edit-Part1-Unsplash": Columns("source_image", "instruction", "target_image"),
    "AILab-CVC/SEED-Data-Edit-Part2-3": Columns("source_image", "instruction", "target_image"),
    "BryanW/HumanEdit": Columns("INPUT_IMG", "EDITING_INSTRUCTION", "OUTPUT_IMG"),
}
UNPACK = "unpack the archives and import the table: data_preparation/import_pairs.py --source TABLE --image_root FOLDER"
SEED_DATA_EDIT = f"it contains split tar.gz archives and a jsonl of paths into them, not images: {UNPACK}"
IP2P_FILES = (
    "it is not on the Hub: download its zip files and seeds.json from http://instruct-pix2pix.eecs.berkeley.edu/{0}/, "
    "unpack them, and give that folder"
)
NOT_READABLE: dict[str, str] = {
    "random-sample-dataset": IP2P_FILES.format("random-sample-dataset") + " (727 GB, 451,990 prompts)",
    "clip-filtered-dataset": IP2P_FILES.format("clip-filtered-dataset")
    + " (436 GB), or use timbrooks/instructpix2pix-clip-filtered",
    "AILab-CVC/SEED-Data-Edit-Part1-Openimages": SEED_DATA_EDIT,
    "AILab-CVC/SEED-Data-Edit-Part1-Unsplash": SEED_DATA_EDIT,
    "AILab-CVC/SEED-Data-Edit-Part2-3": SEED_DATA_EDIT,
    "sysuyy/ImgEdit": f"its parquet files contain lists of paths into split tar archives, not images: {UNPACK}",
    "apple/pico-banana-400k": "it is a jsonl of URLs, not images: download the jsonl and import it: "
    "data_preparation/import_pairs.py --source sft.jsonl --image_root https://...",
}
COLUMN_FLAGS = Columns("--original_image_column", "--edit_prompt_column", "--edited_image_column")
ROLES = ("original", "prompt", "edited")


def is_image_feature(feature: object) -> bool:
    """Whether a column of this type holds images: `datasets.Image`, the encoded bytes of a file, or lists of one."""
    if inner := _item_of(feature):
        return is_image_feature(inner)
    if isinstance(feature, dict):
        return "bytes" in feature and set(feature) <= {"bytes", "path"}
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", None) in ("binary", "large_binary")


def _item_of(feature: object) -> object | None:
    """The type of the items of a list; None for any other type."""
    if isinstance(feature, list) and len(feature) == 1:
        return feature[0]
    return getattr(feature, "feature", None)


def is_prompt_feature(feature: object) -> bool:
    """Whether a column of this type holds prompts: a string, or a list of strings to choose from."""
    feature = _item_of(feature) or feature
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string", "string_view")


def usable_prompts(value: object) -> list[str]:
    """The prompts in a value of a prompt column, a string or a list: the strings that are not blank."""
    values = value if isinstance(value, (list, tuple, np.ndarray)) else [value]
    return [prompt for prompt in values if isinstance(prompt, str) and prompt.strip()]


def describe_feature(feature: object) -> str:
    """The type of a column, such as "image", "string" or "list of string"."""
    inner = _item_of(feature)
    if inner is None and is_image_feature(feature):
        return "image"
    if isinstance(feature, datasets.Value):
        return feature.dtype
    return f"list of {describe_feature(inner)}" if inner is not None else type(feature).__name__


def describe_features(features: datasets.Features) -> str:
    """All columns and their types."""
    return ", ".join(f"{name} ({describe_feature(feature)})" for name, feature in features.items())


def resolve_columns(
    dataset_name: str,
    features: datasets.Features,
    original: str | None = None,
    prompt: str | None = None,
    edited: str | None = None,
) -> Columns:
    """The three columns: given by flags, else known for the dataset, else the only known triple, else by their names.

    Raises InputError with all problems and the existing columns; never guesses by position.
    """
    given = Columns(original, prompt, edited)
    names = {role: getattr(given, role) for role in ROLES}
    if None in names.values():
        known = _known_columns(dataset_name, features, given)
        names = {role: name or getattr(known, role) for role, name in names.items()}
    problems = [problem for role in ROLES for problem in _column_problems(role, names[role], features)]
    if names["original"] == names["edited"]:
        problems.append(
            f"{COLUMN_FLAGS.original} and {COLUMN_FLAGS.edited} both name {names['original']!r}; a pair has two images"
        )
    if problems:
        raise InputError.from_problems([*problems, f"{dataset_name} has the columns {describe_features(features)}"])
    return Columns(**names)


def refuse_unreadable(dataset_name: str) -> None:
    """Raise InputError for a dataset on the Hub that consists of archives or URLs.

    Call before opening it: datasets would download all of it, up to terabytes.
    """
    for name, reason in NOT_READABLE.items():
        if dataset_name.casefold() == name.casefold():
            raise InputError(f"{name} cannot be used directly: {reason}")


def _known_columns(dataset_name: str, features: datasets.Features, given: Columns) -> Columns:
    """The columns known for a dataset's id or, for a local copy, by the names and types of its columns."""
    by_id = {name.casefold(): columns for name, columns in KNOWN_COLUMNS.items()}
    if columns := by_id.get(dataset_name.casefold()):
        return columns
    if "/" in dataset_name:  # not a folder that has the name of one of the original's datasets
        refuse_unreadable(dataset_name)
    candidates = {
        Columns(**{role: getattr(given, role) or getattr(columns, role) for role in ROLES})
        for columns in KNOWN_COLUMNS.values()
    }
    open_roles = [role for role in ROLES if getattr(given, role) is None]
    named = [columns for columns in candidates if all(getattr(columns, role) in features for role in open_roles)]
    matches = [columns for columns in named if _fits(columns, features, given)] or named
    if len(matches) == 1:
        return matches[0]
    missing = ", ".join(getattr(COLUMN_FLAGS, role) for role in ROLES if getattr(given, role) is None)
    if not matches:
        originals, editeds = find_image_pair([name for name, feature in features.items() if is_image_feature(feature)])
        prompts = find_prompt([name for name, feature in features.items() if is_prompt_feature(feature)])
        found = {"original": originals, "edited": editeds, "prompt": prompts}
        choices = {role: [getattr(given, role)] if getattr(given, role) else found[role] for role in ROLES}
        if all(len(names) == 1 for names in choices.values()):
            return Columns(**{role: names[0] for role, names in choices.items()})
        several = "; ".join(
            f"{getattr(COLUMN_FLAGS, role)} could be {' or '.join(names)}"
            for role, names in choices.items()
            if len(names) > 1
        )
        if several:
            raise InputError(f"the columns of {dataset_name} are ambiguous: {several}. Name them with {missing}")
    if matches:
        triples = "; ".join(f"{c.original} / {c.prompt} / {c.edited}" for c in sorted(matches, key=str))
        raise InputError(f"{dataset_name} has the columns of several known datasets ({triples}): choose with {missing}")
    raise InputError(
        f"the columns of {dataset_name} are not known: name them with {missing} "
        f"(image, prompt as a string or list of strings, image). It has the columns {describe_features(features)}"
    )


def _fits(columns: Columns, features: datasets.Features, given: Columns) -> bool:
    """Whether the columns that are not given by flags exist with the right types."""
    return not any(
        _column_problems(role, getattr(columns, role), features) for role in ROLES if getattr(given, role) is None
    )


def _column_problems(role: str, name: str, features: datasets.Features) -> list[str]:
    flag = getattr(COLUMN_FLAGS, role)
    if name not in features:
        return [f"{flag}: there is no column {name!r}"]
    is_right, needed = (
        (is_prompt_feature, "a string or a list of strings") if role == "prompt" else (is_image_feature, "an image")
    )
    if is_right(features[name]):
        return []
    others = [other for other, feature in features.items() if is_right(feature)]
    return [
        f"{flag}: column {name!r} holds {describe_feature(features[name])}, but {needed} is needed "
        f"(columns of that type: {', '.join(others) or 'none'})"
    ]
