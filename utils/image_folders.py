"""The images of a folder, and what else lies in it, which is counted and named instead of ignored."""

from collections import defaultdict
from pathlib import Path

from utils.image_formats import has_image_suffix

MAX_NAMED = 5
Skipped = dict[str, list[Path]]  # reason -> what was skipped for it


def find_images(folder: Path, recursive: bool = False) -> tuple[list[Path], Skipped]:
    """(sorted image files of a folder, by their suffixes; everything else by reason). Hidden files are ignored.

    recursive: also those of its subfolders; links to folders are not followed, because they may lead back.
    """
    images, skipped = [], defaultdict(list)
    for path in sorted(folder.rglob("*") if recursive else folder.iterdir()):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.is_dir() and not (recursive and not path.is_symlink()):
            skipped["subfolder" if not recursive else "link to a folder"].append(path)
        elif path.is_dir():
            continue
        elif not has_image_suffix(path):
            skipped["not an image"].append(path)
        elif not path.is_file():
            skipped["not a regular file"].append(path)
        else:
            images.append(path)
    return images, dict(skipped)


def describe_skipped(skipped: Skipped) -> list[str]:
    """One line for each reason, such as "skipped 2 (not an image): notes.docx, readme.md"."""
    lines = []
    for reason, paths in skipped.items():
        more = f" and {len(paths) - MAX_NAMED:,} more" if len(paths) > MAX_NAMED else ""
        lines.append(f"skipped {len(paths):,} ({reason}): {', '.join(path.name for path in paths[:MAX_NAMED])}{more}")
    return lines
