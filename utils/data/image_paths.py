"""Where the images are that a table names: beside it, in the dataset's folder, in archives, or moved from elsewhere."""

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath

from utils.archives import ARCHIVE_SUFFIXES, list_members, member_path
from utils.errors import InputError

logger = logging.getLogger(__name__)
PROBED_PATHS = 20  # of a column decide where its images are; looking at each would take long on a network disk
Find = Callable[[str], str]


def find_images_by_path(paths: Sequence[str], bases: Sequence[Path]) -> Find:
    """What turns each path of a column into an absolute one, or one in an archive.

    bases: folders that relative paths may start from, the likeliest first. Tried in this order, and chosen by most of
    the first paths: the path from each folder; an archive in one of them; and, for paths that were written on another
    machine or before the dataset was moved, their ends from each folder, which is reported. Where no image is found,
    the paths start from the first folder, so that the message about a missing image names it.
    """
    bases = list(dict.fromkeys(base.resolve() for base in bases if base.is_dir()))
    probe = [path for path in paths if path][:PROBED_PATHS]
    plain = [_from_folder(base) for base in bases]
    best = max(plain, key=lambda find: _count(find, probe), default=None)
    if best is None or _count(best, probe):
        return best or (lambda path: path)
    members = archive_members(tuple(bases))
    in_archive = next((find for path in probe if (find := _in_archive(members, path))), None)
    if in_archive:
        return lambda path: in_archive(path) or plain[0](path)
    for base in bases:
        for path in probe:
            parts = PurePosixPath(_with_slashes(path)).parts
            for dropped in range(1, len(parts)):
                end = base.joinpath(*parts[dropped:])
                if end.exists():
                    _report_moved(base, f"{path} does not exist: the images are taken from their places here ({end})")
                    return _from_end(base, dropped)
    return plain[0]


@lru_cache(maxsize=8)  # asked for each batch of a stream
def archive_members(bases: tuple[Path, ...]) -> dict[str, str]:
    """The path of each file in the archives of some folders, by its name in the archive. Raises InputError.

    The name may also omit a folder that holds everything in the archive, or begin with the archive's own name. A name
    that two archives have is "" here: only the one with the archive's name tells them apart.
    """
    members: dict[str, str] = {}
    archives = [path for base in bases for path in sorted(base.iterdir()) if path.suffix.lower() in ARCHIVE_SUFFIXES]
    for archive in archives:
        try:
            names = list_members(archive)
        except (OSError, ValueError) as error:
            raise InputError(f"{archive} cannot be read: {error}") from None
        tops = {name.partition("/")[0] for name in names}
        top = f"{tops.pop()}/" if len(tops) == 1 else ""
        for name in names:
            path = member_path(archive, name)
            for alias in {name, name.removeprefix(top), f"{archive.stem}/{name}"}:
                members[alias] = path if members.get(alias, path) == path else ""
    return members


@lru_cache(maxsize=64)
def _report_moved(base: Path, message: str) -> None:
    """Once, and not for each batch of a stream."""
    logger.warning(message)


def _in_archive(members: dict[str, str], path: str) -> Find | None:
    """What finds members by paths like this one, if it is in an archive."""
    parts = PurePosixPath(_with_slashes(path)).parts
    for dropped in range(len(parts)):
        name = "/".join(parts[dropped:])
        if name in members:
            return lambda path, dropped=dropped: _member(members, path, dropped)
    return None


def _member(members: dict[str, str], path: str, dropped: int) -> str | None:
    name = "/".join(PurePosixPath(_with_slashes(path)).parts[dropped:])
    if members.get(name) == "":
        raise InputError(
            f"{name} is in several archives: rename it in the table to ARCHIVE/{name}, with the name of its archive "
            "without .zip or .tar"
        )
    return members.get(name)


def _count(find: Find, probe: Sequence[str]) -> int:
    return sum(Path(find(path)).exists() for path in probe)


def _from_folder(base: Path) -> Find:
    def find(path: str) -> str:
        if "\\" in path and not (base / path).exists():
            path = _with_slashes(path)
        return str(base / Path(path).expanduser())

    return find


def _from_end(base: Path, dropped: int) -> Find:
    return lambda path: str(base.joinpath(*PurePosixPath(_with_slashes(path)).parts[dropped:]))


def _with_slashes(path: str) -> str:
    """A path that may have been written on Windows."""
    return (PureWindowsPath(path).as_posix() if "\\" in path else path).removeprefix("./")
