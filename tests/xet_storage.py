"""The part of Xet storage that an upload speaks: xorbs (blocks of chunks) and shards (which chunks make a file).

The layout of both is that of the Xet protocol's specification (huggingface.co/docs/xet).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa

HAS_VERIFICATION, HAS_METADATA = 1 << 31, 1 << 30
ENTRY = 48  # bytes of every header and entry of a shard
LAST = b"\xff" * 32


class Segment(NamedTuple):
    """Chunks first to end (excluded) of a xorb."""

    xorb: str
    first: int
    end: int


def read_files(shard: bytes) -> Iterator[list[Segment]]:
    """The files that a shard describes."""
    place = ENTRY  # after the shard's own header
    while shard[place : place + 32] != LAST:
        flags, count = struct.unpack_from("<II", shard, place + 32)
        place += ENTRY
        entries = [shard[place + index * ENTRY : place + (index + 1) * ENTRY] for index in range(count)]
        yield [Segment(hash_name(entry[:32]), *struct.unpack("<II", entry[40:48])) for entry in entries]
        place += ENTRY * (count * (2 if flags & HAS_VERIFICATION else 1) + (1 if flags & HAS_METADATA else 0))


def read_chunks(xorb: bytes) -> list[bytes]:
    """The chunks of a xorb, unpacked."""
    chunks, place = [], 0
    while place + 8 <= len(xorb) and xorb[place] == 0:
        packed, scheme = int.from_bytes(xorb[place + 1 : place + 4], "little"), xorb[place + 4]
        size = int.from_bytes(xorb[place + 5 : place + 8], "little")
        chunks.append(unpack(xorb[place + 8 : place + 8 + packed], scheme, size))
        place += 8 + packed
    return chunks


def unpack(content: bytes, scheme: int, size: int) -> bytes:
    """scheme: 0 as it is, 1 LZ4 frame, 2 the same of bytes grouped by their place in four."""
    if scheme == 0:
        return content
    plain = pa.decompress(content, decompressed_size=size, codec="lz4", asbytes=True)
    if scheme == 1:
        return plain
    ungrouped, start = bytearray(size), 0
    for offset in range(4):
        count = len(range(offset, size, 4))
        ungrouped[offset::4] = plain[start : start + count]
        start += count
    return bytes(ungrouped)


def hash_name(content: bytes) -> str:
    """A hash as addresses write it: four little-endian numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", content))
