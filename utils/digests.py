"""Fingerprints of files: their size and XXH3 digest detect truncated and damaged files, at the speed of memory."""

import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import xxhash

CHUNK = 4 << 20  # bytes that are digested and written at a time: they stay in the processor's cache in between
Fingerprint = list  # [size, digest], as JSON has it


class DigestedFile:
    """A new file that is written front to back and digested on the way, so that it need not be read again."""

    def __init__(self, path: Path) -> None:
        self._file, self._digest, self._size = path.open("wb", buffering=0), xxhash.xxh3_64(), 0

    def write(self, content: bytes | memoryview) -> int:
        """Write all of the content; returns its size in bytes. Raises OSError."""
        view = memoryview(content).cast("B")
        for start in range(0, len(view), CHUNK):
            chunk = view[start : start + CHUNK]
            self._digest.update(chunk)
            while len(chunk):  # a raw file may write less than it was given
                chunk = chunk[self._file.write(chunk) :]
        self._size += len(view)
        return len(view)

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        """Nothing is buffered."""

    def fingerprint(self) -> Fingerprint:
        """Of what was written so far."""
        return [self._size, self._digest.hexdigest()]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def fingerprint_files(folder: Path, names: Iterable[str], is_old: bool = False) -> dict[str, Fingerprint]:
    """The fingerprint of each file by its name, several at a time: the digests release Python's lock.

    is_old: with the CRC-32 of older versions in place of XXH3.
    """
    names = list(names)
    with ThreadPoolExecutor(4) as threads:
        return dict(zip(names, threads.map(lambda name: _fingerprint(folder / name, is_old), names), strict=True))


def _fingerprint(path: Path, is_old: bool) -> Fingerprint:
    digest, checksum, size = xxhash.xxh3_64(), 0, 0
    buffer = memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            if is_old:
                checksum = zlib.crc32(buffer[:count], checksum)
            else:
                digest.update(buffer[:count])
            size += count
    return [size, checksum if is_old else digest.hexdigest()]
