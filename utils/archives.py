"""Files in a zip or an uncompressed tar, read in place: "zip://a/b.png::/data/images.zip", as fsspec writes them."""

import os
import struct
import tarfile
import threading
import zipfile
import zlib
from collections import OrderedDict
from functools import cache
from pathlib import Path
from typing import NamedTuple

ARCHIVE_SUFFIXES = (".zip", ".tar")
MAX_MEMBER_BYTES = 1_000_000_000
MAX_OPEN = 64  # archives at a time: a process may have a thousand files open, and datasets hundreds of tars
LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip's member: the lengths of the name and of the extra field after it
# (process, archive) -> its descriptor, the last used one at the end
_open_files: OrderedDict[tuple[int, str], int] = OrderedDict()
_lock = threading.Lock()  # a descriptor must not be closed while another thread reads from it
if hasattr(os, "register_at_fork"):  # where another thread held it, a forked worker would wait forever
    os.register_at_fork(after_in_child=lambda: globals().update(_lock=threading.Lock()))


class _Member(NamedTuple):
    """Where a file lies in its archive. crc: of a zip's member; is_deflated: else stored as it is."""

    start: int
    stored_size: int
    size: int
    is_deflated: bool = False
    crc: int | None = None


def member_path(archive: Path, member: str) -> str:
    """The path of a member, which `read_member` reads."""
    return f"{archive.suffix.lower()[1:]}://{member}::{archive.resolve()}"


def is_member_path(path: str) -> bool:
    return path.startswith(("zip://", "tar://")) and "::" in path


def list_members(archive: Path) -> list[str]:
    """The names of the files in an archive. Raises OSError, or ValueError for a damaged or compressed one."""
    return list(_index(str(archive.resolve())))


def read_member(path: str) -> bytes:
    """The bytes of a member. Raises FileNotFoundError, OSError, or ValueError for a damaged archive."""
    name, _, archive = path.partition("://")[2].rpartition("::")
    members = _index(archive)
    if name not in members:
        raise FileNotFoundError(f"{name} is not in {archive}")
    member = members[name]
    if member.size > MAX_MEMBER_BYTES:
        raise ValueError(f"{name} has {member.size:,} bytes")
    with _lock:
        content = _read(archive, member)
    if member.is_deflated:
        try:
            content = zlib.decompress(content, -zlib.MAX_WBITS, member.size)
        except zlib.error as error:
            raise ValueError(f"{name} in {archive} is damaged: {error}") from None
    if member.crc is not None and zlib.crc32(content) != member.crc:
        raise ValueError(f"{name} in {archive} is damaged: its checksum is wrong")
    return content


def _read(archive: str, member: _Member) -> bytes:
    """The stored bytes of a member."""
    file, start = _descriptor(archive), member.start
    if member.crc is not None:  # the lengths in the directory of a zip may differ from those before the file
        start += LOCAL_HEADER.size + sum(LOCAL_HEADER.unpack(_read_at(file, LOCAL_HEADER.size, start)))
    return _read_at(file, member.stored_size, start)


def _read_at(file: int, size: int, start: int) -> bytes:
    if hasattr(os, "pread"):
        content = os.pread(file, size, start)
    else:
        os.lseek(file, start, os.SEEK_SET)
        content = os.read(file, size)
    if len(content) < size:
        raise ValueError(f"the archive ends {size - len(content):,} bytes too early")
    return content


def _descriptor(archive: str) -> int:
    """An open archive. A fork opens its own, because where `pread` is missing it would share the position."""
    key = (os.getpid(), archive)
    if key not in _open_files:
        while len(_open_files) >= MAX_OPEN:
            os.close(_open_files.popitem(last=False)[1])
        _open_files[key] = os.open(archive, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    _open_files.move_to_end(key)
    return _open_files[key]


@cache  # of every archive: reading the index of a large one takes seconds
def _index(archive: str) -> dict[str, _Member]:
    try:
        return dict(_list_zip(archive) if archive.lower().endswith(".zip") else _list_tar(archive))
    except zipfile.BadZipFile as error:
        raise ValueError(f"{archive} is damaged: {error}") from None
    except tarfile.TarError as error:
        raise ValueError(f"{archive} is damaged or compressed: {error}. Unpack it") from None


def _list_zip(archive: str) -> list[tuple[str, _Member]]:
    members = []
    with zipfile.ZipFile(archive) as opened:
        for info in opened.infolist():
            if info.is_dir():
                continue
            if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{archive} has encrypted or unusually compressed files ({info.filename}). Unpack it")
            is_deflated = info.compress_type == zipfile.ZIP_DEFLATED
            place = (info.header_offset, info.compress_size, info.file_size, is_deflated, info.CRC)
            members.append((info.filename, _Member(*place)))
    return members


def _list_tar(archive: str) -> list[tuple[str, _Member]]:
    with tarfile.open(archive, "r:") as tar:  # only uncompressed: no other has positions
        return [
            (info.name.removeprefix("./"), _Member(info.offset_data, info.size, info.size))
            for info in tar
            if info.isfile()
        ]
