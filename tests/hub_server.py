"""A small Hugging Face Hub on localhost for the real client: repositories, commits, LFS, access rights, failures.

    with hub_server(folder) as hub:
        subprocess.run(command, env=hub.environment(cache, token="write-token"))
        hub.repos["models/user/editor"].read("README.md")

Uploads use Xet storage (tests/xet_storage.py), or plain HTTP with `HF_HUB_DISABLE_XET=1`, which `environment` sets by
default. Downloads use plain HTTP. To start it by hand: `python -m tests.hub_server --port 8000`.
"""

import argparse
import base64
import hashlib
import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from huggingface_hub import constants

from tests import xet_storage
from utils.licences import is_hub_licence

# token -> (account, role); the roles are those of the real Hub's whoami.
TOKENS = {"write-token": ("user", "write"), "read-token": ("user", "read"), "other-token": ("other", "write")}
ORGANIZATIONS = {"user": ["team"], "other": []}
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".ckpt", ".png", ".jpg", ".parquet", ".arrow", ".zip", ".tar")
SDKS = ("gradio", "docker", "static")
COLOURS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")
HARDWARE = ("cpu-basic", "t4-small")  # that the test accounts may use
XET_TOKEN = "storage-token"
DATE = "2026-01-01T00:00:00.000Z"


class Request(NamedTuple):
    """A request that the server answered; status 0 if it closed the connection instead."""

    method: str
    path: str
    token: str | None
    status: int


class Refused(Exception):
    """Ends a request with a status, and with the error code that selects the client's exception."""

    def __init__(self, status: int, message: str, code: str | None = None, body: dict | None = None):
        super().__init__(message)
        self.status, self.code, self.body = status, code, {"error": message, **(body or {})}


class File(NamedTuple):
    """A file of a commit; its bytes are in the server's folder, named by their SHA-256."""

    sha256: str
    size: int
    blob_id: str
    is_lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.blob_id

    def describe(self) -> dict:
        """The fields that all listings of the Hub have."""
        lfs = {"oid": self.sha256, "sha256": self.sha256, "size": self.size, "pointerSize": 130}
        return {"size": self.size, "oid": self.blob_id, **({"lfs": lfs} if self.is_lfs else {})}


@dataclass
class Repo:
    """A repository. commits: (sha, message, all files), oldest first."""

    kind: str
    id: str
    private: bool
    blobs: Path
    commits: list[tuple[str, str, dict[str, File]]] = field(default_factory=list)

    @property
    def files(self) -> dict[str, File]:
        return self.commits[-1][2]

    @property
    def messages(self) -> list[str]:
        return [message for _, message, _ in self.commits]

    def read(self, path: str) -> bytes:
        return (self.blobs / self.files[path].sha256).read_bytes()

    def commit(self, message: str, files: dict[str, File]) -> str:
        state = repr((len(self.commits), message, sorted(files.items())))
        sha = hashlib.sha1(state.encode()).hexdigest()
        self.commits.append((sha, message, files))
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, File]]:
        for sha, _, files in reversed(self.commits):
            if revision in ("main", "refs/heads/main", sha):
                return sha, files
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")


class Hub:
    """The server. `hook(method, path)` may raise `Refused`, or `ConnectionError` to close the connection."""

    def __init__(self, folder: Path, port: int = 0):
        self.blobs = Path(folder) / "blobs"
        self.blobs.mkdir(parents=True, exist_ok=True)
        self.xorbs: dict[str, list[bytes]] = {}
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.hook: Callable[[str, str], None] = lambda method, path: None
        self.lock = threading.RLock()
        self.port, self.server = port, None
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen, after a stop on the same port."""
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), type("BoundHandler", (Handler,), {"hub": self}))
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        """Refuse new connections, and close open ones at their next request."""
        if self.server is not None:
            server, self.server = self.server, None
            server.shutdown()
            server.server_close()

    def environment(self, cache: Path, token: str | None = None, xet: bool = False) -> dict[str, str]:
        """Environment variables of this process, with which the Hub's client uses this server and another cache."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        ours = {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"}
        ours |= {} if xet else {"HF_HUB_DISABLE_XET": "1"}
        return {**kept, **ours, **({"HF_TOKEN": token} if token else {})}

    def store(self, content: bytes, is_lfs: bool) -> File:
        sha256 = hashlib.sha256(content).hexdigest()
        (self.blobs / sha256).write_bytes(content)
        return self.stored(sha256, is_lfs)

    def stored(self, sha256: str, is_lfs: bool) -> File:
        path = self.blobs / sha256
        if not path.is_file():
            raise Refused(400, f"LFS object {sha256} was never uploaded")
        content = path.read_bytes()
        git = f"version https://git-lfs\noid sha256:{sha256}\nsize {len(content)}\n".encode() if is_lfs else content
        blob_id = hashlib.sha1(b"blob %d\0" % len(git) + git).hexdigest()
        return File(sha256, len(content), blob_id, is_lfs)

    def find(self, kind: str, repo_id: str, token: str | None, write: bool = False) -> Repo:
        """The repository. Raises `Refused` if the token may not read it, or with `write` may not write to it."""
        repo = self.repos.get(f"{kind}/{repo_id}")
        account, role = TOKENS.get(token, (None, None))
        namespaces = {account, *ORGANIZATIONS.get(account, [])}
        is_member = repo_id.split("/")[0] in namespaces
        if repo is None or (repo.private and not is_member):
            raise Refused(404, "Repository not found", "RepoNotFound")
        if write and not (is_member and role == "write"):
            raise Refused(403 if account else 401, "This token may not write to this repository")
        return repo


