"""What compare_models.py shows: index.html, contact sheets, and the page of votes."""

import itertools
import json
from pathlib import Path

from PIL import Image

from evaluation.judge import Judge
from evaluation.samples import Sample
from evaluation.tables import TableRow
from evaluation.vote_server import make_vote_server
from evaluation.votes import Ballot
from utils.atomic_files import write_atomically
from utils.contact_sheets import draw_sheets

TEMPLATE = Path(__file__).with_name("comparison.html")
PLACE = "/*DATA*/null/*END*/"


def save_inputs(samples: list[Sample], folder: Path) -> dict[int, Path]:
    """The originals, and the targets beside them, as files; returns the path of each original by its number."""
    paths = {}
    for sample in samples:
        paths[sample.number] = folder / "inputs" / f"{sample.name}.png"
        paths[sample.number].parent.mkdir(parents=True, exist_ok=True)
        if not paths[sample.number].exists():
            sample.original.save(paths[sample.number])
        if sample.edited is not None and not (target := _target_of(paths[sample.number])).exists():
            sample.edited.save(target)
    return paths


def _target_of(original: Path) -> Path:
    return original.with_name(f"{original.stem}-target.png")


def write_comparison(
    samples: list[Sample], inputs: dict[int, Path], paths: dict[str, list[Path]], rows: list[TableRow], folder: Path
) -> None:
    """index.html, sheet-N.png and results.json. paths: the edits of each editor; rows: their scores, and more."""
    names = list(dict.fromkeys(name for row in rows for name in row.scores if name != "cmmd"))
    scores = {row.name: {one["row"]: one for one in row.samples} for row in rows}
    shown = [
        {
            "number": sample.number,
            "instruction": sample.instruction,
            "original": _link(inputs[sample.number], folder),
            "target": _link(_target_of(inputs[sample.number]), folder) if sample.edited else None,
            "edits": {
                label: {"path": _link(files[index], folder), "scores": scores[label][sample.number]}
                for label, files in paths.items()
            },
        }
        for index, sample in enumerate(samples)
    ]
    means = [{"name": row.name, "scores": row.scores} for row in rows]
    data = {"models": list(paths), "scores": names, "means": means, "rows": shown}
    # "</script>" in an instruction would end the script
    page = TEMPLATE.read_text("utf-8").replace(PLACE, json.dumps(data).replace("<", "\\u003c"))
    write_atomically(folder / "index.html", page.encode())
    write_atomically(folder / "results.json", (json.dumps({"rows": means, "samples": shown}, indent=1) + "\n").encode())
    images = [
        [sample.original, *(Image.open(files[index]).convert("RGB") for files in paths.values())]
        for index, sample in enumerate(samples)
    ]
    labels = [[sample.instruction, *paths] for sample in samples]
    for number, sheet in enumerate(draw_sheets(images, labels), 1):
        sheet.save(folder / f"sheet-{number}.png")


def _link(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def serve_votes(
    samples: list[Sample], inputs: dict[int, Path], paths: dict[str, list[Path]], folder: Path, port: int
) -> None:
    """Serve the page of votes until Ctrl-C, then print the ratings. Raises InputError for a port that is taken."""
    images: dict = {(None, number): path for number, path in inputs.items()}
    for label, files in paths.items():
        images |= {(label, sample.number): path for sample, path in zip(samples, files, strict=True)}
    ballot = Ballot([sample.number for sample in samples], list(paths), folder)
    server = make_vote_server(ballot, images, {sample.number: sample.instruction for sample in samples}, port)
    print(f"vote at http://127.0.0.1:{server.server_port} (Ctrl-C ends)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
    print_ratings(ballot)


def print_ratings(ballot: Ballot) -> None:
    """One line for each editor, best first."""
    for rating in ballot.ratings():
        interval = f"{rating.low:.0f} to {rating.high:.0f}"
        print(f"{rating.name}: {rating.rating:.0f} ({interval}), {rating.num_votes} votes", flush=True)


def judge_pairs(judge: Judge, samples: list[Sample], paths: dict[str, list[Path]], folder: Path) -> None:
    """Let the judge, after it has checked itself, vote on every pair of edits; its votes are beside those of people.

    Raises InputError.
    """
    print(judge.check_itself(), flush=True)
    ballot = Ballot([sample.number for sample in samples], list(paths), folder)
    known = {(vote.first, vote.second, vote.sample) for vote in ballot.votes if vote.voter != "person"}
    for first, second in itertools.combinations(paths, 2):
        own = [(i, sample) for i, sample in enumerate(samples) if (first, second, sample.number) not in known]
        edits = [[paths[name][i] for i, _ in own] for name in (first, second)]
        for vote in judge.compare([sample for _, sample in own], (first, second), *edits):
            ballot.add(vote)
    print_ratings(ballot)
