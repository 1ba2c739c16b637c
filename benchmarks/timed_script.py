"""Runs a training script in this process and measures its optimizer steps; benchmarks/training.py starts it.

    python benchmarks/timed_script.py RESULT.json WARMUP MEASURED SCRIPT FLAGS...

The script runs as its user runs it. A hook that PyTorch calls after every optimizer step reads the clock: from the end
of step WARMUP to the end of step WARMUP + MEASURED. Then, on the CPU, one step's operations are counted, and the
process ends without the script's last saving. With MEASURED 0 the script runs to its end. Diffusers' examples need
three transforms of torchvision; where that is not installed, they get simple ones.
"""

import json
import os
import runpy
import sys
import time
import types
from pathlib import Path

STARTED = time.perf_counter()


class StepClock:
    """Reads the clock after optimizer steps, and writes the result after the last one."""

    def __init__(self, result: Path, warmup: int, measured: int) -> None:
        self._result, self._warmup, self._last = result, warmup, warmup + measured
        self._steps, self._values, self._counter = 0, {}, None

    def __call__(self, optimizer: object, *_: object) -> None:
        import torch

        self._steps += 1
        is_gpu = torch.cuda.is_available()
        if self._steps == 1:
            self._values["first_step_s"] = time.perf_counter() - STARTED
        if self._steps == self._warmup:
            if is_gpu:
                torch.cuda.synchronize()
            self._start, self._cpu = time.perf_counter(), time.process_time()
        elif self._steps == self._last:
            # Without waiting for the GPU: how long the host needed to enqueue the steps, if it did not wait itself.
            self._values["host_s"] = (time.perf_counter() - self._start) / (self._last - self._warmup)
            if is_gpu:
                torch.cuda.synchronize()
                self._values["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
            self._values["step_s"] = (time.perf_counter() - self._start) / (self._last - self._warmup)
            self._values["cpu_s"] = (time.process_time() - self._cpu) / (self._last - self._warmup)
            if is_gpu:
                self._finish()
            self._counter = count_operations()
            self._counter.__enter__()
        elif self._counter:
            self._values |= {"operations": self._counter.operations, "syncs": self._counter.syncs}
            self._finish()

    def _finish(self) -> None:
        self._result.write_text(json.dumps(self._values))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def count_operations() -> object:
    """A mode that counts the operations that reach a kernel, and those of them that return a value to Python."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    syncs = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}

    class Counter(TorchDispatchMode):
        operations = syncs = 0

        def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):  # noqa: ANN001, ANN204
            self.operations += 1
            self.syncs += function in syncs
            return function(*args, **kwargs or {})

    return Counter()


def give_transforms() -> None:
    """What diffusers' examples take from torchvision, for tensors (..., H, W), where it is not installed."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        import datasets  # noqa: F401  these look for torchvision, and must not find the stub
        import diffusers  # noqa: F401
        import torch
        import transformers  # noqa: F401

        def crop(size: int, is_random: bool, images: torch.Tensor) -> torch.Tensor:
            starts = [
                int(torch.randint(side - size + 1, ())) if is_random else (side - size) // 2
                for side in images.shape[-2:]
            ]
            return images[..., starts[0] : starts[0] + size, starts[1] : starts[1] + size]

        def compose(functions: list) -> object:
            def run(images: torch.Tensor) -> torch.Tensor:
                for function in functions:
                    images = function(images)
                return images

            return run

        transforms = types.ModuleType("torchvision.transforms")
        transforms.Compose, transforms.Lambda = compose, lambda function: function
        transforms.CenterCrop = lambda size: lambda images: crop(size, False, images)
        transforms.RandomCrop = lambda size: lambda images: crop(size, True, images)
        transforms.RandomHorizontalFlip = lambda: lambda images: images.flip(-1) if torch.rand(()) < 0.5 else images
        package = types.ModuleType("torchvision")
        package.transforms, package.__version__ = transforms, "0"
        sys.modules |= {"torchvision": package, "torchvision.transforms": transforms}


def main() -> None:
    result, warmup, measured, script, *flags = sys.argv[1:]
    if os.environ.get("IS_PEER"):
        give_transforms()
    sys.argv = [script, *flags]
    sys.path[0] = str(Path(script).resolve().parent)
    if int(measured):
        from torch.optim.optimizer import register_optimizer_step_post_hook

        register_optimizer_step_post_hook(StepClock(Path(result), int(warmup), int(measured)))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