# --- endpoints: functions of (hub, call, parts of the path) that return the JSON of the answer -----------------------


class Call(NamedTuple):
    """The parts of a request that endpoints read."""

    token: str | None
    query: dict[str, list[str]]
    body: bytes

    @property
    def json(self) -> dict:
        return json.loads(self.body or b"{}")


def whoami(hub: Hub, call: Call) -> dict:
    if call.token not in TOKENS:
        raise Refused(401, "Invalid credentials in Authorization header")
    account, role = TOKENS[call.token]
    access = {"type": "access_token", "accessToken": {"displayName": "tests", "role": role}}
    orgs = [{"type": "org", "name": name, "roleInOrg": "write"} for name in ORGANIZATIONS[account]]
    return {"type": "user", "id": account, "name": account, "fullname": account, "orgs": orgs, "auth": access}


def create(hub: Hub, call: Call) -> dict:
    account = whoami(hub, call)["name"]
    namespace = call.json.get("organization") or account
    if TOKENS[call.token][1] != "write" or namespace not in (account, *ORGANIZATIONS[account]):
        message = f'You don\'t have the rights to create a model under the namespace "{namespace}"'
        raise Refused(403, message)
    kind, repo_id = call.json.get("type", "model") + "s", f"{namespace}/{call.json['name']}"
    if kind == "spaces" and call.json.get("sdk") not in SDKS:
        raise Refused(400, "Invalid sdk")
    url = f"{hub.url}/{'' if kind == 'models' else kind + '/'}{repo_id}"
    if f"{kind}/{repo_id}" in hub.repos:
        raise Refused(409, "You already created this repo", body={"url": url})
    private = call.json.get("visibility") == "private" or bool(call.json.get("private"))
    repo = hub.repos[f"{kind}/{repo_id}"] = Repo(kind, repo_id, private, hub.blobs)
    repo.commit("initial commit", {".gitattributes": hub.store(b"*.safetensors filter=lfs\n", is_lfs=False)})
    return {"url": url, "name": repo_id, "id": repo_id}


def validate_yaml(hub: Hub, call: Call) -> dict:
    """Check, as the Hub does, that the front matter is valid, licences are known and ids are not paths."""
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", call.json["content"], re.DOTALL)
    errors = []
    try:
        metadata = yaml.safe_load(match.group(1)) if match else {}
    except yaml.YAMLError as error:
        metadata, errors = {}, [{"message": str(error)}]
    licences = metadata.get("license") or []
    for value in [licences] if isinstance(licences, str) else licences:
        if not is_hub_licence(value):
            errors.append({"message": f'"license" must be one of the ids of the Hub, got "{value}"'})
    for key in ("base_model", "datasets"):
        values = metadata.get(key) or []
        for value in [values] if isinstance(values, str) else values:
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value):
                errors.append({"message": f'"{key}" with value "{value}" is not valid: it must be an id of the Hub'})
    if call.json.get("repoType") == "space":
        errors += [{"message": message} for message in space_errors(metadata)]
    if errors:
        raise Refused(400, "Invalid metadata", body={"errors": errors, "warnings": []})
    return {"errors": [], "warnings": [] if match else [{"message": "empty or missing yaml metadata"}]}


