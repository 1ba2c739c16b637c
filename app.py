"""The editor in a browser: upload an image, edit it with several seeds, compare before and after or two models.

    python app.py                                         # the toy editor that `make demo` trains
    python app.py --model my-editor --model my-editor-4-steps
    python app.py --model timbrooks/instruct-pix2pix --server_name 0.0.0.0 --server_port 8080
    python app.py --model me/my-editor --publish_space my-editor-page      # as a Space on the Hub

Only this machine can open the page, unless --server_name or --share says otherwise. docs/app.md describes the API.
"""

import argparse
import logging
import os
import signal
import sys
import tempfile
import threading
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from utils.cli import FlagParser, pick
from utils.editing import settings
from utils.editing.flags import OFFLOADS, EditorOptions, find_missing_path, find_offload_problems, find_scale_problems
from utils.errors import InputError, exit_on_input_error
from utils.hub_names import is_hub_id
from utils.quiet import hide_progress_bars, quiet_libraries
from utils.web.logins import read_logins
from utils.web.space import SpaceOptions, publish_space

REPOSITORY = Path(__file__).resolve().parent
TOY = REPOSITORY / "demo-output/editor"
TOY_SETTINGS = dict(steps=10, guidance_scale=2.0, image_guidance_scale=1.3)  # as in demo.py
EXAMPLES = [
    REPOSITORY / "assets/photos" / f"{name}.jpg"  # the toy editor was not trained on these
    for name in ("coffee", "courtyard_1", "courtyard_2", "dandelion", "palace_1", "raccoon", "rocket")
]
# For --publish_space: flags of a server on this machine alone, those that are not settings of the page, and its own.
LOCAL_FLAGS = ("server_name", "server_port", "share", "root_path", "device", "auth")
MODEL_FLAGS = ("model", "lora", "vae", "single_file_config")
PUBLISH_FLAGS = ("publish_space", "private", "space_hardware", "hub_token")
LIMITS = {
    "keep_models": (1, 100),
    "batch_size": settings.LIMITS["batch_size"],
    "resolution": settings.LIMITS["resolution"],
    "server_port": (1, 65_535),
    "max_upload_mb": (0.01, 10_000),
    "max_stored_mb": (0.01, 10_000_000),
    "max_megapixels": (0.001, 178),
    "timeout": (1, 86_400),
    "max_waiting": (0, 30),
}


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument_group("models").add_argument
    editor = "an editor: a diffusers folder, a Hub id or one .safetensors file; repeat it for a menu (default: the toy)"
    add("--model", action="append", help=editor)
    adapter = "LoRAs or DoRAs for the --model, or what turns a text-to-image --model into an editor; one --model only"
    add("--lora", nargs="+", action="extend", metavar="ADAPTER", help=adapter)
    strength = "strength of each adapter (default 1)"
    add("--lora_scale", nargs="+", action="extend", type=float, metavar="S", help=strength)
    add("--vae", help="another autoencoder for all models: a file, a folder or a Hub id (default: their own)")
    config = (
        "for a --model in one file: a pipeline of its family for configuration and tokenizers (default: from the Hub)"
    )
    add("--single_file_config", metavar="PIPELINE", help=config)
    add("--revision", help="branch, tag or commit of a --model on the Hub; one --model only")
    add("--variant", help="variant of the weight files, such as fp16")
    add("--no_safety_checker", action="store_true", help="do not download, load or run safety checkers")
    add("--keep_models", type=int, default=2, metavar="N", help="models to keep in memory (default 2)")
    add("--device", default="auto", help="cuda, cuda:1, mps or cpu (default: the best available)")
    add("--dtype", choices=("fp32", "fp16", "bf16"), help="precision (default fp16 on cuda, else fp32)")
    offload = "keep the weights in main memory: one model on the GPU at a time, or one layer (sequential, slow)"
    add("--offload", choices=OFFLOADS, help=offload)
    batch = "seeds to edit at once, halved if out of memory (default 4, on the CPU 1)"
    add("--batch_size", type=int, metavar="N", help=batch)
    resolution = "approximate longer side of an edit (default: the model's own, such as 512, 768 or 1024)"
    add("--resolution", type=int, metavar="PIXELS", help=resolution)
    add = parser.add_argument_group("server").add_argument
    address = "address to listen on; 0.0.0.0 is open to other machines (default 127.0.0.1)"
    add("--server_name", default="127.0.0.1", metavar="ADDRESS", help=address)
    add("--server_port", type=int, metavar="PORT", help="port to listen on (default: the first free one from 7860)")
    add("--share", action="store_true", help="create a public address through Gradio's servers")
    login = "file with lines USER:PASSWORD (or set EDITOR_AUTH=USER:PASSWORD): only these may use the page and the API"
    add("--auth", metavar="FILE", help=login)
    path = "path under which another server passes requests on to this one, such as /editor"
    add("--root_path", metavar="PATH", help=path)
    add = parser.add_argument_group("publish").add_argument
    space = "publish this page with these models as a Space of this name on the Hugging Face Hub, instead of serving it"
    add("--publish_space", metavar="NAME", help=space)
    add("--private", action="store_true", help="create a private Space")
    add(
        "--space_hardware",
        metavar="NAME",
        help="hardware of the Space, such as t4-small (default: free, without a GPU)",
    )
    add("--hub_token", metavar="TOKEN", help="token with the right to write (default: HF_TOKEN, or `hf auth login`)")
    add = parser.add_argument_group("limits").add_argument
    add("--max_upload_mb", type=float, default=20, metavar="MB", help="largest upload (default 20)")
    stored = "uploads and edits of all visitors together; further uploads are refused (default 4000)"
    add("--max_stored_mb", type=float, default=4000, metavar="MB", help=stored)
    add("--max_megapixels", type=float, default=50, metavar="M", help="largest image to decode (default 50)")
    add("--timeout", type=float, default=600, metavar="SECONDS", help="longest time for one request (default 600)")
    add("--max_waiting", type=int, default=20, metavar="N", help="requests that may wait while one runs (default 20)")
    return parser.parse_args(argv)


