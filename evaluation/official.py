"""The benchmarks whose own scorers judge the edits: their inputs, and the folders in which the scorers expect edits.

| benchmark | input | edits |
|---|---|---|
| gedit | the dataset stepfun-ai/GEdit-Bench | EDITOR/fullset/TASK/LANGUAGE/KEY.png, and the input as KEY_SRCIMG.png |
| imgedit | a folder with basic_edit.json and the images that it names, there or in original_images/ | EDITOR/KEY.png |
| kris | the folder KRIS_Bench, with CATEGORY/annotation.json and images | results/EDITOR/CATEGORY/ID.jpg |

As in their repositories: stepfun-ai/Step1X-Edit, PKU-YuanGroup/ImgEdit (Benchmark/Basic), mercurystraw/Kris_Bench.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from evaluation.samples import DatasetOptions, Edit, Sample, read_chosen, read_edit
from utils.errors import InputError
from utils.pixels import BadRow, decode_image

IMGEDIT_FILE, KRIS_FILE = "basic_edit.json", "annotation.json"


def open_official_samples(benchmark: str, options: DatasetOptions) -> list[Sample]:
    """The samples of imgedit or kris. Raises InputError, also where none can be read."""
    folder = Path(options.dataset_name)
    entries = list((_list_imgedit if benchmark == "imgedit" else _list_kris)(folder))

    def read(number: int) -> Sample:
        place, image, instruction = entries[number]
        if image is None:
            raise BadRow(f"{'/'.join(place)} needs several images")
        if not image.resolve().is_relative_to(folder.resolve()):
            raise BadRow(f"{'/'.join(place)}: its image is outside of the folder")
        return Sample(number, decode_image(image), instruction, place=place)

    return read_chosen(len(entries), read, options)


def _list_imgedit(folder: Path) -> Iterator[tuple[tuple[str, ...], Path, str]]:
    """(key, image, instruction) of each entry."""
    for key, entry in _read(folder / IMGEDIT_FILE).items():
        places = (folder / entry["id"], folder / "original_images" / entry["id"])
        yield (key,), next((path for path in places if path.is_file()), places[0]), entry["prompt"]


def _list_kris(folder: Path) -> Iterator[tuple[tuple[str, ...], Path | None, str]]:
    """(category and id, image, instruction) of each entry; no image for those that compose several."""
    files = sorted(folder.glob(f"*/{KRIS_FILE}"))
    if not files:
        raise InputError(f"--dataset_name {folder}: has no CATEGORY/{KRIS_FILE}; give the folder KRIS_Bench")
    for file in files:
        for key, entry in _read(file).items():
            image = file.parent / entry["ori_img"] if isinstance(entry["ori_img"], str) else None
            yield (file.parent.name, key), image, entry["ins_en"]


def _read(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--dataset_name: {file} cannot be read: {error}") from error
    needed = {"ori_img": (str, list), "ins_en": str} if file.name == KRIS_FILE else {"id": str, "prompt": str}
    for key, entry in content.items() if isinstance(content, dict) else [("", None)]:
        is_right = isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in needed.items())
        if not is_right or not is_file_name(key):
            what = " and ".join(needed)
            raise InputError(f"--dataset_name: {file} must map file names to objects with {what}; look at {key!r}")
    return content


def is_file_name(part: str) -> bool:
    """Whether a part of a place can be a file of its own: it comes from the dataset."""
    return bool(part) and not set(part) & set("/\\\0") and part not in (".", "..")


def write_official(benchmark: str, samples: list[Sample], edits: Sequence[Edit], editor: str, folder: Path) -> Path:
    """Save the edits in the layout of the benchmark's own scorer; returns the folder to give it. Raises InputError."""
    for sample, edit in zip(samples, edits, strict=True):
        if not sample.place or not all(map(is_file_name, sample.place)):
            raise InputError(
                f"row {sample.number}: has no key of --benchmark {benchmark} (its place is {sample.place})"
            )
        *parents, key = sample.place
        if benchmark == "kris":
            path = folder.joinpath("results", editor, *parents, f"{key}.jpg")
        else:
            path = folder.joinpath(editor, *(["fullset"] if benchmark == "gedit" else []), *parents, f"{key}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        read_edit(edit).save(path, **({"quality": 95} if benchmark == "kris" else {}))
        if benchmark == "gedit":
            sample.original.save(path.with_name(f"{key}_SRCIMG.png"))
    return folder
