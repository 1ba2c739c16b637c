"""The flags of the language model, its sampling and the moderation. Light imports only, so that --help is fast."""

import argparse
import hashlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from data_preparation.captions.backends import Backend, LocalModelOptions, ModelOptions, ServerOptions
from data_preparation.captions.prompts import comparable_text, read_examples
from data_preparation.generation.user_functions import call_function, find_function_problem, load_function
from data_preparation.peer_flags import OPENAI_URL
from utils.errors import InputError

SAMPLING_LIMITS = {"temperature": (0, 5), "top_p": (1e-6, 1), "max_tokens": (8, 8192), "frequency_penalty": (-2, 2)}
SIZE_LIMITS = {"num_examples": (0, len(read_examples())), "batch_size": (1, 4096)}
SERVER_LIMITS = {"timeout": (0.1, 3600), "retries": (0, 100), "retry_wait": (0, 60), "concurrency": (1, 1024)}
RATE_LIMITS = {"requests_per_minute": (0.01, 1e6), "price_in": (0, 1e6), "price_out": (0, 1e6)}
LIMITS = SAMPLING_LIMITS | SIZE_LIMITS | SERVER_LIMITS | RATE_LIMITS
SERVER_FLAGS = ("api_key_env", "structure", "concurrency", "requests_per_minute", "timeout", "retries", "retry_wait")
LOCAL_FLAGS = ("revision", "device", "dtype", "batch_size")
MODERATIONS = "blocklist:FILE (one word or phrase per line), server (/v1/moderations), or python:FILE:FUNCTION"
URL_EXAMPLE = "such as http://127.0.0.1:8000/v1"

