"""The names by which other trainers and datasets call the columns of an editing dataset.

| Trainer | original | edited | instruction |
|---|---|---|---|
| ai-toolkit, OneTrainer | control/ | target/ or images | caption file |
| sd-scripts, musubi-tuner | control_path | image_path | caption |
| DiffSynth | edit_image or kontext_images | image | prompt |
| SimpleTuner | conditioning or reference | image | caption |
"""

import re

ORIGINAL_WORDS = {"original", "input", "source", "src", "control", "conditioning", "condition", "reference", "ref"}
ORIGINAL_WORDS |= {"before", "unedited", "kontext", "ctrl", "cond"}
EDITED_WORDS = {"edited", "output", "target", "tgt", "dst", "after", "result", "gt", "groundtruth", "ground_truth"}
IMAGE, EDIT = "", "edit"  # the words of "image" and "edit_image", whose role depends on the other column
# A column of the first set that exists is taken; within a set, the names mean the same.
PROMPT_WORDS = ({"edit_prompt", "edit_instruction", "edit", "instruction"}, {"prompt", "caption", "text", "txt"})
PARTS = {"image", "images", "img", "imgs", "path", "paths", "file", "files", "filename", "filenames", "name", "names"}
PARTS |= {"pil", "url", "bytes", "local"}


def find_image_pair(names: list[str]) -> tuple[list[str], list[str]]:
    """(columns that may be the original image, columns that may be the edited one): one each if they are clear."""
    by_word: dict[str, list[str]] = {}
    for name in names:
        by_word.setdefault(image_word(name), []).append(name)
    originals = [name for word in by_word if word in ORIGINAL_WORDS for name in by_word[word]]
    editeds = [name for word in by_word if word in EDITED_WORDS for name in by_word[word]]
    plain, edit = by_word.get(IMAGE, []), by_word.get(EDIT, [])
    if originals and not editeds:  # control and image, or original and edit
        editeds = plain + edit
    elif editeds and not originals:  # image and edited
        originals = plain + edit
    elif not originals and not editeds and edit and plain:  # DiffSynth: the image to edit, and the result
        originals, editeds = edit, plain
    return originals, editeds


def find_prompt(names: list[str]) -> list[str]:
    """The columns that may be the instruction: one if it is clear."""
    for words in PROMPT_WORDS:
        if found := [name for name in names if name.rpartition(".")[2].casefold().removesuffix("s") in words]:
            return found
    return []


def image_word(name: str) -> str:
    """A column's name without "image", "path" and numbers: source_img -> source, control_path_0 -> control."""
    parts = re.split(r"[._-]", name.casefold())
    return "_".join(part for part in parts if part not in PARTS and not part.isdigit()).removesuffix("s")
