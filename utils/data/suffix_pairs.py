"""Pairs in one folder, told apart by the ends of their names: cat_before.jpg and cat_after.jpg, with cat.txt."""

import re
from collections import defaultdict
from pathlib import Path

from utils.image_formats import has_image_suffix

# What the name of the original or of the edited image ends in, after "_" or "-". Without an end it is the other one.
BEFORE = ("before", "original", "orig", "input", "in", "source", "src", "start", "control", "cond", "condlabel")
BEFORE += ("conditioning", "reference", "ref", "a")
AFTER = ("after", "edited", "edit", "output", "out", "target", "tgt", "end", "gt", "result", "cartoon", "cartoonized")
AFTER += ("b",)
ENDING = re.compile(rf"(?<=.)[_-]({'|'.join(BEFORE + AFTER)})\Z", re.IGNORECASE | re.DOTALL)
MIN_SHARE = 0.5  # of the images of a folder that must be in pairs, or it holds something else


def find_suffix_pairs(folder: Path) -> list[tuple[str, str]]:
    """(original, edited image) of each pair, as paths below `folder`, sorted; [] where the folder has no such pairs."""
    groups: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    images = [path for path in sorted(folder.rglob("*")) if has_image_suffix(path) and path.is_file()]
    for path in images:
        relative = path.relative_to(folder)
        match = ENDING.search(relative.stem)
        side = "" if match is None else "before" if match[1].casefold() in BEFORE else "after"
        stem = relative.with_name(ENDING.sub("", relative.stem)).as_posix()
        groups[stem][side].append(relative.as_posix())
    pairs = []
    for sides in groups.values():
        before, after = sides.get("before") or sides.get(""), sides.get("after") or sides.get("")
        if before and after and before != after and len(before) == len(after) == 1:
            pairs.append((before[0], after[0]))
    return sorted(pairs) if 2 * len(pairs) >= MIN_SHARE * len(images) else []


def caption_stem(path: str) -> str:
    """The path of an image without its suffix and without the end that tells the sides apart."""
    pure = Path(path)
    return pure.with_name(ENDING.sub("", pure.stem)).as_posix()
