"""Many clients of the page at once, and scripts that are killed: whether a request or a byte is lost.

    python benchmarks/soak.py                               # both; the toy editor of `make demo`
    python benchmarks/soak.py --only page --clients 20 --model my-editor
    python benchmarks/soak.py --only kills --kills 100      # of training, latent cache, generation and export

The second part (kills.py) needs no editor.

Starts app.py. Each client uploads a photograph and then edits it, cancels the edit, leaves while it waits or runs, or
leaves at once. A request is lost if its client stayed and got neither an edit nor a message. Afterwards one more client
must be served at once, which shows that clients that left hold nothing. Exit code 1 if a request was lost, or if a
killed run ended with other bytes than one that was not.
"""

import argparse
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.kills import run_kills  # noqa: E402
from tests.browser import Server  # noqa: E402
from utils.cli import FlagParser  # noqa: E402

BEHAVIOURS = ("edit", "cancel", "leave", "edit", "upload only")
PHOTOGRAPHS = sorted((REPOSITORY / "assets/photos").glob("*.jpg"))
POLL_SECONDS = 0.2


def main() -> int:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("page", "kills"), help="one of the two parts (default: both)")
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="kills in all four scripts (default 100)")
    parser.add_argument("--clients", type=int, default=200, metavar="N", help="clients in all (default 200)")
    parser.add_argument("--at_once", type=int, default=16, metavar="N", help="clients at the same time (default 16)")
    parser.add_argument("--steps", type=int, default=2, metavar="N", help="steps of an edit (default 2)")
    parser.add_argument("--seconds", type=float, default=600, help="longest time for all clients (default 600)")
    parser.add_argument("--model", default=str(REPOSITORY / "demo-output/editor"), help="the editor (default: the toy)")
    args = parser.parse_args()
    is_kept = True if args.only == "kills" else soak_page(args)
    is_equal = True if args.only == "page" else run_kills(-(-args.kills // 4))
    return int(not (is_kept and is_equal))


def soak_page(args: argparse.Namespace) -> bool:
    """Print what happened to the clients, and return whether no request was lost."""
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        server = Server(Path(folder, "log"), f"--model={args.model}", "--max_waiting=30")
        try:
            outcomes, peaks, seconds = visit(server, args)
        finally:
            server.end()
        errors = server.log.read_text().count("Traceback")
    lost = sum(count for (_, outcome), count in outcomes.items() if outcome == "lost")
    print("| client | outcome | number |\n|---|---|---|")
    for (behaviour, outcome), count in sorted(outcomes.items()):
        print(f"| {behaviour} | {outcome} | {count} |")
    first, peak, last = peaks
    print(f"\n{args.clients} clients in {seconds:.0f} s: {lost} requests lost, {errors} tracebacks in the server's log")
    print(f"memory of the server: {first:.2f} GB after the first edit, peak {peak:.2f} GB, {last:.2f} GB at the end")
    return not lost and not errors


def visit(server: Server, args: argparse.Namespace) -> tuple[Counter, tuple[float, float, float], float]:
    """((behaviour, outcome) -> number of clients, memory in GB first, at most and last, seconds)."""
    import psutil

    process, peak, done = psutil.Process(server.process.pid), [0.0], threading.Event()
    assert be_client(server.url, 0, args.steps, 600) == ("edit", "edited"), server.log.read_text()
    first = process.memory_info().rss / 1e9

    def watch() -> None:
        while not done.wait(POLL_SECONDS):
            peak[0] = max(peak[0], process.memory_info().rss / 1e9)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start, deadline = time.monotonic(), time.monotonic() + args.seconds
    with ThreadPoolExecutor(args.at_once) as threads:
        running = [
            threads.submit(lambda number=number: be_client(server.url, number, args.steps, deadline - time.monotonic()))
            for number in range(args.clients)
        ]
        outcomes = Counter(future.result() for future in running)
    outcomes[be_client(server.url, 0, args.steps, 60)] += 1  # the device is free
    done.set()
    watcher.join()
    return outcomes, (first, peak[0], process.memory_info().rss / 1e9), time.monotonic() - start


def be_client(url: str, number: int, steps: int, seconds: float) -> tuple[str, str]:
    """(behaviour, outcome) of one client, which has this many seconds."""
    import httpx

    behaviour, photograph = BEHAVIOURS[number % len(BEHAVIOURS)], PHOTOGRAPHS[number % len(PHOTOGRAPHS)]
    if seconds <= 0:
        return behaviour, "not started in time"
    api = f"{url}gradio_api"
    try:
        with httpx.Client(timeout=seconds) as client:
            files = {"files": (photograph.name, photograph.read_bytes())}
            path = client.post(f"{api}/upload", files=files).raise_for_status().json()[0]
            if behaviour == "upload only":
                return behaviour, "uploaded"
            image = {"path": path, "meta": {"_type": "gradio.FileData"}}
            # One that leaves would keep the device busy for long if it were not noticed.
            work = {"steps": steps, "images": 1} if behaviour == "edit" else {"steps": 200, "images": 16}
            request = {"image": image, "instruction": "make it snowy", "seed": number, **work}
            event = client.post(f"{api}/call/v2/edit", json=request).raise_for_status().json()["event_id"]
            return behaviour, _follow(client, api, event, behaviour)
    except httpx.HTTPError:
        return behaviour, "lost"


def _follow(client: Any, api: str, event: str, behaviour: str) -> str:
    """Read the events of a request until it ends, or as long as this client stays."""
    with client.stream("GET", f"{api}/call/edit/{event}") as answer:
        if behaviour == "leave":
            time.sleep(POLL_SECONDS)
            return "left"
        if behaviour == "cancel":
            time.sleep(POLL_SECONDS)
            body = {"session_hash": event, "fn_index": 0, "event_id": event}
            return "cancelled" if client.post(f"{api}/cancel", json=body).is_success else "lost"
        for line in answer.iter_lines():
            if line == "event: complete":
                return "edited"
            if line == "event: error":
                return "refused with a message"
    return "lost"


if __name__ == "__main__":
    sys.exit(main())