Moderator = Callable[[Sequence[str]], list[bool]]  # texts -> whether each is refused


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flag groups "language model", "server" and "local model"."""
    add = parser.add_argument_group("language model").add_argument
    add("--model", required=True, help="folder or Hub id of a causal language model; or its name at --base_url")
    add("--base_url", metavar="URL", help=f"server with OpenAI's API (OpenAI, vLLM, llama.cpp), {URL_EXAMPLE}")
    format_help = "chat: instruct model, JSON answers; legacy: model fine-tuned on the original's format (default chat)"
    add("--format", choices=("chat", "legacy"), default="chat", help=format_help)
    examples_help = f"worked examples in each prompt, drawn from {len(read_examples())} (default 8)"
    add("--num_examples", type=int, default=8, metavar="N", help=examples_help)
    add("--temperature", type=float, default=0.7, metavar="T", help="0: greedy (default 0.7, as the original)")
    add("--top_p", type=float, default=1.0, metavar="P", help="nucleus sampling (default 1, as the original)")
    add("--max_tokens", type=int, default=256, metavar="N", help="limit of an answer (default 256, as the original)")
    add("--frequency_penalty", type=float, default=0.1, metavar="F", help="(default 0.1, as the original)")
    add("--moderation", metavar="METHOD", help=f"refuses captions, edits and outputs: {MODERATIONS}")
    add = parser.add_argument_group("server (with --base_url)").add_argument
    add("--api_key_env", metavar="NAME", help="environment variable with the key, if any (default OPENAI_API_KEY)")
    structure_help = "how JSON is requested (default auto: the strictest that the server supports)"
    add("--structure", choices=("auto", "json_schema", "json_object", "text"), help=structure_help)
    add("--concurrency", type=int, metavar="N", help="simultaneous requests of each worker (default 8)")
    add("--requests_per_minute", type=float, metavar="N", help="limit for all workers together (default: none)")
    add("--timeout", type=float, metavar="SECONDS", help="longest wait for data from the server (default 120)")
    add("--retries", type=int, metavar="N", help="further attempts of a failed request (default 6)")
    wait_help = "wait before the first retry, then doubled up to 60 s; Retry-After takes precedence (default 1)"
    add("--retry_wait", type=float, metavar="SECONDS", help=wait_help)
    add("--openai_api_key", metavar="KEY", help=argparse.SUPPRESS)  # of the original; other users can see it
    add("--price_in", type=float, metavar="PRICE", help="price of a million input tokens, to print the cost")
    add("--price_out", type=float, metavar="PRICE", help="price of a million output tokens")
    add = parser.add_argument_group("local model (without --base_url)").add_argument
    add("--revision", help="branch, tag or commit of a model on the Hub")
    add("--device", help="cuda, cuda:1, mps or cpu (default: the best available)")
    add("--dtype", choices=("fp32", "fp16", "bf16"), help="precision (default bf16 on cuda, otherwise fp32)")
    add("--batch_size", type=int, metavar="N", help="answers generated at once (default 8)")


def find_model_problems(args: argparse.Namespace) -> list[str]:
    """One line for each invalid flag."""
    problems = []
    for name, (lowest, highest) in LIMITS.items():
        value = getattr(args, name, None)
        if value is not None and not (math.isfinite(value) and lowest <= value <= highest):
            problems.append(f"--{name} {value}: must be from {lowest} to {highest:g}")
    others, requirement = (LOCAL_FLAGS, "without") if args.base_url else (SERVER_FLAGS, "with")
    problems += [f"--{name} works only {requirement} --base_url" for name in others if getattr(args, name) is not None]
    if args.base_url:
        problems.append(find_url_problem(args.base_url))
        if args.format == "legacy" and args.structure not in (None, "auto", "text"):
            problems.append(f"--structure {args.structure}: --format legacy is plain text; drop the flag")
    if args.moderation is not None:
        problems.append(find_moderation_problem(args.moderation, bool(args.base_url)))
    return [problem for problem in problems if problem]


def use_server_as_original(args: argparse.Namespace, is_original_command: bool) -> None:
    """Use the key of --openai_api_key, and for a command of the original its moderation by OpenAI."""
    if key := args.__dict__.pop("openai_api_key"):
        name = args.api_key_env or "OPENAI_API_KEY"
        print(f"warning: other users can see a key on the command line; put it into {name} instead", file=sys.stderr)
        os.environ[name] = key
    if is_original_command and args.base_url == OPENAI_URL and args.moderation is None:
        args.moderation = "server"


def find_url_problem(base_url: str) -> str | None:
    """Why an address cannot be used, or None. The message contains no password."""
    try:
        parts = urlsplit(base_url)
        is_http = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        return f"--base_url must be an http(s) address, {URL_EXAMPLE}"
    if parts.username or parts.password or parts.query:
        return "--base_url contains a login or a query: put the key into the environment variable of --api_key_env"
    return None if is_http else f"--base_url {base_url}: must be an http(s) address, {URL_EXAMPLE}"


def choose_model(args: argparse.Namespace, num_workers: int = 1) -> ModelOptions:
    """The model of the flags. num_workers: workers that share --requests_per_minute."""
    names = SERVER_FLAGS if args.base_url else LOCAL_FLAGS
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if not args.base_url:
        return LocalModelOptions(args.model, **given)
    if "requests_per_minute" in given:
        given["requests_per_minute"] /= max(1, num_workers)
    return ServerOptions(args.base_url, args.model, **given)


def find_moderation_problem(method: str, has_server: bool) -> str | None:
    """Why --moderation cannot be used, or None. Nothing is loaded."""
    kind, _, file = method.partition(":")
    if method == "server":
        return None if has_server else "--moderation server works only with --base_url"
    if kind == "python":
        problem = find_function_problem(method)
        return problem and f"--moderation {problem}"
    if kind != "blocklist" or not file:
        return f"--moderation {method}: must be {MODERATIONS}"
    return None if Path(file).is_file() else f"--moderation {method}: the file {file} does not exist"


def digest_moderation(method: str | None) -> str | None:
    """`method` with a digest in place of the file, because a different list or function gives different rows."""
    if method is None or method == "server":
        return method
    kind, _, rest = method.partition(":")
    file, _, function = rest.rpartition(":") if kind == "python" else (rest, "", "")
    digest = hashlib.blake2b(Path(file).read_bytes(), digest_size=8).hexdigest()
    return ":".join(part for part in (kind, digest, function) if part)


def open_moderator(method: str | None, backend: Backend) -> Moderator:
    """The function of --moderation; without the flag it refuses nothing. Raises InputError."""
    if method is None:
        return lambda texts: [False] * len(texts)
    if method == "server":
        return backend.moderate
    if method.startswith("blocklist:"):
        return _open_blocklist(Path(method.removeprefix("blocklist:")))
    function = load_function("--moderation", method)
    return lambda texts: [bool(call_function("--moderation", method, function, text)) for text in texts]


def _open_blocklist(path: Path) -> Moderator:
    """Refuses whole words and phrases, ignoring case and punctuation. Lines that start with # are comments."""
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    blocked = {comparable_text(line) for line in lines if not line.lstrip().startswith("#")} - {""}
    if not blocked:
        raise InputError(f"--moderation blocklist:{path}: the file contains no words")
    longest = max(len(phrase.split()) for phrase in blocked)

    def is_refused(text: str) -> bool:
        words = comparable_text(text).split()
        spans = ((start, length) for start in range(len(words)) for length in range(1, longest + 1))
        return any(" ".join(words[start : start + length]) in blocked for start, length in spans)

    return lambda texts: [is_refused(text) for text in texts]