def check_flags(args: argparse.Namespace) -> None:
    """Raise one InputError with everything that is wrong with the flags by themselves."""
    problems = []
    if not args.model and not (TOY / "model_index.json").is_file():
        problems.append(
            f"--model is missing, and there is no {TOY.relative_to(REPOSITORY)}: give the folder, the file or the Hub "
            "id of an editor, or run `make demo` (10 minutes) to train the toy editor"
        )
    paths = [("model", model) for model in args.model or []] + [("lora", lora) for lora in args.lora or []]
    for flag, path in [*paths, ("vae", args.vae), ("single_file_config", args.single_file_config)]:
        problems += find_missing_path(flag, path)
    for flag in ("lora", "revision", "single_file_config"):
        if getattr(args, flag) and len(args.model or [TOY]) > 1:
            count = len(args.model)
            problems.append(f"--{flag} is for one --model, and there are {count}: start the page for each of them")
    problems += _find_ineffective(args)
    problems += find_scale_problems(args.lora, args.lora_scale)
    problems += find_offload_problems(args.offload, args.device)
    problems += _find_space_problems(args)
    if args.root_path and not args.root_path.startswith(("/", "http://", "https://")):
        problems.append(f"--root_path {args.root_path}: must begin with / (or be an http(s) address)")
    for flag, (smallest, largest) in LIMITS.items():
        value = getattr(args, flag)
        if value is not None and not smallest <= value <= largest:  # also refuses NaN
            problems.append(f"--{flag} {value}: must be from {smallest} to {largest}")
    try:
        read_logins(args.auth)
    except InputError as error:
        problems.append(str(error))
    if problems:
        raise InputError.from_problems(problems)


def _find_ineffective(args: argparse.Namespace) -> list[str]:
    """A line for each flag that does nothing for this --model."""
    problems, model = [], (args.model or [str(TOY)])[0]
    if args.revision and not is_hub_id(model):
        problems.append(f"--revision is for a --model on the Hub, and {model} is on this machine: remove it")
    if args.single_file_config and (Path(model).is_dir() or is_hub_id(model)):
        problems.append(f"--single_file_config is for a --model in one file, and {model} is not one: remove it")
    return problems


def _find_space_problems(args: argparse.Namespace) -> list[str]:
    """A line for each flag that a Space cannot have, or that needs --publish_space."""
    if args.publish_space is None:
        given = [name for name in PUBLISH_FLAGS if getattr(args, name)]
        return [f"--{name} is for --publish_space NAME: give both or neither" for name in given]
    defaults = vars(parse_flags([]))
    given = [name for name in LOCAL_FLAGS if getattr(args, name) != defaults[name]]
    secret = ", and add the secret EDITOR_AUTH=USER:PASSWORD in the settings of the Space"
    return [
        f"--{name} is for a server on this machine, not for a Space: remove it{secret if name == 'auth' else ''}"
        for name in given
    ]


