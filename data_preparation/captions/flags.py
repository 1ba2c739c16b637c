"""The flags of everything that asks a language model. Nothing heavy is imported here."""

from __future__ import annotations

import argparse
import math

from data_preparation.captions.backend import LocalModel
from data_preparation.captions.moderation import ALLOWED, find_moderation_problem
from data_preparation.captions.opening import Source
from data_preparation.captions.prompts import Sampling, read_examples
from utils.cli import pick

LIMITS = {
    "temperature": (0, 5),
    "top_p": (1e-6, 1),
    "max_tokens": (8, 8192),
    "frequency_penalty": (-2, 2),
    "num_examples": (0, len(read_examples())),
    "batch_size": (1, 4096),
    "concurrency": (1, 1024),
    "timeout": (0.1, 3600),
    "retries": (0, 100),
    "retry_wait": (0, 60),
    "requests_per_minute": (0.01, 1e6),
    "price_in": (0, 1e6),
    "price_out": (0, 1e6),
}
OF_SERVER = ("api_key_env", "structure", "concurrency", "requests_per_minute", "timeout", "retries", "retry_wait")
OF_LOCAL = ("revision", "device", "dtype", "batch_size")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Which model, how it is asked, and what is refused."""
    add = parser.add_argument_group("language model").add_argument
    add(
        "--model",
        required=True,
        help="with --base_url, the model's name there; else a folder or Hub id of a causal "
        "language model in transformers' format, which runs here",
    )
    add(
        "--base_url",
        metavar="URL",
        help="a server with OpenAI's API (OpenAI, vLLM, llama.cpp, ...), such as http://127.0.0.1:8000/v1",
    )
    add(
        "--format",
        choices=("chat", "legacy"),
        default="chat",
        help="chat: an instruct model answers with JSON "
        "(default); legacy: a model fine-tuned on the original's prompts (prepare_for_finetuning.py) continues them",
    )
    add(
        "--num_examples",
        type=int,
        default=8,
        metavar="N",
        help=f"worked examples shown with each caption, drawn from {len(read_examples())} (default 8)",
    )
    add("--temperature", type=float, default=0.7, metavar="T", help="(default 0.7, as the original; 0: no chance)")
    add("--top_p", type=float, default=1.0, metavar="P", help="(default 1, as the original)")
    add("--max_tokens", type=int, default=256, metavar="N", help="of an answer (default 256, as the original)")
    add("--frequency_penalty", type=float, default=0.1, metavar="F", help="(default 0.1, as the original)")
    add("--moderation", metavar="WHAT", help=f"what refuses captions, edits and outputs: {ALLOWED}")
    add = parser.add_argument_group("server (with --base_url)").add_argument
    add(
        "--api_key_env",
        metavar="NAME",
        help="environment variable that holds the key (default OPENAI_API_KEY; a server without keys needs none)",
    )
    add(
        "--structure",
        choices=("auto", "json_schema", "json_object", "text"),
        help="how JSON is asked for (default auto: the strictest that the server takes)",
    )
    add("--concurrency", type=int, metavar="N", help="requests at once, of each worker (default 8)")
    add("--requests_per_minute", type=float, metavar="N", help="at most so many, of all workers (default: no limit)")
    add("--timeout", type=float, metavar="SECONDS", help="without a word of the server (default 120)")
    add("--retries", type=int, metavar="N", help="further tries of a request that fails (default 6)")
    add(
        "--retry_wait",
        type=float,
        metavar="SECONDS",
        help="before the first of them, then doubled, up to 60; a server's Retry-After goes before (default 1)",
    )
    add("--price_in", type=float, metavar="PRICE", help="of a million tokens sent, to show the cost")
    add("--price_out", type=float, metavar="PRICE", help="of a million tokens received")
    add = parser.add_argument_group("machine (without --base_url)").add_argument
    add("--revision", help="branch, tag or commit of a model on the Hub")
    add("--device", help="cuda, cuda:1, mps or cpu (default: the best there is)")
    add("--dtype", choices=("fp32", "fp16", "bf16"), help="precision (default bf16 on cuda, else fp32)")
    add("--batch_size", type=int, metavar="N", help="answers made at once (default 8)")


def model_problems(args: argparse.Namespace) -> list[str]:
    """What cannot be with these flags, one line each."""
    problems = []
    for name, (least, most) in LIMITS.items():
        value = getattr(args, name, None)
        if value is not None and not (math.isfinite(value) and least <= value <= most):
            problems.append(f"--{name} {value}: must be from {least} to {most:g}")
    others, place = (OF_LOCAL, "on this machine") if args.base_url else (OF_SERVER, "behind a server (--base_url)")
    problems += [f"--{name} is for a model {place}" for name in others if getattr(args, name) is not None]
    if args.base_url:
        problems += _server_problems(args)
    if args.moderation is not None:
        problem = find_moderation_problem(args.moderation, bool(args.base_url))
        problems += [problem] if problem else []
    return problems


def _server_problems(args: argparse.Namespace) -> list[str]:
    from data_preparation.captions.client import find_url_problem

    problem = find_url_problem(args.base_url)
    problems = [problem] if problem else []
    if args.format == "legacy" and args.structure not in (None, "auto", "text"):
        problems.append(f"--structure {args.structure}: --format legacy is plain text; leave it out")
    return problems


def pick_sampling(args: argparse.Namespace) -> Sampling:
    return pick(args, Sampling)


def pick_source(args: argparse.Namespace, num_workers: int = 1) -> Source:
    """num_workers: among which the requests of a minute are shared out."""
    given = {name: getattr(args, name) for name in (*OF_SERVER, *OF_LOCAL) if getattr(args, name) is not None}
    if not args.base_url:
        local = {name: given[name] for name in OF_LOCAL if name in given}
        return Source(args.model, local=LocalModel(args.model, **local))
    from data_preparation.captions.client import Server

    structure = given.pop("structure", "auto")
    if "retry_wait" in given:
        given["first_wait"] = given.pop("retry_wait")
    if "requests_per_minute" in given:
        given["requests_per_minute"] /= max(1, num_workers)
    return Source(args.model, server=Server(args.base_url, **given), structure=structure)
