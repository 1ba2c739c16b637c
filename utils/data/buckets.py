"""Which training size each row has, for `--resize_mode bucket`: known before the first batch, from headers alone."""

from __future__ import annotations

import pyarrow as pa
from tqdm import tqdm

from utils.data.geometry import Geometry, Size, make_buckets, nearest_bucket
from utils.data.sources import Source
from utils.pixels import BadRow, peek_size


def scan_buckets(sources: list[Source], geometry: Geometry) -> list[list[Size]]:
    """For each source, the bucket (h, w) of each row. A row that cannot be opened gets the square one: its draw will
    replace it by another row in any case."""
    buckets = make_buckets(geometry.resolution)
    square = min(buckets, key=lambda bucket: abs(bucket[0] - bucket[1]))
    total = sum(len(source.rows) for source in sources)
    found = []
    with tqdm(total=total, desc="Reading image sizes", disable=None) as progress:
        for source in sources:
            found.append([])
            rows = source.rows.select_columns([source.columns.original]).with_format("arrow")
            for row in range(len(rows)):
                try:
                    found[-1].append(nearest_bucket(peek_size(_stored_image(rows[row])), buckets))
                except BadRow:
                    found[-1].append(square)
                progress.update()
    return found


def _stored_image(row: pa.Table) -> object:
    """The file of a row of one image column, without copying it: only its header will be read."""
    image = row.column(0)[0]
    if not image.is_valid:
        return None
    if image["bytes"].is_valid:
        return pa.BufferReader(image["bytes"].as_buffer())
    return image["path"].as_py()
