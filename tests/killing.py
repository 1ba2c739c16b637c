"""kill -9 at random moments: a script is run again and again until it is through, and must end with the same rows.

    python -m tests.killing data_preparation.generate_dataset torch,diffusers 20 FOLDER -- --dataset_id photos ...

Run as a process of its own that imports everything once and forks a child for each run: a start costs milliseconds, so
that many moments are tried. FOLDER gets `whole`, of a run that was left alone, and one folder for each that was killed.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def survive(module: str, argv: list, folder: Path, kills: int = 20, imports: tuple[str, ...] = ()) -> dict:
    """Kill `module.main(argv + ["--data_root", ...])` so many times; returns {"kills", "sets": folders, "whole"}."""
    command = [sys.executable, "-m", "tests.killing", module, ",".join(imports), str(kills), str(folder), "--"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [*command, *map(str, argv)], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


def rows_of(data_root: Path) -> list[bytes]:
    """Every file of the rows, to the byte."""
    return [path.name.encode() + path.read_bytes() for path in sorted((data_root / "data").glob("*.parquet"))]


def _run(main: Callable, argv: list[str], seconds: float | None) -> int | None:
    """Exit code of a forked run, or None for one that was killed after so many seconds."""
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
    until = None if seconds is None else time.monotonic() + seconds
    while True:
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            return os.waitstatus_to_exitcode(status)
        if until is not None and time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.001)


def _main(module: str, imports: str, kills: str, folder: str, _: str, *argv: str) -> None:
    for name in filter(None, imports.split(",")):
        importlib.import_module(name)
    main, wanted, place = importlib.import_module(module).main, int(kills), Path(folder)
    sys.stdout.flush()
    started = time.monotonic()
    assert _run(main, [*argv, "--data_root", str(place / "whole")], None) == 0
    duration = time.monotonic() - started
    draw, done, sets, current = random.Random(0), 0, [], 0
    while done < wanted:
        root = place / f"killed-{current}"
        code = _run(main, [*argv, "--data_root", str(root)], draw.uniform(0, 0.4 * duration))
        if code is None:
            done += 1
        else:
            assert code == 0, code
            sets.append(str(root))
            current += 1
    root = place / f"killed-{current}"
    assert _run(main, [*argv, "--data_root", str(root)], None) == 0
    print(json.dumps({"kills": done, "sets": [*sets, str(root)], "whole": str(place / "whole"), "seconds": duration}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
