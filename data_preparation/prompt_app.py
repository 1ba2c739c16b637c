"""Try a language model that invents edits in the browser: enter a caption, get several candidates (edit, output).

    python data_preparation/prompt_app.py --base_url http://127.0.0.1:8000/v1 --model Qwen/Qwen2.5-7B-Instruct
    python data_preparation/prompt_app.py --model my-instruct-model

The flags of the model are those of generate_captions.py. The page is only reachable from this machine, unless
--server_name is given; everyone who opens it uses your API key.
"""

import argparse
import os
import signal
import sys
import tempfile
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_preparation import peer_flags  # noqa: E402
from data_preparation.captions.model_flags import (  # noqa: E402
    add_model_flags,
    choose_model,
    find_model_problems,
    use_server_as_original,
)
from utils.cli import FlagParser, pick  # noqa: E402
from utils.errors import InputError, exit_on_input_error  # noqa: E402
from utils.quiet import quiet_libraries  # noqa: E402
from utils.settings_file import add_config_flag  # noqa: E402


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = FlagParser(description=__doc__, formatter_class=raw, aliases=peer_flags.PROMPT_APP)
    add_model_flags(parser)
    add = parser.add_argument_group("page").add_argument
    name_help = "address to listen on; 0.0.0.0 admits other machines (default 127.0.0.1)"
    add("--server_name", default="127.0.0.1", metavar="ADDRESS", help=name_help)
    add("--server_port", type=int, metavar="PORT", help="port to listen on (default: the first free one from 7860)")
    parser.set_defaults(retries=2, timeout=60.0)  # a page must report an error within minutes
    add_config_flag(parser)
    args = parser.parse_args(argv)
    use_server_as_original(args, bool(parser.implied))
    return args


def check_flags(args: argparse.Namespace) -> None:
    """Raise one InputError with the problems of all flags."""
    if not args.base_url:
        args.retries = args.timeout = None  # the defaults are for a server
    problems = find_model_problems(args)
    if args.server_port is not None and not 1 <= args.server_port <= 65_535:
        problems.append(f"--server_port {args.server_port}: must be from 1 to 65535")
    if problems:
        raise InputError.from_problems(problems)


def serve(args: argparse.Namespace) -> None:
    """Open the model and the page, and wait for Ctrl-C or SIGTERM."""
    from data_preparation.captions.model_flags import open_moderator
    from data_preparation.captions.page import LAUNCH_OPTIONS, CandidateService, make_page
    from data_preparation.captions.prompts import SamplingOptions
    from data_preparation.captions.triple_generation import open_backend

    sampling = pick(args, SamplingOptions)
    backend = open_backend(choose_model(args), sampling)
    service = CandidateService(backend, sampling, open_moderator(args.moderation, backend))
    blocks = make_page(service, args.model, 4 if args.base_url else 1)
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    address = dict(server_name=args.server_name, server_port=args.server_port)
    try:
        _, url, _ = blocks.queue().launch(**address, quiet=True, prevent_thread_lock=True, **LAUNCH_OPTIONS)
    except OSError as error:
        flags = f"--server_name {args.server_name} --server_port {args.server_port or '7860 to 7959'}"
        raise InputError(f"{flags}: cannot listen ({error}). If the port is in use, choose another one") from error
    print(f"open {url} (stop with Ctrl-C)", flush=True)
    stopped.wait()
    blocks.close(verbose=False)


def main(argv: list[str] | None = None) -> int:
    args = parse_flags(argv)
    with exit_on_input_error():
        check_flags(args)
        quiet_libraries()
        with tempfile.TemporaryDirectory(prefix="prompts-") as folder:
            # Gradio reads these when it is imported; without the first it sends usage statistics.
            os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder}
            serve(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
