"""Image columns as they occur -> columns of type `datasets.Image`: dicts, bytes, paths, lists of one, nested fields."""

from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from utils.archives import is_member_path
from utils.data.image_paths import ImageFinder
from utils.data.tables import locate_images, names_images

Rows = datasets.Dataset | datasets.IterableDataset
MAX_BASES = 8  # folders of files in which images are looked for
PROBED_ROWS = 100  # whose values decide whether a column of text names images


def unify_image_columns(rows: Rows, folder: Path) -> Rows:
    """The rows with every image column of type `datasets.Image`, and the fields of nested columns as "column.field".

    folder: of the dataset; relative paths of images start from it, or from the folder of one of its files. Columns of
    other values stay. The images are not copied.
    """
    finder = ImageFinder(_list_bases(folder)) if folder.is_dir() else None
    for name, feature in dict(rows.features).items():
        if _holds_bytes(feature):
            rows = rows.cast_column(name, datasets.Image())
    rows = _flatten(rows)
    for name, feature in dict(rows.features).items():
        inner = _item_of(feature)
        if inner is not None and (isinstance(inner, datasets.Image) or _holds_bytes(inner)):
            rows = _first_items(rows, name)
        elif finder and (_is_text(feature) or (inner is not None and _is_text(inner))):
            rows = _open_paths(rows, name, finder)
    return rows


def _holds_bytes(feature: object) -> bool:
    """Whether a column without metadata holds encoded images: {bytes, path}, or bytes."""
    if isinstance(feature, dict):
        return "bytes" in feature and set(feature) <= {"bytes", "path"}
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _item_of(feature: object) -> object | None:
    """The type of the items of a list."""
    if isinstance(feature, list) and len(feature) == 1:
        return feature[0]
    return getattr(feature, "feature", None)


def _is_text(feature: object) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string", "string_view")


def _is_nested(feature: object) -> bool:
    return isinstance(feature, dict) and not _holds_bytes(feature)


def _flatten(rows: Rows) -> Rows:
    if not any(map(_is_nested, rows.features.values())):
        return rows
    if isinstance(rows, datasets.Dataset):
        return unify_nested_bytes(rows.flatten())
    features = {}
    for name, feature in rows.features.items():
        nested = {f"{name}.{field}": inner for field, inner in feature.items()} if _is_nested(feature) else {}
        features |= nested or {name: feature}
    nested = [name for name, feature in rows.features.items() if _is_nested(feature)]

    def flatten(row: dict) -> dict:
        return {f"{name}.{field}": value for name in nested for field, value in (row[name] or {}).items()}

    return rows.map(flatten, remove_columns=nested, features=datasets.Features(features))


def unify_nested_bytes(rows: datasets.Dataset) -> datasets.Dataset:
    """After flattening, the fields {bytes, path} of an image are two columns: join them again."""
    names = [name.removesuffix(".bytes") for name in rows.column_names if name.endswith(".bytes")]
    for name in names:
        content = rows.data.column(f"{name}.bytes")  # of the same struct as the paths, and so in the same chunks
        has_path = f"{name}.path" in rows.column_names
        paths = rows.data.column(f"{name}.path").chunks if has_path else [pa.nulls(len(c)) for c in content.chunks]
        joined = [
            pa.StructArray.from_arrays([chunk.cast(pa.binary()), path.cast(pa.string())], ["bytes", "path"])
            for chunk, path in zip(content.chunks, paths, strict=True)
        ]
        rows = rows.remove_columns([c for c in (f"{name}.bytes", f"{name}.path") if c in rows.column_names])
        rows = _set_column(rows, name, pa.chunked_array(joined, pa.struct({"bytes": pa.binary(), "path": pa.string()})))
    return rows


def _first_items(rows: Rows, name: str) -> Rows:
    """A column of lists of one image each -> the images; lists of none or several stay, and are bad rows."""
    if isinstance(rows, datasets.IterableDataset):
        features = datasets.Features({**rows.features, name: datasets.Image(decode=False)})
        decoded = rows.cast_column(name, datasets.List(datasets.Image(decode=False)))
        return decoded.map(lambda row: {name: _only_item(row[name])}, features=features)
    column = rows.data.column(name)
    if rows._indices is not None or not pc.all(pc.equal(pc.list_value_length(column), 1)).as_py():
        return rows
    stored = datasets.Image()
    items = pa.chunked_array([stored.cast_storage(chunk.flatten()) for chunk in column.chunks], stored.pa_type)
    return _set_column(rows.remove_columns(name), name, items)


def _only_item(value: list | None) -> dict:
    if value is not None and len(value) == 1:
        return value[0]
    return {"bytes": None, "path": None}


def _set_column(rows: datasets.Dataset, name: str, values: pa.ChunkedArray) -> datasets.Dataset:
    """Add a column of images, which stay where they are in memory or on disk."""
    table = rows.data.table.append_column(name, values)
    features = datasets.Features({**rows.features, name: datasets.Image()})
    return datasets.Dataset(datasets.table.InMemoryTable(table), datasets.DatasetInfo(features=features), rows.split)


def _exists(image: str | dict | None) -> bool:
    return isinstance(image, dict) or bool(image) and (is_member_path(image) or Path(image).exists())


def _list_bases(folder: Path) -> list[Path]:
    """The folders that paths of images may start from: the dataset's, those of its parquet files, and where we are."""
    of_files = dict.fromkeys(path.parent for path in sorted(folder.rglob("*.parquet")))
    return [folder, *list(of_files)[:MAX_BASES], Path.cwd()]


def _open_paths(rows: Rows, name: str, finder: ImageFinder) -> Rows:
    """A column of text that names existing images -> images by absolute path; any other column stays."""
    probe = [row[name] for row in rows.select_columns([name]).take(PROBED_ROWS)]
    named = next((value for value in probe if value), None)
    if not names_images(name, probe) or not _exists(locate_images(name, [named], finder)[0]):
        return rows  # such as the file name that a pair was made from
    if isinstance(rows, datasets.Dataset):
        paths = locate_images(name, rows.data.column(name).to_pylist(), finder)
        rows = rows.remove_columns(name).add_column(name, paths)
    else:
        features = datasets.Features({**rows.features, name: datasets.Value("string")})
        rows = rows.map(lambda batch: {name: locate_images(name, batch[name], finder)}, batched=True, features=features)
    return rows.cast_column(name, datasets.Image(decode=False))
