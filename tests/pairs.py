"""Small datasets of pairs for tests, in memory and on disk."""

import io
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from utils.data.columns import DEFAULT_COLUMNS
from utils.data.sources import Source


def make_image(index: int, size: tuple[int, int] = (40, 48)) -> Image.Image:
    """An image of `size` (h, w) with smooth colours that depend on the index."""
    y, x = np.mgrid[0 : size[0], 0 : size[1]]
    channels = [(x * 5 + index * 37) % 256, (y * 6 + index * 11) % 256, np.full_like(x, index * 23 % 256)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def make_noise(size: tuple[int, int] = (24, 40), seed: int = 0) -> Image.Image:
    """An image of `size` (h, w) with random pixels, in which any lost detail shows."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def encode(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def make_rows(num_rows: int, first: int = 0) -> dict[str, list]:
    """Rows in our own columns; the edited image is the negative of the original."""
    images = [make_image(first + index) for index in range(num_rows)]
    return dict(
        original_image=[{"bytes": encode(image), "path": None} for image in images],
        edit_prompt=[f"edit number {first + index}" for index in range(num_rows)],
        edited_image=[{"bytes": encode(Image.fromarray(255 - np.asarray(image))), "path": None} for image in images],
    )


def make_dataset(
    rows: dict[str, list], original: str = "original_image", edited: str = "edited_image"
) -> datasets.Dataset:
    """Rows with two image columns -> a dataset that stores their files."""
    dataset = datasets.Dataset.from_dict(rows)
    return dataset.cast_column(original, datasets.Image()).cast_column(edited, datasets.Image())


def make_source(num_rows: int, weight: float = 1.0, name: str = "train", **replaced: dict) -> Source:
    """A source of `num_rows` good rows, some of them replaced by column={row: value}."""
    rows = make_rows(num_rows)
    for column, changes in replaced.items():
        for row, value in changes.items():
            rows[column][row] = value
    dataset = datasets.Dataset.from_dict(rows)
    for column in ("original_image", "edited_image"):
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return Source(dataset, DEFAULT_COLUMNS, name, weight)


def write_image_folder(folder: Path, num_rows: int) -> dict[str, list]:
    """Write `num_rows` pairs as PNG files into `folder`; returns columns of prompts and relative paths."""
    rows = make_rows(num_rows)
    paths: dict[str, list] = dict(edit_prompt=rows["edit_prompt"])
    for column in ("original_image", "edited_image"):
        (folder / column).mkdir(parents=True)
        paths[column] = [f"{column}/{index}.png" for index in range(num_rows)]
        for path, image in zip(paths[column], rows[column], strict=True):
            (folder / path).write_bytes(image["bytes"])
    return paths


def save_pairs(folder: Path, num_rows: int = 10, rows: dict[str, list] | None = None) -> Path:
    """Write pairs as a parquet file with embedded images into `folder`, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    make_dataset(rows or make_rows(num_rows)).to_parquet(folder / "train-00000.parquet")
    return folder
