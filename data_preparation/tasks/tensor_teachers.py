"""Teachers that map a tensor to a tensor: a network exported to ONNX, and a model of torch.hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from data_preparation.tasks.teachers import Picture, Teach, TeacherSettings, check_edit
from utils.errors import InputError


def open_onnx(file: str, settings: TeacherSettings, rank: int) -> Teach:
    """onnxruntime on the GPU where its build has one, else on the CPU. A fixed input size is served by resizing."""
    try:
        import onnxruntime
    except ImportError:
        raise InputError(f"--teacher onnx:{file} needs onnxruntime: pip install onnxruntime") from None
    wanted = ["CPUExecutionProvider"] if settings.device == "cpu" else ["CUDAExecutionProvider", "CPUExecutionProvider"]
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3  # more threads sum in another order
    try:
        session = onnxruntime.InferenceSession(
            file, options, providers=[(name, {"device_id": rank}) if "CUDA" in name else name for name in providers]
        )
    except Exception as error:  # onnxruntime's own types
        raise InputError(f"--teacher onnx:{file} cannot be loaded: {str(error).splitlines()[0]}") from error
    given = session.get_inputs()
    if len(given) != 1 or len(given[0].shape) != 4:
        shapes = ", ".join(f"{value.name} {value.shape}" for value in given)
        raise InputError(f"--teacher onnx:{file}: takes {shapes}; a network of one picture (4 dimensions) is wanted")
    shape, name = given[0].shape, given[0].name
    layout = _find_layout(shape, settings.layout, f"onnx:{file}")
    sides = [side if isinstance(side, int) else None for side in (shape[2:4] if layout == "nchw" else shape[1:3])]
    number = np.float16 if "float16" in given[0].type else np.float32

    def run(tensor: np.ndarray) -> np.ndarray:
        rows = [tensor] if shape[0] != 1 else np.split(tensor, len(tensor))  # an export of batch 1 takes one by one
        return np.concatenate([session.run(None, {name: row.astype(number)})[0] for row in rows])

    return _teach_by(run, settings, layout, tuple(sides), f"--teacher onnx:{file}")


def open_torchhub(place: str, settings: TeacherSettings, rank: int) -> Teach:
    """A model of a repository on GitHub or in a folder, as `owner/name:branch:model`; its code runs on this machine."""
    import torch

    from utils.runtime import choose_device

    if not settings.trusts_code:
        raise InputError(
            f"--teacher torchhub:{place} runs that repository's code: read it, and say --trust_remote_code"
        )
    repository, _, model = place.rpartition(":")
    device, _ = choose_device(settings.device, None)
    device = f"cuda:{rank % torch.cuda.device_count()}" if str(device) == "cuda" else device
    is_local = Path(repository).is_dir()
    try:
        network = torch.hub.load(
            repository,
            model,
            source="local" if is_local else "github",
            trust_repo=True,
            verbose=False,
            **settings.extra,
        )
        network = network.eval().to(device)
    except Exception as error:  # whatever a stranger's code raises
        raise InputError(f"--teacher torchhub:{place} cannot be loaded: {type(error).__name__}: {error}") from error
    layout = "nchw" if settings.layout == "auto" else settings.layout

    @torch.no_grad()
    def run(tensor: np.ndarray) -> np.ndarray:
        return network(torch.from_numpy(tensor).to(device)).float().cpu().numpy()

    return _teach_by(run, settings, layout, (None, None), f"--teacher torchhub:{place}")


def _find_layout(shape: list, wanted: str, name: str) -> str:
    if wanted != "auto":
        return wanted
    if shape[1] == 3 or shape[3] == 3:
        return "nchw" if shape[1] == 3 else "nhwc"
    raise InputError(f"--teacher {name}: its input {shape} does not show where the colours are: give --teacher_layout")


def _teach_by(
    run: Callable[[np.ndarray], np.ndarray], settings: TeacherSettings, layout: str, sides: tuple, name: str
) -> Teach:
    def teach(pictures: list[Picture], *_: object) -> list[tuple[Picture, dict]]:
        height, width = pictures[0].shape[:2]
        fitted = [_fit(picture, sides, settings.multiple) for picture in pictures]
        try:
            output = run(to_tensor(np.stack(fitted), settings, layout))
        except Exception as error:  # of the network's making
            raise InputError(f"{name} failed on {width}x{height} pixels: {str(error).splitlines()[0]}") from error
        edits = to_pictures(output, settings, layout)
        if sides != (None, None):
            edits = [cv2.resize(edit, (width, height), interpolation=cv2.INTER_AREA) for edit in edits]
        return [
            (check_edit(edit[:height, :width], picture, name), {})
            for edit, picture in zip(edits, pictures, strict=True)
        ]

    return teach


def _fit(picture: Picture, sides: tuple, multiple: int) -> Picture:
    """Resized to the sides that a network insists on, else mirrored at the right and bottom up to the multiple."""
    height, width = picture.shape[:2]
    if sides != (None, None):
        return cv2.resize(picture, (sides[1] or width, sides[0] or height), interpolation=cv2.INTER_AREA)
    below, right = -height % multiple, -width % multiple
    return cv2.copyMakeBorder(picture, 0, below, 0, right, cv2.BORDER_REFLECT_101) if below or right else picture


def to_tensor(pictures: np.ndarray, settings: TeacherSettings, layout: str) -> np.ndarray:
    """uint8 RGB (B, H, W, 3) -> float32 in the network's range, channels and layout."""
    black, white = settings.input_range
    tensor = pictures.astype(np.float32) / 255 * (white - black) + black
    tensor = tensor[..., ::-1] if settings.channels == "bgr" else tensor
    return np.ascontiguousarray(tensor.transpose(0, 3, 1, 2) if layout == "nchw" else tensor)


def to_pictures(tensor: np.ndarray, settings: TeacherSettings, layout: str) -> list[Picture]:
    """The network's output -> uint8 RGB (H, W, 3) each; values outside its range are clipped."""
    black, white = settings.output_range or settings.input_range
    tensor = tensor.astype(np.float32).transpose(0, 2, 3, 1) if layout == "nchw" else tensor.astype(np.float32)
    tensor = tensor[..., ::-1] if settings.channels == "bgr" else tensor
    values = np.nan_to_num((tensor - black) / (white - black))
    return list((np.clip(values, 0, 1) * 255).round().astype(np.uint8))
