"""A Ray cluster of two nodes on this machine that asks for a token, as `ray start` makes it."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from data_preparation import generate_captions, generate_pairs
from data_preparation.generation import shipping
from data_preparation.generation.generation_flags import choose_workers
from data_preparation.pairs.models import ModelChoice
from tests.chat_server import chat_server
from tests.killing import rows_of
from tests.runs import REPOSITORY
from tests.test_captions_server import CAPTIONS, flags_of
from utils.errors import InputError

pytest.importorskip("ray", reason="Ray is not installed")
FLAGS = ("--dataset_id=assets/photos", "--task=denoise", "--max_num_samples=12", "--resolution=64", "--num_workers=2")


def environment(home: Path) -> dict[str, str]:
    """Of a user with this home, which holds the token; without settings of Ray."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {"HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(home / "hf")}


def ray(home: Path, *arguments: str, within: tuple[str, ...] = ()) -> None:
    command = [*within, str(Path(sys.executable).with_name("ray")), *arguments]
    secured = environment(home) | {"RAY_AUTH_MODE": "token"}
    result = subprocess.run(command, env=secured, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout


HIDDEN = Path("/var/tmp/only-on-the-head")  # the other node sees an empty folder here
WITHOUT_HIDDEN = ("unshare", "-m", "sh", "-c", f'mount -t tmpfs none {HIDDEN} && exec "$@"', "sh")


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[Path, str]]:
    """(home with the token, address) of a head with one CPU and another node with one."""
    home = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # sockets are in it, whose paths must be short
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    quiet = ("--num-cpus=1", "--disable-usage-stats")
    try:
        ray(home, "get-auth-token", "--generate")
        ray(home, "start", "--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={home / 'r'}", *quiet)
        ray(home, "start", f"--address=127.0.0.1:{port}", *quiet, within=WITHOUT_HIDDEN if can_hide() else ())
        yield home, f"127.0.0.1:{port}"
    finally:
        for _ in range(2):  # those that the first ones start, too
            for process in psutil.process_iter(["cmdline"]):
                if any(str(home) in part or part.endswith(f":{port}") for part in process.info["cmdline"] or ()):
                    process.kill()
            time.sleep(0.2)
        shutil.rmtree(home, ignore_errors=True)
        shutil.rmtree(HIDDEN, ignore_errors=True)


def can_hide() -> bool:
    """Whether a process may have a view of the disk without a folder, as another machine has it."""
    HIDDEN.mkdir(exist_ok=True)
    return bool(shutil.which("unshare")) and subprocess.run([*WITHOUT_HIDDEN, "true"]).returncode == 0


def generate(home: Path, output: Path, *flags: str, folder: Path = REPOSITORY) -> subprocess.CompletedProcess:
    script = str(REPOSITORY / "data_preparation/generate_dataset.py")
    command = [sys.executable, script, *FLAGS, f"--data_root={output}", *flags]
    return subprocess.run(command, cwd=folder, env=environment(home), capture_output=True, text=True)


def test_two_nodes_give_the_same_bytes_as_this_machine(cluster, tmp_path):
    home, address = cluster
    result = generate(home, tmp_path / "ray", f"--ray={address}")
    assert result.returncode == 0, result.stderr
    assert generate(home, tmp_path / "local").returncode == 0
    assert rows_of(tmp_path / "ray") == rows_of(tmp_path / "local")


