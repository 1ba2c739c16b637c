"""Where the images are that a table names: beside it, in the dataset's folder, in archives, or moved from elsewhere."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath

from utils.archives import ARCHIVE_SUFFIXES, list_members, member_path
from utils.errors import InputError

logger = logging.getLogger(__name__)
PROBED_PATHS = 20  # of a column decide where its images are; looking at each would take long on a network disk
MAX_MISSES = 20  # images of a folder of another machine that are looked for, before the folder counts as missing
Find = Callable[[str], str]


class ImageFinder:
    """Turns the paths of a table's image columns into absolute ones, or ones in an archive.

    bases: folders that relative paths may start from, the likeliest first. Tried in this order, and chosen by most of
    the first paths of a column: the path from each folder; an archive in one of them; and, for paths that were written
    on another machine or before the dataset was moved, their ends from each folder or a subfolder, which is reported.
    Where no image is found, the paths start from the first folder, so that the message about a missing image names it.

    Each folder of another machine stands for one folder here: two for the same one, or several here for one, could
    give a wrong image, and raise InputError. One finder is for all columns of a table, because a pair whose two
    images were told apart by their folders would otherwise become one image.
    """

    def __init__(self, bases: Sequence[Path]):
        self._bases = list(dict.fromkeys(base.resolve() for base in bases if base.is_dir()))
        self._moved: dict[str, Path] = {}  # folder in the table -> folder here
        self._found: set[Path] = set()  # the first files of columns whose paths are right, and of folders that moved
        self._misses: Counter[str] = Counter()  # by folder in the table

    def find(self, paths: Sequence[str]) -> list[str]:
        """The place of each path of a column. Raises InputError."""
        probe = [path for path in paths if path][:PROBED_PATHS]
        plain = [_from_folder(base) for base in self._bases]
        best = max(plain, key=lambda find: _count(find, probe), default=None)
        if best is None:
            return list(paths)
        if _count(best, probe):
            self._found |= {Path(best(path)).resolve() for path in probe}
            return [best(path) for path in paths]
        members = archive_members(tuple(self._bases))
        in_archive = next((find for path in probe if (find := _in_archive(members, path))), None)
        if in_archive:
            return [in_archive(path) or best(path) for path in paths]
        return [self._find_moved(path) or best(path) for path in paths]

    def _find_moved(self, path: str) -> str | None:
        """The place of an image whose folder is elsewhere now, None if it is not found."""
        parent, _, name = _with_slashes(path).rpartition("/")
        if parent not in self._moved and self._misses[parent] < MAX_MISSES:
            place = self._locate(path)
            if place is None:
                self._misses[parent] += 1
                return None
            if place in self._found or place.parent in self._moved.values():
                raise InputError(
                    f"{path} does not exist, and the only file with its name, {place}, is also another image of the "
                    "table: nothing but the missing folder tells them apart. Give present paths in the table"
                )
            if not self._moved:
                logger.warning("%s does not exist: the images are taken from their places here (%s)", path, place)
            self._moved[parent] = place.parent
            self._found.add(place)
        return str(self._moved[parent] / name) if parent in self._moved else None

    def _locate(self, path: str) -> Path | None:
        """The file that has the longest end of a path, below one of the folders. Raises InputError for several."""
        parts = PurePosixPath(_with_slashes(path)).parts
        # A name alone says too little: it may be that of the file from which a pair was made.
        for dropped in range(len(parts) if len(parts) > 1 else 0):
            found = {end.resolve() for base in self._places if (end := base.joinpath(*parts[dropped:])).is_file()}
            if len(found) > 1:
                listed = " and ".join(map(str, sorted(found)[:2]))
                raise InputError(f"{path} does not exist, and could be {listed}: give its present path in the table")
            if found:
                return found.pop()
        return None

    @cached_property
    def _places(self) -> list[Path]:
        """The folders and their subfolders, in which the ends of paths are looked for."""
        inside = [path for base in self._bases for path in sorted(base.iterdir()) if path.is_dir()]
        return list(dict.fromkeys([*self._bases, *inside]))


@lru_cache(maxsize=8)  # asked for each batch of a stream
def archive_members(bases: tuple[Path, ...]) -> dict[str, str]:
    """The path of each file in the archives of some folders, by its name in the archive. Raises InputError.

    The name may also omit a folder that holds everything in the archive, or begin with the archive's own name. A name
    that several archives have has all their paths, one a line: only one with the archive's name tells them apart.
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
                known = members.get(alias, path).split("\n")
                members[alias] = "\n".join(known if path in known else [*known, path])
    return members


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
    places = list(filter(None, members.get(name, "").split("\n")))
    if len(places) > 1:
        archives = [Path(place.rpartition("::")[2]) for place in places]
        raise InputError(
            f"{name} is in several archives ({', '.join(archive.name for archive in archives)}): write "
            f"{' or '.join(f'{archive.stem}/{name}' for archive in archives[:2])} in the table"
        )
    return places[0] if places else None


def _count(find: Find, probe: Sequence[str]) -> int:
    return sum(Path(find(path)).exists() for path in probe)


def _from_folder(base: Path) -> Find:
    def find(path: str) -> str:
        if "\\" in path and not (base / path).exists():
            path = _with_slashes(path)
        return str(base / Path(path).expanduser())

    return find


def _with_slashes(path: str) -> str:
    """A path that may have been written on Windows."""
    return (PureWindowsPath(path).as_posix() if "\\" in path else path).removeprefix("./")
