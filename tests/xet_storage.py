"""Read what a client uploads to Xet storage: xorbs (blocks of chunks) and shards (the chunks of each file).

Both layouts are specified by the Xet protocol (huggingface.co/docs/xet).
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa

HAS_VERIFICATION, HAS_METADATA = 1 << 31, 1 << 30
ENTRY = 48  # bytes of each header and entry of a shard
LAST = b"\xff" * 32


class Segment(NamedTuple):
    """Chunks first to end (excluded) of a xorb."""

    xorb: str
    first: int
    end: int


def read_files(shard: bytes) -> Iterator[list[Segment]]:
    """The files that a shard describes."""
    place = ENTRY  # after the header of the shard
    while shard[place : place + 32] != LAST:
        flags, count = struct.unpack_from("<II", shard, place + 32)
        place += ENTRY
        entries = [shard[place + index * ENTRY : place + (index + 1) * ENTRY] for index in range(count)]
        yield [Segment(hash_name(entry[:32]), *struct.unpack("<II", entry[40:48])) for entry in entries]
        place += ENTRY * (count * (2 if flags & HAS_VERIFICATION else 1) + (1 if flags & HAS_METADATA else 0))


def read_chunks(xorb: bytes) -> list[bytes]:
    """The decompressed chunks of a xorb."""
    chunks, place = [], 0
    while place + 8 <= len(xorb) and xorb[place] == 0:
        packed, scheme = int.from_bytes(xorb[place + 1 : place + 4], "little"), xorb[place + 4]
        size = int.from_bytes(xorb[place + 5 : place + 8], "little")
        chunks.append(unpack(xorb[place + 8 : place + 8 + packed], scheme, size))
        place += 8 + packed
    return chunks


def unpack(content: bytes, scheme: int, size: int) -> bytes:
    """Decompress a chunk. scheme: 0 none, 1 LZ4 frame, 2 LZ4 frame of bytes grouped by their index modulo 4."""
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
    """The name of a hash in URLs: four little-endian numbers in hexadecimal."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", content))
