"""Publishing to the Hugging Face Hub: the permission to push, checked before a long run, and the upload after it."""

import json
import logging
import os
import re
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from json import JSONDecodeError
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, HfApi, RepoCard, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects, validate_repo_id

from utils.errors import InputError, first_line

logger = logging.getLogger(__name__)

# Files of an output folder that do not belong to the published model. In these patterns, `*` also matches `/`.
NOT_PUBLISHED = [
    "checkpoint-*/*",
    ".*",
    "*/.*",
    "logs/*",
    "runs/*",
    "wandb/*",
    "trackio/*",
    "latent-cache/*",
    "prompt-cache/*",
    "*events.out.tfevents*",
    "*.tmp*",
    "*.log",
    "*__pycache__/*",
]
TEXT_SUFFIXES = {".json", ".jsonl", ".md", ".txt", ".yaml", ".yml", ".csv"}
TOKEN_PAGE = "https://huggingface.co/settings/tokens"
HIDDEN = "HIDDEN"


class PushFlags(NamedTuple):
    """The flags of the script that publishes, and what to do without the Hub; for messages."""

    push: str
    repo: str
    private: str
    alternative: str


MODEL_FLAGS = PushFlags(
    "--push_to_hub", "--hub_model_id", "--hub_private_repo", "drop --push_to_hub and run `hf upload` after training"
)
DATASET_FLAGS = PushFlags("--repo_id", "--repo_id", "--private", "use --no_push now and run this again later")
SPACE_FLAGS = PushFlags("--publish_space", "--publish_space", "--private", "publish it later")
PUSH_FLAGS = {"model": MODEL_FLAGS, "dataset": DATASET_FLAGS, "space": SPACE_FLAGS}

# `--hub_t…`: argparse accepts abbreviated flags.
_TOKEN_FLAG = re.compile(r"(--hub[_-]t\w*(?:=|\s+))(\"[^\"]*\"|'[^']*'|\S+)")
_TOKEN_KEY = re.compile(r"(\bhub_token[\"']?\s*[:=]\s*)(\"[^\"]*\"|'[^']*'|(?!null\b|None\b)[^\s,})]+)")
_TOKEN_SHAPE = re.compile(r"\b(?:hf_(?:oauth_|jwt_)?|api_org_)[A-Za-z0-9._-]{16,}")
_URL_LOGIN = re.compile(r"(?<=://)[^\s/@:]+:[^\s/@]+(?=@)")


def redact(value: str | Sequence[str], secret: str | None = None) -> str | list[str]:
    """Hide the value of `--hub_token`, `secret` and anything that looks like a token, in a text or a command line."""
    if not isinstance(value, str):
        flags = [None, *value]
        is_token = [bool(flag and re.fullmatch(r"--hub[_-]t\w*", flag)) for flag in flags]
        return [HIDDEN if hide else redact(part, secret) for part, hide in zip(value, is_token, strict=False)]

    def hide(match: re.Match) -> str:
        quote = match.group(2)[0] if match.group(2)[0] in "\"'" else ""
        return f"{match.group(1)}{quote}{HIDDEN}{quote}"

    text = _TOKEN_KEY.sub(hide, _TOKEN_FLAG.sub(hide, value))
    text = _URL_LOGIN.sub(HIDDEN, _TOKEN_SHAPE.sub(HIDDEN, text))
    return text.replace(secret, HIDDEN) if secret else text


