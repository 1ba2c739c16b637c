"""Kills a script with SIGKILL at random moments, runs it again until it finishes, and returns its output folders.

    python -m tests.killing data_preparation.generate_dataset torch,diffusers 20 FOLDER --data_root -- --dataset_id ...

The process imports everything once and forks a child for each run. A run then starts in milliseconds instead of
seconds, so that many moments can be tried. FOLDER/uninterrupted is the output of a run that is not killed.
"""

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def kill_and_resume(
    module: str,
    argv: Sequence[str | Path],
    folder: Path,
    kills: int = 20,
    imports: Sequence[str] = (),
    output: str = "--data_root",
) -> tuple[Path, list[Path]]:
    """Run `module.main([*argv, output, ...])` in processes, `kills` of which are killed.

    imports: modules to import before the forks; output: the flag for the folder of the results.
    Returns (uninterrupted output, outputs of runs that were killed).
    """
    command = [sys.executable, "-m", "tests.killing", module, ",".join(imports), str(kills), str(folder), output, "--"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [*command, *map(str, argv)], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return folder / "uninterrupted", [Path(path) for path in json.loads(result.stdout.splitlines()[-1])]


def rows_of(data_root: Path) -> list[bytes]:
    """Name and bytes of each parquet file."""
    return [path.name.encode() + path.read_bytes() for path in sorted((data_root / "data").glob("*.parquet"))]


def _run(main: Callable, argv: list[str], seconds: float | None) -> int | None:
    """The exit code of a forked run, or None if it was killed after `seconds`."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            code = main(argv) or 0
        except SystemExit as error:
            code = error.code or 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.001)


def _main(module: str, imports: str, kills: str, folder: str, flag: str, _: str, *argv: str) -> None:
    for name in filter(None, imports.split(",")):
        importlib.import_module(name)
    main, root = importlib.import_module(module).main, Path(folder)
    sys.stdout.flush()
    start = time.monotonic()
    assert _run(main, [*argv, flag, str(root / "uninterrupted")], None) == 0
    duration = time.monotonic() - start
    rng, remaining, outputs = random.Random(0), int(kills), [root / "killed-0"]
    while True:
        limit = rng.uniform(0, 0.4 * duration) if remaining else None
        code = _run(main, [*argv, flag, str(outputs[-1])], limit)
        remaining -= code is None
        assert code in (0, None), code
        if code == 0 and not remaining:
            break
        if code == 0:  # it finished before the kill: start another output
            outputs.append(root / f"killed-{len(outputs)}")
    print(json.dumps([str(path) for path in outputs]))


if __name__ == "__main__":
    _main(*sys.argv[1:])
