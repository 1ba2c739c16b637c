"""Reads and writes weight files a few rows of a tensor at a time, so that a model is never in memory as a whole.

Files are memory-mapped, and mapped again after every `WINDOW` bytes, which releases the pages that were read.
"""

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
from safetensors.torch import load_file

from utils.digests import DigestedFile, Fingerprint
from utils.errors import InputError, first_line

WINDOW = 32 << 20  # bytes read before a file is mapped again
CHUNK = 1 << 19  # elements of a slice: small enough for a processor's cache
SAFETENSORS_DTYPES = {
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
READ_ERRORS = (SafetensorError, OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError)


def read_header(path: Path, what: str) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """(shapes by name, metadata) of a .safetensors file, without its weights.

    what: the model or adapter, as the start of the message of the InputError for a damaged file.
    """
    file = _OpenFile(path, what)
    return file.shapes, file.metadata


class TensorFiles:
    """The tensors of one model or adapter in one or more .safetensors or .bin files.

    shapes: by name; metadata: of the safetensors headers.
    what: the start of the message of the InputError for a damaged file.
    """

    def __init__(self, files: Sequence[Path], what: str) -> None:
        self.shapes, self.metadata = {}, {}
        self._files: dict[str, _OpenFile] = {}
        for path in files:
            opened = _OpenFile(Path(path), what)
            self.metadata |= opened.metadata
            self.shapes |= opened.shapes
            self._files |= dict.fromkeys(opened.shapes, opened)

    def read(self, name: str, rows: slice = ALL) -> torch.Tensor:
        """A tensor or some of its rows in the stored dtype. Do not change it in place: it may be memory-mapped."""
        return self._files[name].read(name, rows if self.shapes[name] else ALL)


class _OpenFile:
    """One file, mapped again after every `WINDOW` bytes."""

    def __init__(self, path: Path, what: str) -> None:
        self._path, self._what, self._is_safetensors = path, what, path.suffix.lower() == ".safetensors"
        self._num_read, self._handle = 0, None
        handle = self._open()
        if self._is_safetensors:
            self.shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
            self.metadata = handle.metadata() or {}
        else:
            self.shapes, self.metadata = {name: tuple(value.shape) for name, value in handle.items()}, {}

    def read(self, name: str, rows: slice) -> torch.Tensor:
        if self._handle is None or self._num_read > WINDOW:
            self._handle, self._num_read = None, 0  # unmap before mapping again
            self._handle = self._open()
        if self._is_safetensors:
            value = self._handle.get_slice(name)[rows] if rows != ALL else self._handle.get_tensor(name)
        else:
            value = self._handle[name][rows] if rows != ALL else self._handle[name]
        self._num_read += value.nbytes
        return value

    def _open(self) -> Any:
        try:
            return safe_open(self._path, framework="pt") if self._is_safetensors else _load_pickle(self._path)
        except READ_ERRORS as error:
            advice = "copy it again" if self._is_safetensors else "only plain tensors are supported"
            reason = first_line(error)
            if isinstance(error, pickle.UnpicklingError):
                reason, advice = "damaged, or objects that could run code", "give a .safetensors file instead"
            raise InputError(f"{self._what}: {self._path} cannot be read ({reason}): {advice}") from error


class _Ignored:
    """Stands for an object of a class that is not loaded."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def _load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `torch.save` file, without running code in it; memory-mapped unless the format is too old."""
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (ValueError, RuntimeError):  # only files of the current format can be inspected
        unknown = []
    # Classes of other libraries, such as callbacks of PyTorch Lightning, become empty objects: no code of theirs runs.
    with torch.serialization.safe_globals([(type(f"Ignored{i}", (_Ignored,), {}), n) for i, n in enumerate(unknown)]):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            content = torch.load(path, map_location="cpu", weights_only=True)
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError("it is not a dict of tensors by name")
    return content


def split_rows(shape: Sequence[int], chunk: int = CHUNK) -> Iterator[slice]:
    """Slices of the first dimension with about `chunk` elements each; a single one for a small tensor."""
    if not shape or prod(shape) <= chunk:
        yield ALL
        return
    step = max(1, chunk * shape[0] // prod(shape))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def write_safetensors(
    path: Path, tensors: dict[str, tuple[tuple[int, ...], torch.dtype]], rows: Iterable[tuple[str, torch.Tensor]]
) -> Fingerprint:
    """Write a .safetensors file front to back under a temporary name, then rename it; returns its fingerprint.

    tensors: name -> (shape, dtype), in the order of `rows`, which yields (name, its next rows).
    Format: https://github.com/huggingface/safetensors#format. Raises ValueError if `rows` do not match `tensors`.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (shape, dtype) in tensors.items():
        begin, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of eight bytes
    unfinished = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        with DigestedFile(unfinished) as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name, value in rows:
                expected = len(text) + 8 + header[name]["data_offsets"][0]
                if value.dtype != tensors[name][1] or not expected <= file.tell():
                    raise ValueError(f"{name} has another dtype or is out of order")
                file.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            if file.tell() != len(text) + 8 + end:
                raise ValueError("rows are missing")
        unfinished.replace(path)
        return file.fingerprint()
    finally:
        unfinished.unlink(missing_ok=True)


def save_weights(folder: Path, model: ModelMixin, state: dict[str, torch.Tensor]) -> dict[str, Fingerprint]:
    """Write a folder that `from_pretrained` loads: the model's configuration with `state` as the weights.

    diffusers' `save_pretrained` ignores its `state_dict` argument and saves the model's own weights. Returns the
    fingerprint of the file of weights by its name.
    """
    model.save_config(folder)
    names = sorted(state, key=lambda name: (-state[name].itemsize, name))  # every tensor is aligned to its dtype
    tensors = {name: (tuple(state[name].shape), state[name].dtype) for name in names}
    rows = ((name, state[name].detach().cpu()) for name in names)  # one tensor at a time
    return {SAFETENSORS_WEIGHTS_NAME: write_safetensors(folder / SAFETENSORS_WEIGHTS_NAME, tensors, rows)}


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The state dict in a model's folder, sharded or not."""
    state = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= load_file(path)
    return state