def test_relative_paths_are_found_by_workers(cluster, tmp_path):
    """Of a function and a task; the workers run in another folder."""
    (tmp_path / "mine.py").write_text("def invert(image):\n    return 255 - image\n")
    (tmp_path / "invert.txt").write_text("Invert it\nMake a negative of the picture\n")
    flags = ["--task=invert.txt", "--teacher=python:mine.py:invert", "--heldout_phrasings=1", f"--ray={cluster[1]}"]
    flags += [f"--dataset_id={REPOSITORY / 'assets/photos'}"]
    result = generate(cluster[0], tmp_path / "pairs", *flags, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert rows_of(tmp_path / "pairs")


def test_actors_share_a_rate_limit(cluster, tmp_path):
    """Both ask a server of language models; their rows are those of one process."""
    home, address = cluster
    captions = tmp_path / "captions.txt"
    captions.write_text(os.linesep.join(CAPTIONS))
    with chat_server() as server:
        for name, flags in (("one", ()), ("ray", (f"--ray={address}", "--num_workers=2"))):
            server.requests.clear()
            limited = flags_of(captions, server.url, tmp_path / name, "--requests_per_minute=600", *flags)
            command = [sys.executable, "data_preparation/generate_captions.py", *limited]
            result = subprocess.run(command, cwd=REPOSITORY, env=environment(home), capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
            times = sorted(request.time for request in server.requests)
            assert times[-1] - times[0] >= (len(times) - 2) * 60 / 600 * 0.9  # each starts with one request
    assert rows_of(tmp_path / "ray") == rows_of(tmp_path / "one")
    without_number = flags_of(captions, "http://127.0.0.1:9", tmp_path / "x", "--requests_per_minute=6", "--ray=local")
    with pytest.raises(InputError, match="give --num_workers, which share the limit evenly"):
        generate_captions.check_flags(generate_captions.parse_flags(without_number))


@pytest.mark.parametrize("flags, expected", [((), 1.0), (("--device=cpu",), 0.0), (("--gpus_per_worker=0.5",), 0.5)])
def test_gpus_of_an_actor(flags, expected):
    """Models on the CPU ask for none: without this, Ray would wait for a GPU for ever."""
    args = generate_pairs.parse_flags(["--prompts=x.jsonl", "--data_root=out", "--ray=local", *flags])
    assert choose_workers(args, needs_gpu=args.device != "cpu").gpus_per_worker == expected


@pytest.mark.skipif(not can_hide(), reason="no right to hide a folder from a process")
def test_files_that_a_node_lacks_are_sent(cluster, tmp_path):
    """A function, and the module beside it that it imports; what is there already is not sent."""
    home, address = cluster
    mine = ("import helper_of_mine", "def edit(image):", "    return helper_of_mine.invert(image)")
    (HIDDEN / "mine.py").write_text(os.linesep.join(mine))
    (tmp_path / "invert.txt").write_text(os.linesep.join(("Invert it", "Make a negative of the picture")))
    flags = [f"--task={tmp_path / 'invert.txt'}", f"--teacher=python:{HIDDEN / 'mine.py'}:edit"]
    flags += ["--heldout_phrasings=1", f"--dataset_id={REPOSITORY / 'assets/photos'}", "--max_num_samples=24"]
    place = Path(tempfile.gettempdir()) / f"instruct-pix2pix-{os.getuid()}"
    shutil.rmtree(place, ignore_errors=True)
    wait = (
        f"    while not glob.glob('{place}/*/mine.py') and time.monotonic() < {time.monotonic() + 120}: time.sleep(0.1)"
    )
    helper = ("import glob, time", "def invert(image):", wait, "    return 255 - image")  # the other node works, too
    (HIDDEN / "helper_of_mine.py").write_text(os.linesep.join(helper))
    result = generate(home, tmp_path / "ray", *flags, f"--ray={address}")
    assert result.returncode == 0, result.stderr
    assert generate(home, tmp_path / "local", *flags).returncode == 0
    assert rows_of(tmp_path / "ray") == rows_of(tmp_path / "local")
    sent = [path.name for path in place.glob("*/*")]
    assert sorted(sent) == ["helper_of_mine.py", "mine.py"]


def test_a_model_is_sent_with_all_its_files(tiny_base, tmp_path, monkeypatch):
    """In chunks, once for a node; the settings then name the copy, and everything else is unchanged."""
    monkeypatch.setattr(shipping, "CHUNK", 10_000)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    choice = ModelChoice(str(tiny_base), lora="owner/adapter", clip_model=str(tiny_base))
    (sent,) = shipping.find_files_to_send(choice)
    server, elsewhere = shipping.FileServer([sent]), sent._replace(root="/no/such/folder")
    calls = []

    def read(path: str, offset: int) -> bytes:
        calls.append(path)
        return server.read(path.replace("/no/such/folder", sent.root), offset)

    opened = partial(lambda value, rank: value, choice)
    for _ in range(2):
        received = shipping.receive(opened, [elsewhere], read).args[0]
        assert len(calls) == sum(-(-size // 10_000) for _, size, _ in sent.files)  # nothing more the second time
    assert received.lora == "owner/adapter" and received.model == received.clip_model != choice.model
    copied = Path(received.model)
    assert copied.name == tiny_base.name and copied.is_relative_to(tmp_path)
    names = {path.relative_to(tiny_base) for path in tiny_base.rglob("*") if path.is_file()}
    assert {path.relative_to(copied) for path in copied.rglob("*") if path.is_file()} == names
    assert all((copied / name).read_bytes() == (tiny_base / name).read_bytes() for name in names)
    assert shipping.receive(opened, [sent], read).args[0] == choice  # a node that has the files uses its own
    with pytest.raises(PermissionError):
        server.read("/etc/hostname", 0)


def test_local_does_not_join_a_running_cluster(cluster, tmp_path):
    """Which has only one CPU for each of its nodes, and no third one."""
    home, _ = cluster
    code = (
        "import sys, ray\n"
        "from data_preparation.generation.processes import ray_cluster\n"
        "with ray_cluster('local'): print(ray.get_runtime_context().gcs_address, len(ray.nodes()))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment(home), capture_output=True, text=True
    )
    address, count = result.stdout.split()
    assert count == "1" and address.rpartition(":")[2] != cluster[1].rpartition(":")[2]


def test_a_refused_token_is_named(cluster, tmp_path):
    result = generate(tmp_path, tmp_path / "pairs", f"--ray={cluster[1]}")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "the cluster refuses the token of this machine: copy ~/.ray/auth_token" in result.stderr


def test_a_worker_that_no_node_can_hold_is_an_error(cluster, tmp_path):
    result = generate(cluster[0], tmp_path / "pairs", f"--ray={cluster[1]}", "--gpus_per_worker=1")
    assert result.returncode == 2
    assert (
        "a worker needs 1 GPU, and no node has more than 0: give --device cpu or --gpus_per_worker 0" in result.stderr
    )