def space_errors(metadata: dict) -> list[str]:
    """What the Hub refuses in the front matter of a Space (its page spaces-config-reference)."""
    checks = {
        "title": lambda value: isinstance(value, str) and value,
        "emoji": lambda value: isinstance(value, str) and 0 < len(value) <= 2 and not value.isascii(),
        "colorFrom": COLOURS.__contains__,
        "colorTo": COLOURS.__contains__,
        "sdk": SDKS.__contains__,
        "sdk_version": lambda value: isinstance(value, str) and re.fullmatch(r"\d+\.\d+\.\d+", value),
        "python_version": lambda value: isinstance(value, str) and re.fullmatch(r"3\.\d+(\.\d+)?", value),
        "app_file": lambda value: isinstance(value, str) and value,
        "short_description": lambda value: isinstance(value, str) and len(value) <= 60,
    }
    return [f'"{key}" is not valid' for key, is_valid in checks.items() if not is_valid(metadata.get(key))]


def set_hardware(hub: Hub, call: Call, repo_id: str) -> dict:
    hub.find("spaces", repo_id, call.token, write=True)
    if call.json["flavor"] not in HARDWARE:
        raise Refused(402, "Add a payment method to your account")
    return {"stage": "BUILDING", "hardware": {"current": None, "requested": call.json["flavor"]}, "storage": None}


def auth_check(hub: Hub, call: Call, kind: str, repo_id: str, write: str | None) -> dict:
    hub.find(kind, repo_id, call.token, write=bool(write))
    return {}


def preupload(hub: Hub, call: Call, kind: str, repo_id: str, revision: str) -> dict:
    _, standing = hub.find(kind, repo_id, call.token, write=True).at(revision)

    def plan(file: dict) -> dict:
        is_binary = b"\0" in base64.b64decode(file["sample"])
        is_lfs = file["path"].endswith(LFS_SUFFIXES) or is_binary or file["size"] > 10_000_000
        old = standing.get(file["path"])
        mode = "lfs" if is_lfs else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": old.etag if old else None}

    return {"files": [plan(file) for file in call.json["files"]]}


def lfs_batch(hub: Hub, call: Call, prefix: str | None, repo_id: str) -> dict:
    hub.find(prefix or "models", repo_id, call.token, write=True)
    objects = []
    for wanted in call.json["objects"]:
        actions = {"upload": {"href": f"{hub.url}/lfs/{wanted['oid']}"}, "verify": {"href": f"{hub.url}/lfs-verify"}}
        is_here = (hub.blobs / wanted["oid"]).is_file()
        objects.append({**wanted, **({} if is_here else {"actions": actions})})
    return {"transfer": "basic", "objects": objects}


def lfs_put(hub: Hub, call: Call, oid: str) -> dict:
    if hashlib.sha256(call.body).hexdigest() != oid:
        raise Refused(400, "The content does not have this SHA-256")
    hub.store(call.body, is_lfs=True)
    return {}


def lfs_verify(hub: Hub, call: Call) -> dict:
    if hub.stored(call.json["oid"], is_lfs=True).size != call.json["size"]:
        raise Refused(400, "The size differs")
    return {}


def xet_token(hub: Hub, call: Call, kind: str, repo_id: str, action: str, revision: str) -> dict:
    hub.find(kind, repo_id, call.token, write=action == "write")
    return {"casUrl": f"{hub.url}/xet", "exp": int(time.time()) + 3600, "accessToken": XET_TOKEN}


def xet_xorb(hub: Hub, call: Call, name: str) -> dict:
    require_xet_token(call)
    is_new = name not in hub.xorbs
    hub.xorbs[name] = xet_storage.read_chunks(call.body)
    return {"was_inserted": is_new}


def xet_shard(hub: Hub, call: Call) -> dict:
    """Assemble the files that the shard describes; commits name them by their SHA-256."""
    require_xet_token(call)
    for segments in xet_storage.read_files(call.body):
        parts = [chunk for segment in segments for chunk in hub.xorbs[segment.xorb][segment.first : segment.end]]
        hub.store(b"".join(parts), is_lfs=True)
    return {"result": 1}


def require_xet_token(call: Call) -> None:
    if call.token != XET_TOKEN:
        raise Refused(401, "This is not a token of the Xet storage")


