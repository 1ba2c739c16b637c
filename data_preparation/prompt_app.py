"""Try a language model that invents edits, in a browser: a caption in, several (edit, output) candidates out.

    python data_preparation/prompt_app.py --base_url http://127.0.0.1:8000/v1 --model Qwen/Qwen2.5-7B-Instruct
    python data_preparation/prompt_app.py --model my-instruct-model

Asks as generate_captions.py does, by the same flags. Only this machine can open the page, unless --server_name says
otherwise; whoever opens it spends from your key.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_preparation.captions.flags import add_model_flags, model_problems, pick_sampling, pick_source  # noqa: E402
from utils.cli import FlagParser  # noqa: E402
from utils.errors import InputError, exit_on_input_error  # noqa: E402
from utils.quiet import quiet_libraries  # noqa: E402


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add_model_flags(parser)
    add = parser.add_argument_group("page").add_argument
    add(
        "--server_name",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on; 0.0.0.0 lets other machines in (default 127.0.0.1: this machine alone)",
    )
    add("--server_port", type=int, metavar="PORT", help="port to listen on (default: the first free one from 7860)")
    # A page must not wait for minutes before it says what is wrong.
    parser.set_defaults(retries=2, timeout=60.0)
    return parser.parse_args(argv)


def check_flags(args: argparse.Namespace) -> None:
    """Raise one InputError with everything that can be told from the flags alone."""
    if not args.base_url:
        args.retries = args.timeout = None  # a server's
    problems = model_problems(args)
    if args.server_port is not None and not 1 <= args.server_port <= 65_535:
        problems.append(f"--server_port {args.server_port}: must be from 1 to 65535")
    if problems:
        raise InputError.from_problems(problems)


def serve(args: argparse.Namespace) -> None:
    """Open the model and the page, and keep it open until Ctrl-C or SIGTERM."""
    from data_preparation.captions.moderation import open_moderator
    from data_preparation.captions.opening import open_backend
    from data_preparation.captions.page import APPEARANCE, Suggester, make_page

    sampling = pick_sampling(args)
    backend = open_backend(pick_source(args), sampling)
    suggester = Suggester(backend, sampling, open_moderator(args.moderation, getattr(backend, "client", None)))
    blocks = make_page(suggester, args.model, 4 if args.base_url else 1)
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    try:
        _, local, _ = blocks.queue().launch(
            server_name=args.server_name,
            server_port=args.server_port,
            quiet=True,
            prevent_thread_lock=True,
            **APPEARANCE,
        )
    except OSError as error:
        where = f"--server_name {args.server_name} --server_port {args.server_port or '7860 to 7959'}"
        raise InputError(f"{where} cannot be listened on: {error}. Is the port taken? Choose another one") from error
    print(f"open {local} (Ctrl-C ends it)", flush=True)
    stopped.wait()
    blocks.close(verbose=False)


def main(argv: list[str] | None = None) -> int:
    args = parse_flags(argv)
    with exit_on_input_error():
        check_flags(args)
        quiet_libraries()
        with tempfile.TemporaryDirectory(prefix="prompts-") as folder:
            # Before Gradio is imported, which reads them then; it would report its use to its makers.
            os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder}
            serve(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
