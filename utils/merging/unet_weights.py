"""A whole UNet in files, read by the names and in the shapes of the UNet that it is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch

from utils.errors import InputError
from utils.merging.unet_names import match_parameters
from utils.merging.weight_sources import Located
from utils.weight_files import ALL, TensorFiles

Shape = tuple[int, ...]
COND_PROJ = "time_embedding.cond_proj.weight"  # (width, 256): LCM's embedding of its guidance scale
CONV_IN = "conv_in.weight"
NOISE_CHANNELS = 4


class UNetWeights:
    """A UNet's parameters, read as rows. shapes: parameter -> shape; skipped: stored names of other parts."""

    def __init__(self, located: Located, shapes: Mapping[str, Shape], layers_per_block: int | list[int]) -> None:
        """shapes: of the editor. Raises `InputError` that names what is missing, unknown or of another shape.

        conv_in may have 4 inputs where the editor has 8, and a 1x1 convolution may be stored as a matrix or the
        other way round. The guidance embedding of LCM may be there too.
        """
        self.what = located.source.what
        self._files = TensorFiles(located.files, self.what)
        self._names, self.skipped, unknown = match_parameters(
            self._files.shapes, {*shapes, COND_PROJ}, layers_per_block
        )
        self.shapes = {name: self._shape(name, shapes.get(name)) for name in self._names}
        self._refuse_misfit(shapes, unknown)

    @staticmethod
    def read_shapes(located: Located) -> dict[str, Shape]:
        """The shapes of an editor's own parameters, which all the others are held against."""
        return TensorFiles(located.files, located.source.what).shapes

    @property
    def has_guidance_embedding(self) -> bool:
        return COND_PROJ in self._names

    def read(self, name: str, rows: slice = ALL) -> torch.Tensor:
        """Some rows of a parameter in its stored dtype, in the shape of the editor's; not to be changed in place."""
        value = self._files.read(self._names[name], rows)
        return value.reshape(len(value), *self.shapes[name][1:]) if value.ndim else value

    def _shape(self, name: str, expected: Shape | None) -> Shape:
        shape = self._files.shapes[self._names[name]]
        is_pointwise = expected and shape[:2] == expected[:2] and prod(shape) == prod(expected)
        return expected if is_pointwise else shape

    def _refuse_misfit(self, shapes: Mapping[str, Shape], unknown: list[str]) -> None:
        problems = []
        if unknown and self._names and not any(name in shapes for name in self._names):
            problems.append(f"it holds no UNet of diffusers or of the original code: {_listed(unknown)}")
        elif unknown:
            problems.append(f"it has what the editor has not: {_listed(unknown)}")
        if missing := [name for name in shapes if name not in self._names]:
            problems.append(f"it lacks {_listed(missing)}")
        for name, expected in shapes.items():
            shape = self.shapes.get(name, expected)
            if shape != expected and not (name == CONV_IN and _is_narrower(shape, expected)):
                problems.append(f"its {name} has the shape {shape}, and the editor's {expected}")
        if problems:
            raise InputError(
                f"{self.what} does not fit the editor: {'; '.join(problems[:8])}"
                f"{f'; and {len(problems) - 8} more' if len(problems) > 8 else ''}. "
                "Both must be of one family (SD 1.x, SD 2.x, SDXL)"
            )


def _is_narrower(shape: Shape, expected: Shape) -> bool:
    return len(shape) == 4 and shape[1] == NOISE_CHANNELS and (shape[0], *shape[2:]) == (expected[0], *expected[2:])


def _listed(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