def commit(hub: Hub, call: Call, kind: str, repo_id: str, revision: str) -> dict:
    repo = hub.find(kind, repo_id, call.token, write=True)
    lines = [json.loads(line) for line in call.body.splitlines() if line.strip()]
    message = lines[0]["value"]["summary"] + lines[0]["value"].get("description", "")
    with hub.lock:
        files = dict(repo.at(revision)[1])
        for line in lines[1:]:
            key, value = line["key"], line["value"]
            if key == "file":
                files[value["path"]] = hub.store(base64.b64decode(value["content"]), is_lfs=False)
            elif key == "lfsFile":
                files[value["path"]] = hub.stored(value["oid"], is_lfs=True)
            elif key in ("deletedFile", "deletedFolder"):
                gone = value["path"].rstrip("/")
                files = {path: file for path, file in files.items() if path != gone and not path.startswith(gone + "/")}
        sha = repo.commit(message, files)
    return {"success": True, "commitOid": sha, "commitUrl": f"{hub.url}/{repo_id}/commit/{sha}"}


def info(hub: Hub, call: Call, kind: str, repo_id: str, revision: str | None) -> dict:
    repo = hub.find(kind, repo_id, call.token)
    sha, files = repo.at(revision or "main")
    siblings = [{"rfilename": path, "blobId": file.blob_id, **file.describe()} for path, file in sorted(files.items())]
    card = {}
    if "README.md" in files:
        match = re.match(r"---\s*\n(.*?)\n---", (hub.blobs / files["README.md"].sha256).read_text("utf-8"), re.DOTALL)
        card = yaml.safe_load(match.group(1)) if match else {}
    dates = {"lastModified": DATE, "createdAt": DATE}
    shown = {"id": repo_id, "sha": sha, "private": repo.private, "gated": False, "disabled": False}
    return {**shown, **dates, "tags": card.get("tags", []), "siblings": siblings, "cardData": card}


def tree(hub: Hub, call: Call, kind: str, repo_id: str, revision: str, folder: str | None) -> list[dict]:
    _, files = hub.find(kind, repo_id, call.token).at(revision)
    prefix = f"{folder.strip('/')}/" if folder else ""
    inside = {path: file for path, file in files.items() if path.startswith(prefix)}
    if prefix and not inside:
        raise Refused(404, f"{folder} does not exist on {revision}", "EntryNotFound")
    is_deep = call.query.get("recursive", ["false"])[0].lower() in ("true", "1")
    return describe_paths(inside, prefix, is_deep)


