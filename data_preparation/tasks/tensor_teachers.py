"""Teachers that map a tensor to a tensor: a network exported to ONNX, and a model of torch.hub."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from data_preparation.tasks.plan import TeacherSettings
from utils.errors import InputError

# (images, instructions, generators of the rows) -> (edited image, drawn values) of each row
Teacher = Callable[[list[np.ndarray], list[str], list[np.random.Generator]], list[tuple[np.ndarray, dict]]]


def load_onnx_teacher(file: str, settings: TeacherSettings, rank: int) -> Teacher:
    """A network for onnxruntime, on the GPU if its build supports that. A fixed input size is served by resizing."""
    try:
        import onnxruntime
    except ImportError:
        raise InputError(f"--teacher onnx:{file} needs onnxruntime: pip install onnxruntime") from None
    from utils.runtime import choose_device

    kind, _, index = choose_device(settings.device, rank=rank)[0].partition(":")
    providers: list = ["CPUExecutionProvider"]
    if kind == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": int(index or 0)}))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3  # more threads would sum in another order
    try:
        session = onnxruntime.InferenceSession(file, options, providers=providers)
    except Exception as error:  # onnxruntime has exception types of its own
        raise InputError(f"--teacher onnx:{file} cannot be loaded: {str(error).splitlines()[0]}") from error
    inputs = session.get_inputs()
    if len(inputs) != 1 or len(inputs[0].shape) != 4:
        shapes = ", ".join(f"{value.name} {value.shape}" for value in inputs)
        raise InputError(f"--teacher onnx:{file}: its inputs are {shapes}; it must have one input of 4 dimensions")
    shape, name = inputs[0].shape, inputs[0].name
    layout = settings.teacher_layout
    if layout == "auto":
        if 3 not in (shape[1], shape[3]):
            raise InputError(f"--teacher onnx:{file}: cannot find the channels in {shape}; give --teacher_layout")
        layout = "nchw" if shape[1] == 3 else "nhwc"
    sides = [side if isinstance(side, int) else None for side in (shape[2:4] if layout == "nchw" else shape[1:3])]
    dtype = np.float16 if "float16" in inputs[0].type else np.float32

    def run(tensor: np.ndarray) -> np.ndarray:
        rows = [tensor] if shape[0] != 1 else np.split(tensor, len(tensor))  # an export with batch size 1
        return np.concatenate([session.run(None, {name: row.astype(dtype)})[0] for row in rows])

    return _tensor_teacher(run, settings, layout, (sides[0], sides[1]), f"--teacher onnx:{file}")


def load_torchhub_teacher(spec: str, settings: TeacherSettings, rank: int) -> Teacher:
    """A model `owner/name:branch:model` on GitHub, or `FOLDER:model`. Runs the code of the repository."""
    import torch

    from utils.runtime import choose_device

    repository, _, model = spec.rpartition(":")
    device, _ = choose_device(settings.device, rank=rank)
    source = "local" if Path(repository).is_dir() else "github"
    try:
        network = torch.hub.load(repository, model, source=source, trust_repo=True, verbose=False, **settings.extra)
        network = network.eval().to(device)
    except Exception as error:  # the repository's code may raise anything
        raise InputError(f"--teacher torchhub:{spec} cannot be loaded: {type(error).__name__}: {error}") from error
    layout = "nchw" if settings.teacher_layout == "auto" else settings.teacher_layout

    @torch.no_grad()
    def run(tensor: np.ndarray) -> np.ndarray:
        return network(torch.from_numpy(tensor).to(device)).float().cpu().numpy()

    return _tensor_teacher(run, settings, layout, (None, None), f"--teacher torchhub:{spec}")


def find_torchhub_folder(repository: str, flag: str) -> Path:
    """The folder of the code of `FOLDER` or `owner/name:branch`, which torch.hub downloads once. Raises InputError."""
    if Path(repository).is_dir():
        return Path(repository)
    import torch

    try:
        torch.hub.list(repository, trust_repo=True, verbose=False)
    except Exception as error:  # of the network, or of the repository's code
        raise InputError(f"{flag} cannot be loaded: {type(error).__name__}: {error}") from error
    name, _, branch = repository.partition(":")
    branches = [branch] if branch else ["main", "master"]  # in torch.hub's order
    names = [f"{name}/{one}".replace("/", "_") for one in branches]
    return next(folder for one in names if (folder := Path(torch.hub.get_dir(), one)).is_dir())


def _tensor_teacher(
    run: Callable[[np.ndarray], np.ndarray], settings: TeacherSettings, layout: str, sides: tuple, name: str
) -> Teacher:
    """sides: the fixed (height, width) of the input, None for a free side."""

    def teach(images: list[np.ndarray], *_: object) -> list[tuple[np.ndarray, dict]]:
        height, width = images[0].shape[:2]
        fitted = [_fit(image, sides, settings.teacher_multiple) for image in images]
        try:
            output = run(_to_tensor(np.stack(fitted), settings, layout))
        except Exception as error:  # the network may raise anything
            raise InputError(f"{name} failed on {width}x{height} pixels: {str(error).splitlines()[0]}") from error
        edits = _to_images(output, settings, layout)
        if sides != (None, None):
            edits = [cv2.resize(edit, (width, height), interpolation=cv2.INTER_AREA) for edit in edits]
        pairs = zip(edits, images, strict=True)
        return [(check_edit(edit[:height, :width], image, name), {}) for edit, image in pairs]

    return teach


def _fit(image: np.ndarray, sides: tuple, multiple: int) -> np.ndarray:
    """Resize to the fixed sides, or mirror the right and bottom border up to the multiple."""
    height, width = image.shape[:2]
    if sides != (None, None):
        return cv2.resize(image, (sides[1] or width, sides[0] or height), interpolation=cv2.INTER_AREA)
    below, right = -height % multiple, -width % multiple
    return cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_REFLECT_101) if below or right else image


def _to_tensor(images: np.ndarray, settings: TeacherSettings, layout: str) -> np.ndarray:
    """uint8 RGB (B, H, W, 3) -> float32 in the range, channel order and layout of the network."""
    black, white = settings.input_range
    tensor = images.astype(np.float32) / 255 * (white - black) + black
    tensor = tensor[..., ::-1] if settings.teacher_channels == "bgr" else tensor
    return np.ascontiguousarray(tensor.transpose(0, 3, 1, 2) if layout == "nchw" else tensor)


def _to_images(tensor: np.ndarray, settings: TeacherSettings, layout: str) -> list[np.ndarray]:
    """The output of the network -> uint8 RGB (H, W, 3) each; values outside its range are clipped."""
    black, white = settings.output_range or settings.input_range
    tensor = tensor.astype(np.float32).transpose(0, 2, 3, 1) if layout == "nchw" else tensor.astype(np.float32)
    tensor = tensor[..., ::-1] if settings.teacher_channels == "bgr" else tensor
    values = np.nan_to_num((tensor - black) / (white - black))
    return list((np.clip(values, 0, 1) * 255).round().astype(np.uint8))


def check_edit(edited: object, image: np.ndarray, name: str) -> np.ndarray:
    """The edited image, contiguous. Raises InputError unless it is uint8 and has the shape of `image`."""
    edited = np.asarray(edited)
    if edited.dtype != np.uint8 or edited.shape != image.shape:
        shapes = ["x".join(map(str, array.shape)) for array in (edited, image)]
        given = f"returned {edited.dtype} {shapes[0]} for an image of uint8 {shapes[1]}"
        raise InputError(f"{name} {given}: it must return uint8 RGB of the same size")
    return np.ascontiguousarray(edited)
