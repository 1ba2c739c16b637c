"""Weight files read a few rows of a tensor at a time, and written the same way: a model never lies in memory whole.

Files are mapped, and mapped anew after every `WINDOW` bytes, so that the pages read go back to the system.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Iterable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from utils.errors import InputError

WINDOW = 32 << 20  # bytes read before a file is mapped anew
CHUNK = 1 << 19  # elements worked on at a time: what a processor's cache holds
CODES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ALL = slice(None)


class TensorFiles:
    """The tensors of one model or adapter, in one .safetensors or .bin file or several.

    `shapes`: name -> shape; `metadata`: what safetensors files say beside them. what: the flag and name, for messages.
    Raises `InputError` for a file that is not whole.
    """

    def __init__(self, files: Sequence[Path], what: str) -> None:
        self.what, self.shapes, self.metadata = what, {}, {}
        self._homes: dict[str, _OpenFile] = {}
        for path in files:
            opened = _OpenFile(Path(path), what)
            self.metadata |= opened.metadata
            self.shapes |= opened.shapes
            self._homes |= dict.fromkeys(opened.shapes, opened)

    def read(self, name: str, rows: slice = ALL) -> torch.Tensor:
        """A tensor, or some of its rows, in its stored dtype; it may be mapped, so it must not be changed in place."""
        return self._homes[name].read(name, rows if self.shapes[name] else ALL)


class _OpenFile:
    """One file, mapped anew as it is read."""

    def __init__(self, path: Path, what: str) -> None:
        self._path, self._what, self._is_safetensors = path, what, path.suffix.lower() == ".safetensors"
        self._read, self._handle = 0, None
        handle = self._open()
        if self._is_safetensors:
            self.shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
            self.metadata = handle.metadata() or {}
        else:
            self.shapes, self.metadata = {name: tuple(value.shape) for name, value in handle.items()}, {}

    def read(self, name: str, rows: slice) -> torch.Tensor:
        if self._handle is None or self._read > WINDOW:
            self._handle, self._read = None, 0  # first let go of the old pages
            self._handle = self._open()
        if self._is_safetensors:
            value = self._handle.get_slice(name)[rows] if rows != ALL else self._handle.get_tensor(name)
        else:
            value = self._handle[name][rows] if rows != ALL else self._handle[name]
        self._read += value.nbytes
        return value

    def _open(self) -> Any:
        try:
            if self._is_safetensors:
                return safe_open(self._path, framework="pt")
            return _load_pickle(self._path)
        except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            advice = "copy it again" if self._is_safetensors else "only plain tensors are read from such files"
            raise InputError(f"{self._what}: {self._path} cannot be read ({first.strip()}): {advice}") from error


def _load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file of `torch.save`; nothing in it is run. Old files, which cannot be mapped, are loaded."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        content = torch.load(path, map_location="cpu", weights_only=True)
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError("it holds something else than tensors by their names")
    return content


def split_rows(shape: Sequence[int], chunk: int = CHUNK) -> Iterator[slice]:
    """Slices of the first dimension that hold about `chunk` elements each; one for all where there is little."""
    if not shape or prod(shape) <= chunk:
        yield ALL
        return
    step = max(1, chunk * shape[0] // prod(shape))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def write_safetensors(
    path: Path, tensors: dict[str, tuple[tuple[int, ...], torch.dtype]], rows: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """Write a .safetensors file from start to end, beside its place, and rename it into it.

    tensors: name -> (shape, dtype), in the order of `rows`, which gives (name, next rows of it).
    Format: https://github.com/huggingface/safetensors#format. Raises ValueError when `rows` are not what was promised.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (shape, dtype) in tensors.items():
        begin, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of eight bytes
    unfinished = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        with unfinished.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name, value in rows:
                expected = len(text) + 8 + header[name]["data_offsets"][0]
                if value.dtype != tensors[name][1] or not expected <= file.tell():
                    raise ValueError(f"{name} does not come in its turn or in its dtype")
                file.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            if file.tell() != len(text) + 8 + end:
                raise ValueError("not every row of every tensor was written")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def save_weights(folder: Path, model: ModelMixin, state: dict[str, torch.Tensor]) -> None:
    """Write a folder that `from_pretrained` loads: the model's configuration with `state` as the weights.

    diffusers' `save_pretrained` takes no other weights than the model's own, and ignores a `state_dict` it is given.
    """
    model.save_config(folder)
    contiguous = {name: value.contiguous() for name, value in state.items()}  # channels_last cannot be stored
    save_file(contiguous, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The state dict saved in a model's folder, sharded or not."""
    state = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= load_file(path)
    return state