def check_push_rights(
    repo_id: str | None,
    token: str | None,
    output_dir: str | Path,
    private: bool = False,
    create: bool = True,
    repo_type: str = "model",
) -> str:
    """Check that a model, a dataset or a Space can be pushed, and return the full id of its repository.

    Creates the repository if `create` is set (not for a dry run). Raises InputError that says which right is missing.
    """
    login, flags = token or get_token(), PUSH_FLAGS[repo_type]
    saved = "the token in HF_TOKEN" if os.environ.get("HF_TOKEN") else "the token saved by `hf auth login`"
    source = "the token given by --hub_token" if token else saved
    if not login:
        raise InputError(f"{flags.push} needs a login: run `hf auth login`, set HF_TOKEN, or pass --hub_token")
    api, account, full_id = HfApi(token=login), None, repo_id or ""
    try:
        account = api.whoami()
        full_id = _full_id(repo_id, output_dir, account["name"], flags)
        _try_to_write(api, full_id, account, private, create, repo_type)
    except HfHubHTTPError as error:
        raise _refusal(error, source, login, full_id, account, flags) from None
    except (HTTPError, OSError, JSONDecodeError) as error:
        if isinstance(error, OfflineModeIsEnabled):
            raise InputError(f"{flags.push} needs the network, but HF_HUB_OFFLINE is set: unset it") from None
        raise InputError(
            f"{flags.push}: the Hub ({api.endpoint}) cannot be reached ({failure_reason(error, login)}): "
            f"check the network, or {flags.alternative}"
        ) from None
    return full_id


def upload(
    output_dir: str | Path,
    repo_id: str,
    token: str | None = None,
    commit_message: str = "End of training",
    private: bool = False,
    waits: Sequence[float] = (5, 20, 60),
) -> str:
    """Upload the files that belong to the model as one commit, and return its URL.

    waits: seconds before each retry. Raises InputError with the command that uploads the model later.
    """
    login = token or get_token()
    api = HfApi(token=login)

    def send() -> None:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        # Not `upload_folder`: it may commit in batches, and an interruption would leave half a model on the Hub.
        operations = [_as_operation(Path(output_dir), path, login) for path in files_to_publish(output_dir)]
        api.create_commit(repo_id, operations, commit_message=redact(commit_message, login))

    advice = f"The model is complete in {output_dir}. Upload it later with:\n  "
    retry_upload(send, repo_id, login, waits, advice + upload_command(output_dir, repo_id, private))
    return f"{api.endpoint}/{repo_id}"


def validate_card(content: str, repo_type: str, name: str) -> None:
    """Ask the Hub whether it accepts the front matter of a card called `name`. Raises InputError with its answer."""
    try:
        RepoCard(content).validate(repo_type=repo_type)
    except ValueError as error:
        text = str(error)
        with suppress(ValueError, KeyError, TypeError):
            text = "; ".join(problem["message"] for problem in json.loads(text)["errors"])
        raise InputError(f"the Hub refuses the front matter of {name}: {text}") from None


def retry_upload(
    send: Callable[[], None], repo_id: str, login: str | None, waits: Sequence[float], advice: str
) -> None:
    """Call `send` until it succeeds. waits: seconds before each retry. Raises InputError that ends with `advice`."""
    for pause in (*waits, None):
        try:
            return send()
        except Exception as error:  # hf_xet raises its own types, and hours of work are at stake
            failure = error
            if pause is None or not is_temporary(error):
                break
            logger.warning("upload to %s: %s; retrying in %g s", repo_id, failure_reason(error, login), pause)
            time.sleep(pause)
    raise InputError(f"the upload to {repo_id} failed: {failure_reason(failure, login)}\n{advice}") from failure


def files_to_publish(output_dir: str | Path) -> list[str]:
    """The files that belong to the published model: sorted paths relative to `output_dir`."""
    root = Path(output_dir)
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    return list(filter_repo_objects(paths, ignore_patterns=NOT_PUBLISHED))


def upload_command(output_dir: str | Path, repo_id: str, private: bool = False) -> str:
    """The shell command that uploads the same files."""
    excluded = [part for pattern in NOT_PUBLISHED for part in ("--exclude", pattern)]
    return shlex.join(["hf", "upload", repo_id, str(output_dir), ".", *(["--private"] if private else []), *excluded])


def _full_id(repo_id: str | None, output_dir: str | Path, user: str, flags: PushFlags) -> str:
    """`repo_id`, by default the name of the output folder, with the user's namespace if it has none."""
    name = repo_id or re.sub(r"[^\w.-]+|\.{2,}|-{2,}", "-", Path(output_dir).resolve().name, flags=re.ASCII).strip("-.")
    full = name if "/" in name else f"{user}/{name}"
    try:
        validate_repo_id(full)
    except HFValidationError as error:
        raise InputError(f"{flags.repo}: {full!r} is not a valid repository id: {error}") from None
    return full


