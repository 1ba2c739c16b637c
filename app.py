"""The editor in a browser: a picture, an instruction, a before/after slider, several seeds, two models side by side.

    python app.py                                         # the toy editor that `make demo` trains
    python app.py --model my-editor --model my-editor-4-steps
    python app.py --model timbrooks/instruct-pix2pix --server_name 0.0.0.0 --server_port 8080

Only this machine can open the page, unless --server_name or --share says otherwise. docs/app.md has the API.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import threading
import warnings
from pathlib import Path
from typing import Any

from utils.cli import FlagParser
from utils.editing.flags import EditorOptions
from utils.editing.jobs import Recommended
from utils.errors import InputError, exit_on_input_error
from utils.quiet import hide_progress_bars, quiet_libraries

REPOSITORY = Path(__file__).resolve().parent
TOY = REPOSITORY / "demo-output/editor"
TOY_SETTINGS = dict(steps=10, guidance_scale=2.0, image_guidance_scale=1.3)  # with which demo.py edits
EXAMPLES = [
    REPOSITORY / "assets/photos" / f"{name}.jpg"  # on which the toy editor was not trained
    for name in ("coffee", "courtyard_1", "courtyard_2", "dandelion", "palace_1", "raccoon", "rocket")
]
LIMITS = {
    "keep_models": (1, 100),
    "max_upload_mb": (0.01, 10_000),
    "max_megapixels": (0.001, 178),
    "timeout": (1, 86_400),
}
LIMITS |= {"max_waiting": (0, 30), "resolution": (8, 4096), "server_port": (1, 65_535)}


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument_group("models").add_argument
    add(
        "--model",
        action="append",
        help="an editor: a folder in diffusers' format, an id on the Hub, or one "
        ".safetensors file; may repeat, for the menu (default: demo-output/editor, the toy editor of `make demo`)",
    )
    add(
        "--keep_models",
        type=int,
        default=2,
        metavar="N",
        help="how many stay in memory (default 2; each is loaded when it is first used)",
    )
    add("--device", default="auto", help="cuda, cuda:1, mps or cpu (default: the best there is)")
    add("--dtype", choices=("fp32", "fp16", "bf16"), help="precision (default fp16 on cuda, else fp32)")
    add(
        "--resolution",
        type=int,
        metavar="PIXELS",
        help="longer side of an edit, about (default 512, for SDXL 1024, or what the model was made for if less)",
    )
    add = parser.add_argument_group("server").add_argument
    add(
        "--server_name",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on; 0.0.0.0 lets other machines in (default 127.0.0.1: this machine alone)",
    )
    add("--server_port", type=int, metavar="PORT", help="port to listen on (default: the first free one from 7860)")
    add("--share", action="store_true", help="a public address through Gradio's servers, open to whoever knows it")
    add = parser.add_argument_group("limits").add_argument
    add("--max_upload_mb", type=float, default=20, metavar="MB", help="largest file that is taken (default 20)")
    add("--max_megapixels", type=float, default=50, metavar="M", help="largest picture that is decoded (default 50)")
    add("--timeout", type=float, default=600, metavar="SECONDS", help="longest edit, from its turn on (default 600)")
    add("--max_waiting", type=int, default=20, metavar="N", help="edits that may wait while one runs (default 20)")
    return parser.parse_args(argv)


def check_flags(args: argparse.Namespace) -> None:
    """Raise one InputError with everything that can be told from the flags alone; fills in the toy editor."""
    problems = []
    if not args.model and not (TOY / "model_index.json").is_file():
        problems.append(
            f"there is no {TOY.relative_to(REPOSITORY)} yet: run `make demo` once (10 minutes), which trains the toy "
            "editor, or give --model with the folder, the file or the Hub id of an editor"
        )
    for model in args.model or []:
        if model.startswith(("/", ".", "~")) and not Path(model).exists():
            problems.append(f"--model {model} is not a folder or file that exists")
    for flag, (least, most) in LIMITS.items():
        value = getattr(args, flag)
        if value is not None and not least <= value <= most:  # not a number is out of every range
            problems.append(f"--{flag} {value}: must be from {least} to {most}")
    if problems:
        raise InputError.from_problems(problems)


def make_page(args: argparse.Namespace) -> tuple[Any, Any]:
    """The page, and the line of its visitors. No model is loaded yet."""
    from utils.editing.editor_setup import open_editor
    from utils.runtime import choose_device
    from utils.web.handlers import Runs
    from utils.web.model_cache import Shelf
    from utils.web.page import Page
    from utils.web.request_queue import Turns
    from utils.web.studio import Studio

    hide_progress_bars()
    choose_device(args.device, args.dtype)  # a mistake is told now, and not at the first edit
    default = Recommended() if args.model else Recommended(**TOY_SETTINGS)

    def load(model: str) -> Any:
        return open_editor(EditorOptions(model, device=args.device, dtype=args.dtype))

    shelf = Shelf(args.model or [str(TOY)], load, args.keep_models, default)
    turns = Turns(args.timeout, args.max_waiting)
    limits = dict(max_pixels=int(args.max_megapixels * 1e6), max_bytes=int(args.max_upload_mb * 2**20))
    studio = Studio(shelf, turns, resolution=args.resolution, **limits)
    return Page(Runs(studio, EXAMPLES), shelf.names).blocks, turns


def serve(args: argparse.Namespace) -> None:
    """Open the page, and keep it open until Ctrl-C or SIGTERM."""
    blocks, turns = make_page(args)
    from utils.web.page import APPEARANCE

    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    try:
        _, local, public = blocks.queue(default_concurrency_limit=None).launch(
            server_name=args.server_name,
            server_port=args.server_port,
            share=args.share,
            quiet=True,
            prevent_thread_lock=True,
            max_threads=40,
            max_file_size=int(args.max_upload_mb * 2**20),
            **APPEARANCE,
        )
    except OSError as error:
        where = f"--server_name {args.server_name} --server_port {args.server_port or '7860 to 7959'}"
        raise InputError(f"{where} cannot be listened on: {error}. Is the port taken? Choose another one") from error
    print(f"open {public or local} (Ctrl-C ends it)", flush=True)
    stopped.wait()
    turns.stop_all()
    blocks.close(verbose=False)


def run(args: argparse.Namespace) -> int:
    check_flags(args)
    quiet_libraries()
    warnings.filterwarnings("ignore", category=UserWarning, module="huggingface_hub")
    with tempfile.TemporaryDirectory(prefix="editor-") as folder:  # uploads and edits go when the server does
        # Before Gradio is imported, which reads them then; it would report its use to its makers.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder}
        tempfile.tempdir = folder
        serve(args)
    return 0


def main(argv: list[str] | None = None) -> int:
    with exit_on_input_error():
        return run(parse_flags(argv))


if __name__ == "__main__":
    sys.exit(main())
