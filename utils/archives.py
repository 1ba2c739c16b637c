"""Files in a zip or an uncompressed tar, read in place: "zip://a/b.png::/data/images.zip", as fsspec writes them."""

import os
import tarfile
import zipfile
from functools import lru_cache
from pathlib import Path

ARCHIVE_SUFFIXES = (".zip", ".tar")
MAX_MEMBER_BYTES = 1_000_000_000


def member_path(archive: Path, member: str) -> str:
    """The path of a member, which `read_member` reads."""
    return f"{archive.suffix.lower()[1:]}://{member}::{archive.resolve()}"


def is_member_path(path: str) -> bool:
    return path.startswith(("zip://", "tar://")) and "::" in path


def list_members(archive: Path) -> list[str]:
    """The names of the files in an archive. Raises OSError, or ValueError for a damaged or compressed one."""
    return list(_open(str(archive.resolve()), os.getpid())[1])


def read_member(path: str) -> bytes:
    """The bytes of a member. Raises FileNotFoundError, OSError, or ValueError for a damaged archive."""
    member, _, archive = path.partition("://")[2].rpartition("::")
    opened, members = _open(archive, os.getpid())
    if member not in members:
        raise FileNotFoundError(f"{member} is not in {archive}")
    if isinstance(opened, zipfile.ZipFile):
        if members[member].file_size > MAX_MEMBER_BYTES:
            raise ValueError(f"{member} has {members[member].file_size:,} bytes")
        return opened.read(member)
    start, size = members[member]
    return os.pread(opened, size, start) if hasattr(os, "pread") else _read_part(archive, start, size)


@lru_cache(maxsize=64)
def _open(archive: str, process: int) -> tuple:
    """(ZipFile, its members) or (file descriptor, start and size of each member). process: forks share no position."""
    if archive.lower().endswith(".zip"):
        try:
            opened = zipfile.ZipFile(archive)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{archive} is damaged: {error}") from None
        return opened, {info.filename: info for info in opened.infolist() if not info.is_dir()}
    try:
        with tarfile.open(archive, "r:") as tar:  # only uncompressed: no other has positions
            members = {info.name.removeprefix("./"): (info.offset_data, info.size) for info in tar if info.isfile()}
    except tarfile.TarError as error:
        raise ValueError(f"{archive} is damaged or compressed: {error}. Unpack it") from None
    return os.open(archive, os.O_RDONLY), members


def _read_part(archive: str, start: int, size: int) -> bytes:
    with Path(archive).open("rb") as file:
        file.seek(start)
        return file.read(size)
