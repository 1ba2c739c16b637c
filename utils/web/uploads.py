"""The images that visitors upload: their limits, checked by the header, and reading one when its turn has come."""

from functools import cached_property
from pathlib import Path

from PIL import Image

from utils.errors import InputError
from utils.pixels import BadRow, decode_image, num_frames, peek_size


def check_upload(path: str | None, *, max_pixels: int, max_bytes: int) -> tuple[int, int]:
    """The upright size (h, w) of an upload, without decoding it: eight small files of 49 megapixels take gigabytes.

    Raises InputError with a message for the visitor. Damage behind the header is found when the image is edited.
    """
    if not path or not Path(path).is_file():
        raise InputError("The image is missing: choose one first.")
    try:
        if (size := Path(path).stat().st_size) > max_bytes:
            raise BadRow(f"too large: {size / 2**20:.1f} MB, at most {max_bytes / 2**20:g} MB are allowed")
        return peek_size(path, max_pixels=max_pixels)
    except BadRow as error:
        raise _refused(error) from error


class Upload:
    """The image of the request that runs. Its file may have been deleted while the request waited."""

    def __init__(self, path: Path) -> None:
        try:
            content = path.read_bytes()
            self.is_animated = num_frames(content) > 1
        except BadRow as error:
            raise _refused(error) from error
        except OSError as error:
            raise InputError("The image was deleted in the meantime: choose it again.") from error
        self.read = lambda: content  # one object for all jobs: the edit service decodes it once

    @cached_property
    def image(self) -> Image.Image:
        """The upright RGB image, for comparison with edits of its size."""
        return decode_image(self.read())


def _refused(error: BadRow) -> InputError:
    return InputError(f"The image cannot be used: {error.reason}. Choose another one.")