def describe_paths(files: dict[str, File], prefix: str, is_deep: bool) -> list[dict]:
    """Files and folders below `prefix`, only of the first level unless `is_deep`."""
    folders = {parent.as_posix() for path in files for parent in Path(path).parents if parent != Path()}
    last = {"id": "0" * 40, "title": "commit", "date": DATE}
    entries = [
        *({"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest()} for path in folders),
        *({"type": "file", "path": path, **file.describe()} for path, file in files.items()),
    ]
    below = [entry for entry in entries if entry["path"].startswith(prefix)]
    shown = [entry for entry in below if is_deep or "/" not in entry["path"][len(prefix) :]]
    return [{**entry, "lastCommit": last} for entry in sorted(shown, key=lambda entry: entry["path"])]


def paths_info(hub: Hub, call: Call, kind: str, repo_id: str, revision: str) -> list[dict]:
    _, files = hub.find(kind, repo_id, call.token).at(revision)
    wanted = parse_qs(call.body.decode()).get("paths") if not call.body.startswith(b"{") else call.json["paths"]
    everything = describe_paths(files, "", is_deep=True)
    return [entry for entry in everything if entry["path"] in {path.strip("/") for path in wanted or []}]


def refs(hub: Hub, call: Call, kind: str, repo_id: str) -> dict:
    sha, _ = hub.find(kind, repo_id, call.token).at("main")
    branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": sha}
    return {"branches": [branch], "tags": [], "converts": []}


REPO = r"(models|datasets|spaces)/((?:[\w.-]+/)?[\w.-]+?)"
ENDPOINTS = [
    ("GET", r"/api/whoami-v2", whoami),
    ("POST", r"/api/repos/create", create),
    ("POST", r"/api/validate-yaml", validate_yaml),
    ("POST", r"/api/spaces/((?:[\w.-]+/)?[\w.-]+?)/hardware", set_hardware),
    ("GET", rf"/api/{REPO}/auth-check(/write)?", auth_check),
    ("POST", rf"/api/{REPO}/preupload/(.+)", preupload),
    ("POST", rf"/api/{REPO}/commit/(.+)", commit),
    ("POST", rf"/api/{REPO}/paths-info/(.+)", paths_info),
    ("GET", rf"/api/{REPO}/tree/([^/]+)(/.*)?", tree),
    ("GET", rf"/api/{REPO}/refs", refs),
    ("GET", rf"/api/{REPO}(?:/revision/(.+))?", info),
    ("POST", r"/(?:(datasets|spaces)/)?([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", lfs_batch),
    ("PUT", r"/lfs/([0-9a-f]{64})", lfs_put),
    ("GET", rf"/api/{REPO}/xet-(write|read)-token/(.+)", xet_token),
    ("POST", r"/xet/v1/xorbs/default/([0-9a-f]{64})", xet_xorb),
    ("POST", r"/xet/v1/shards", xet_shard),
    ("POST", r"/lfs-verify", lfs_verify),
]
RESOLVE = re.compile(r"/(?:(datasets|spaces)/)?([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)")


class Handler(BaseHTTPRequestHandler):
    """HTTP/1.1 with persistent connections, as on the Hub."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def handle_any(self) -> None:
        authorization = self.headers.get("Authorization", "")
        token = re.sub(r"^bearer ", "", authorization, flags=re.IGNORECASE) or None
        split = urlsplit(self.path)
        call = Call(token, parse_qs(split.query), self.read_body())
        self.token = token
        try:
            if self.hub.server is None:
                raise ConnectionError
            self.hub.hook(self.command, split.path)
            self.answer(split.path, call)
        except Refused as refusal:
            code = {"X-Error-Code": refusal.code} if refusal.code else {}
            self.send(refusal.status, json.dumps(refusal.body).encode(), {**code, "X-Error-Message": str(refusal)})
        except ConnectionError:
            self.record(0)
            self.close_connection = True

    def record(self, status: int) -> None:
        self.hub.requests.append(Request(self.command, self.path, self.token, status))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def answer(self, path: str, call: Call) -> None:
        # Decoded after the match, because a revision such as refs%2Fheads%2Fmain is one part of the path.
        if match := RESOLVE.fullmatch(path):
            return self.send_file(call, *(part and unquote(part) for part in match.groups()))
        for method, pattern, endpoint in ENDPOINTS:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                parts = [part and unquote(part) for part in match.groups()]
                content = json.dumps(endpoint(self.hub, call, *parts)).encode()
                return self.send(200, content, {"Content-Type": "application/json"})
        raise Refused(404, f"{self.command} {path} is not an endpoint of this server")

    def send_file(self, call: Call, prefix: str | None, repo_id: str, revision: str, path: str) -> None:
        """Send a file or the requested range of it, with the headers that the client's cache needs."""
        sha, files = self.hub.find(prefix or "models", repo_id, call.token).at(revision)
        if path not in files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        file, status = files[path], 200
        headers = {"ETag": f'"{file.etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if file.is_lfs:
            headers |= {"X-Linked-Size": str(file.size), "X-Linked-Etag": f'"{file.sha256}"'}
        content = (self.hub.blobs / file.sha256).read_bytes()
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(match.group(1)), min(int(match.group(2) or file.size - 1), file.size - 1)
            status, content = 206, content[start : end + 1]
            headers["Content-Range"] = f"bytes {start}-{end}/{file.size}"
        self.send(status, content, {"Content-Type": "application/octet-stream", **headers})

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.record(status)  # before the answer, so that a client with an answer finds the record
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def log_message(self, *_: object) -> None:
        """Print nothing; tests read `hub.requests`."""


def connect_client(monkeypatch: object, url: str, folder: Path) -> None:
    """Make the Hub client of this process use the server at `url`, without any token."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no-login"))
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


@contextmanager
def hub_server(folder: Path, port: int = 0) -> Iterator[Hub]:
    """A running Hub with its files in `folder`; it stops at the end of the context."""
    hub = Hub(folder, port)
    try:
        yield hub
    finally:
        hub.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000)
    with tempfile.TemporaryDirectory() as scratch, hub_server(Path(scratch), parser.parse_args().port) as served:
        print(f"HF_ENDPOINT={served.url} HF_HUB_DISABLE_XET=1; tokens: {', '.join(TOKENS)}; Ctrl-C stops", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("stopped")
