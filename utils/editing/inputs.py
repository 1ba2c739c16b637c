"""The images that `--input` names - files, folders, patterns and URLs - and the names of their outputs."""

import glob
import hashlib
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

from utils.errors import InputError
from utils.image_folders import describe_skipped, find_images
from utils.image_formats import IMAGE_SUFFIXES, has_image_suffix
from utils.image_sources import read_image_source
from utils.pixels import BadRow, num_frames

WRITABLE = (".png", ".apng", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
ANIMATED_SUFFIXES = {".gif": ".gif", ".webp": ".webp", ".tif": ".tiff", ".tiff": ".tiff"}  # others: .png
MAX_NAME_BYTES = 240  # of an output: file systems allow 255, and a temporary name is a little longer


@dataclass(frozen=True)
class InputImage:
    """One image to edit. read: its bytes, the same object for all edits of it; target: path below the output folder."""

    name: str
    read: Callable[[], bytes]
    target: Path
    path: Path | None = None


class SourceReader:
    """Reads sources; what is fetched from an address is kept, so that each is fetched once, and errors too."""

    def __init__(self) -> None:
        self._readers, self._folder = {}, None

    def __call__(self, source: str, flag: str) -> Callable[[], bytes]:
        """The same function for the same source. flag: for its errors."""
        read = self._fetch if "://" in source else read_image_source
        return self._readers.setdefault(source, partial(read, source, flag))

    def _fetch(self, source: str, flag: str) -> bytes:
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="inputs-")  # memory may be too small for all
        path = Path(self._folder.name) / hashlib.sha256(source.encode("utf-8", "surrogateescape")).hexdigest()
        failed = path.with_suffix(".error")
        if failed.exists():
            raise InputError(failed.read_text(encoding="utf-8"))
        if not path.exists():
            try:
                path.write_bytes(read_image_source(source, flag))
            except InputError as error:
                failed.write_text(str(error), encoding="utf-8")
                raise
        return path.read_bytes()


def find_inputs(sources: list[str], recursive: bool, say: Callable[[str], None]) -> list[InputImage]:
    """The images of all sources, each once, with distinct targets. Raises InputError.

    say: called with a line for everything that is skipped.
    """
    found: dict[str, tuple[Path, Path]] = {}  # source -> (its path, its place below the output folder)
    for source in sources:
        if "://" in source:
            path = Path(unquote(urlsplit(source).path))
            found.setdefault(source, (path, Path(path.name or "image")))
        else:
            for path, place in _expand(Path(source).expanduser(), source, recursive, say):
                found.setdefault(str(path), (path, place))
    reader, images = SourceReader(), []
    targets = _distinct_targets([place for _, place in found.values()], [path for path, _ in found.values()])
    for (source, (path, _)), target in zip(found.items(), targets, strict=True):
        is_url = "://" in source
        images.append(InputImage(path.name, reader(source, "--input"), target, None if is_url else path))
    return images


def _expand(path: Path, source: str, recursive: bool, say: Callable[[str], None]) -> list[tuple[Path, Path]]:
    """(file, its place below the output folder) of a file, of the images of a folder, or of what a pattern matches."""
    if path.is_dir():
        images, skipped = find_images(path, recursive)
        for line in describe_skipped(skipped):
            say(f"{source}: {line}" + (": --recursive edits their images" if "(subfolder)" in line else ""))
        if not images:
            raise InputError(f"--input {source} has no images ({', '.join(IMAGE_SUFFIXES)})")
        return [(image, image.relative_to(path)) for image in images]
    if not os.path.lexists(path) and glob.has_magic(str(path)):
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        if not matches:
            raise InputError(f"--input {source} matches no file: check the pattern, and quote it")
        images = [match for match in matches if match.is_file() and has_image_suffix(match)]
        others = [match.name for match in matches if match not in images]
        if others:
            say(f"{source}: skipped {len(others)} that are not image files: {', '.join(others[:5])}")
        if not images:
            raise InputError(f"--input {source} matches no image: it matches {', '.join(others[:5])}")
        return [(image, Path(image.name)) for image in images]
    return [(path, Path(path.name))]  # a missing file is reported when it is read


def _distinct_targets(places: list[Path], paths: list[Path]) -> list[Path]:
    """A PNG file for each input; equal names get the suffix, else the folder, else a number into them."""
    by_stem = defaultdict(list)
    for index, place in enumerate(places):
        by_stem[place.with_suffix("")].append(index)
    targets = [place.with_suffix("") for place in places]
    for stem, indices in by_stem.items():
        if len(indices) > 1:
            suffixes, folders = ({part[i] for i in indices} for part in _suffixes_and_folders(places, paths))
            for number, index in enumerate(indices, 1):
                if len(suffixes) == len(indices):  # a.jpg beside a.png
                    targets[index] = stem.with_name(places[index].name.replace(".", "_"))
                elif len(folders) == len(indices):
                    targets[index] = stem.with_name(f"{paths[index].parent.name}_{stem.name}")
                else:
                    targets[index] = stem.with_name(f"{stem.name}-{number}")
    return [target.with_name(f"{target.name}.png") for target in targets]


def _suffixes_and_folders(places: list[Path], paths: list[Path]) -> tuple[list[str], list[str]]:
    return [place.suffix for place in places], [path.parent.name for path in paths]


def animated_suffix(image: InputImage) -> str:
    """The suffix for the edit of an image: that of an animation if the file is one, else .png."""
    try:
        count = num_frames(image.path) if image.path is not None and image.path.is_file() else 1
    except (BadRow, OSError):
        count = 1
    return ".png" if count == 1 else ANIMATED_SUFFIXES.get(image.path.suffix.lower(), ".png")


def limit_name(path: Path) -> Path:
    """A path whose name fits into a file system: a longer one is cut, and keeps a digest of the whole."""
    encoded = os.fsencode(path.name)
    if len(encoded) <= MAX_NAME_BYTES:
        return path
    digest = hashlib.sha256(encoded).hexdigest()[:8]
    stem = os.fsencode(path.stem)[: MAX_NAME_BYTES - len(path.suffix) - 9].decode("utf-8", "ignore")
    return path.with_name(f"{stem}-{digest}{path.suffix}")