def _try_to_write(api: HfApi, repo_id: str, account: dict, private: bool, create: bool, repo_type: str) -> None:
    """Ask the Hub whether this token may write; raises the client's error if not."""
    if create:
        sdk = "gradio" if repo_type == "space" else None
        api.create_repo(repo_id, private=private or None, exist_ok=True, repo_type=repo_type, space_sdk=sdk)
    try:
        # `create_repo` succeeds for any existing repository that the token can read.
        api.auth_check(repo_id, write=True, repo_type=repo_type)
    except RepositoryNotFoundError:
        may_create = repo_id.split("/")[0] in _namespaces(account) and _role(account) != "read"
        if create or not may_create:
            raise
        return
    if private and not api.repo_info(repo_id, repo_type=repo_type).private:
        flags = PUSH_FLAGS[repo_type]
        raise InputError(
            f"{flags.private} was given, but {repo_id} exists and is public: choose another {flags.repo}, "
            f"make the repository private in its settings, or drop {flags.private}"
        )


def _namespaces(account: dict) -> list[str]:
    return [account["name"], *(organization["name"] for organization in account.get("orgs", []))]


def _role(account: dict) -> str:
    return account.get("auth", {}).get("accessToken", {}).get("role", "unknown")


def _refusal(
    error: HfHubHTTPError, source: str, login: str, repo_id: str, account: dict | None, flags: PushFlags
) -> InputError:
    """Explain a refusal of the Hub: whose token, which right is missing, what to do."""
    status = error.response.status_code
    if account is None and status in (401, 403):
        return InputError(f"the Hub does not accept {source}: it is wrong or expired; create a new one at {TOKEN_PAGE}")
    if account is None or status not in (401, 403, 404):
        return InputError(f"the Hub refused to check the permission to push ({failure_reason(error, login)})")
    user, role, namespace = account["name"], _role(account), repo_id.split("/")[0]
    if role == "read":
        return InputError(
            f"{source} (of {user}) may only read, so it cannot push to {repo_id}: "
            f"create one with the role 'write' at {TOKEN_PAGE}"
        )
    if namespace not in _namespaces(account):
        return InputError(
            f"{source} belongs to {user}, who may not write to {repo_id}: "
            f"choose a {flags.repo} under {' or '.join(_namespaces(account))}, or use a token of {namespace}"
        )
    advice = f"give it 'Write access to contents/settings of all repos under {namespace}' at {TOKEN_PAGE}"
    if role != "fineGrained":
        advice = f"ask an administrator of {namespace} for write access, or choose another {flags.repo}"
    return InputError(f"{source} (of {user}, role {role!r}) may not write to {repo_id}: {advice}")


def _as_operation(root: Path, path: str, login: str | None) -> CommitOperationAdd:
    """A file of the commit; tokens in text files are hidden."""
    if Path(path).suffix in TEXT_SUFFIXES:
        content = (root / path).read_bytes().decode("utf-8", errors="surrogateescape")
        clean = redact(content, login)
        if clean != content:
            return CommitOperationAdd(path, clean.encode("utf-8", errors="surrogateescape"))
    return CommitOperationAdd(path, root / path)


def is_temporary(error: Exception) -> bool:
    """Whether an error is the network's or the server's, so that a retry can succeed."""
    for cause in (error, error.__cause__):
        if isinstance(cause, HfHubHTTPError):
            return cause.response.status_code in (408, 429) or cause.response.status_code >= 500
    return not isinstance(error, (ValueError, OfflineModeIsEnabled, FileNotFoundError))


def failure_reason(error: Exception, login: str | None) -> str:
    """One line about an error and its cause, without tokens."""
    lines = [first_line(cause) for cause in (error, error.__cause__) if cause is not None]
    return redact(" ".join(dict.fromkeys(lines)), login)