def space_options(args: argparse.Namespace) -> SpaceOptions:
    """What is published: the models, and every other flag that is not for this machine alone, as it is given here."""
    settings, defaults = [], vars(parse_flags([]))
    for name in sorted(vars(args).keys() - {*LOCAL_FLAGS, *MODEL_FLAGS, *PUBLISH_FLAGS}):
        value = getattr(args, name)
        if isinstance(value, list):
            settings += [f"--{name}", *map(str, value)]
        elif value != defaults[name]:
            settings.append(f"--{name}" if value is True else f"--{name}={value}")
    return SpaceOptions(
        args.publish_space,
        models=args.model or (),
        adapters=args.lora or (),
        vae=args.vae,
        single_file_config=args.single_file_config,
        settings=settings,
        toy=TOY,
        examples=EXAMPLES,
        private=args.private,
        hardware=args.space_hardware,
        token=args.hub_token,
    )


def make_page(args: argparse.Namespace) -> tuple[Any, Any]:
    """The page, and the queue of requests. No model is loaded yet."""
    from utils.editing.editor_setup import open_editor
    from utils.editing.service import EditService
    from utils.runtime import choose_device
    from utils.web.edit_requests import RequestRunner
    from utils.web.handlers import PageHandlers
    from utils.web.model_cache import ModelCache
    from utils.web.page import Page
    from utils.web.request_queue import RequestQueue

    hide_progress_bars()
    device, _ = choose_device(args.device, args.dtype)  # reports a mistake now, not at the first edit
    batch_size = args.batch_size or (1 if device == "cpu" else 4)
    defaults = settings.DEFAULT_SETTINGS | ({} if args.model else TOY_SETTINGS)

    def load(model: str) -> EditService:
        options = replace(pick(args, EditorOptions), model=model)
        return EditService(open_editor(options), batch_size, logging.getLogger(__name__).warning)

    models = ModelCache(args.model or [str(TOY)], load, args.keep_models, defaults, args.revision)
    requests = RequestQueue(args.timeout, args.max_waiting)
    limits = dict(max_pixels=int(args.max_megapixels * 1e6), max_bytes=int(args.max_upload_mb * 2**20))
    runner = RequestRunner(models, requests, resolution=args.resolution, **limits)
    return Page(PageHandlers(runner, EXAMPLES), models.names).blocks, requests


def serve(args: argparse.Namespace) -> None:
    """Open the page, and keep it open until Ctrl-C or SIGTERM."""
    blocks, requests = make_page(args)
    from starlette.middleware import Middleware

    from utils.web.page import APPEARANCE
    from utils.web.upload_limit import UploadLimit

    folder, stored_bytes = Path(tempfile.gettempdir()), int(args.max_stored_mb * 2**20)
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    try:
        # Without the queue Gradio would not notice that a client has left.
        _, local, public = blocks.queue(default_concurrency_limit=None, api_open=False).launch(
            server_name=args.server_name,
            server_port=args.server_port,
            share=args.share,
            auth=read_logins(args.auth) or None,
            root_path=args.root_path,
            quiet=True,
            prevent_thread_lock=True,
            max_threads=40,
            max_file_size=int(args.max_upload_mb * 2**20),
            app_kwargs={"middleware": [Middleware(UploadLimit, folder=folder, max_bytes=stored_bytes)]},
            **APPEARANCE,
        )
    except OSError as error:
        address = f"--server_name {args.server_name} --server_port {args.server_port or '7860 to 7959'}"
        raise InputError(f"{address} cannot be used: {error}. The port may be taken: choose another one") from error
    print(f"open {public or local} (Ctrl-C stops the server)", flush=True)
    stopped.wait()
    requests.stop_all()
    blocks.close(verbose=False)


def run(args: argparse.Namespace) -> int:
    check_flags(args)
    if args.publish_space:
        print(f"published as {publish_space(space_options(args))}")
        return 0
    quiet_libraries()
    warnings.filterwarnings("ignore", category=UserWarning, module="huggingface_hub")
    with tempfile.TemporaryDirectory(prefix="editor-") as folder:  # uploads and edits, deleted with the server
        # Set before Gradio and Pillow are imported: no telemetry, files in this folder, and blocks of a size whose
        # memory the system gets back at once (with Pillow's 16 MB, eight large uploads in turn kept 1.2 GB).
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder, "PILLOW_BLOCK_SIZE": "64m"}
        tempfile.tempdir = folder
        serve(args)
    return 0


def main(argv: list[str] | None = None) -> int:
    with exit_on_input_error():
        return run(parse_flags(argv))


if __name__ == "__main__":
    sys.exit(main())
