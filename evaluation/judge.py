"""A vision-language model as a judge of edits, behind any server with OpenAI's API.

Pointwise, as VIEScore and GEdit-Bench: SC is the lower of two marks for following the instruction and for not changing
more than asked, PQ the lower of two for naturalness and absence of artefacts, each from 0 to 10; O is the square root
of SC times PQ. Pairwise: each pair is judged in both orders; a judge that chooses another edit when the order changes
gives a tie.
"""

import base64
import hashlib
import io
import json
import math
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from data_preparation.captions.backends import ServerOptions
from data_preparation.captions.server import RequestRefused, ServerClient
from data_preparation.photographs import centre_square, list_photographs, read_photograph
from data_preparation.toy_edits import EDITS
from evaluation.ratings import Vote
from evaluation.samples import Edit, Sample, read_edit
from utils.errors import InputError
from utils.json_lines import append_json_line, parse_json_object

JUDGEMENTS = "judgements.jsonl"
PHOTOS = Path(__file__).resolve().parents[1] / "assets/photos"
CHECKED = {"grayscale": "make it black and white", "negative": "invert the colours", "sepia": "make it sepia"}
CHECK_SIDE, MAX_SIDE, MAX_TOKENS = 256, 1024, 400
MARKS = ("success", "overediting", "naturalness", "artefacts")
POINTWISE = """You see two images: the input, then an edited version of it. Instruction of the edit: {instruction}
Give four marks from 0 (worst) to 10 (best).
success: how well the edited image shows what the instruction asks for; 0 if it is the unchanged input.
overediting: 10 if nothing changed that the instruction does not ask for, 0 if it is another picture.
naturalness: whether the edited image looks like one picture, in its light, proportions and perspective.
artefacts: 10 without blur, noise, seams or distorted parts.
Answer with one JSON object and nothing else: {{"success": N, "overediting": N, "naturalness": N, "artefacts": N}}"""
PAIRWISE = """You see three images: the input, then edit A, then edit B. Instruction of both edits: {instruction}
Which edit is better? It should do what the instruction asks for, leave the rest as it is, and look natural.
Answer with one JSON object and nothing else: {{"better": "A"}} or {{"better": "B"}}"""


@dataclass(frozen=True)
class JudgeOptions:
    """The fields are flags. judge: the address of the server."""

    judge: str
    judge_model: str
    judge_key_env: str = "OPENAI_API_KEY"
    judge_concurrency: int = 4
    judge_retries: int = 4


class Judge:
    """Asks the model, and keeps every answer in FOLDER/judgements.jsonl: no question is asked twice.

    num_malformed: answers that were no marks and were asked for again; num_refused: questions without an answer.
    """

    def __init__(self, options: JudgeOptions, folder: Path) -> None:
        self._options, self._path, self._lock = options, folder / JUDGEMENTS, threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        server = ServerOptions(
            base_url=options.judge,
            model=options.judge_model,
            api_key_env=options.judge_key_env,
            retries=options.judge_retries,
            retry_wait=1.0,
        )
        self._client, self._known = ServerClient(server), read_judgements(self._path)
        self.num_malformed = self.num_refused = 0
        self._cancelled = threading.Event()

    def mark(self, samples: Sequence[Sample], edits: Sequence[Edit]) -> list[dict[str, float]]:
        """judge_sc, judge_pq and judge_o of the edit of each sample; {} where the server refuses."""

        def one(sample: Sample, edit: Edit) -> dict[str, float]:
            question = POINTWISE.format(instruction=sample.instruction)
            marks = self._ask(question, [sample.original, read_edit(edit)], read_marks)
            if not marks:
                return {}
            sc, pq = min(marks["success"], marks["overediting"]), min(marks["naturalness"], marks["artefacts"])
            return {"judge_sc": sc, "judge_pq": pq, "judge_o": math.sqrt(sc * pq)}

        return self._in_threads(one, samples, edits)

    def compare(
        self, samples: Sequence[Sample], names: tuple[str, str], first: Sequence[Edit], second: Sequence[Edit]
    ) -> list[Vote]:
        """A vote on the two edits of each sample."""

        def one(sample: Sample, *edits: Edit) -> Vote | None:
            a, b = map(read_edit, edits)
            question = PAIRWISE.format(instruction=sample.instruction)
            answers = [self._ask(question, [sample.original, *pair], read_choice) for pair in ((a, b), (b, a))]
            if None in answers:
                return None
            chosen = {("A", "B"): "first", ("B", "A"): "second"}
            winner = chosen.get(tuple(answer["better"] for answer in answers), "tie")
            return Vote(*names, winner, sample.number, f"judge {self._options.judge_model}")

        return [vote for vote in self._in_threads(one, samples, first, second) if vote]

    def _in_threads(self, function: Callable, *items: Sequence) -> list:
        """The results in order. After an error or Ctrl-C no further question is asked."""
        threads = ThreadPoolExecutor(self._options.judge_concurrency)
        try:
            return list(threads.map(function, *items))
        except BaseException:
            self._cancelled.set()
            raise
        finally:
            threads.shutdown(cancel_futures=True)

    def check_itself(self) -> str:
        """Ask about edits with exact results; returns a sentence. Raises InputError for a judge that fails.

        The unedited input has to get a lower O than the exact edit, and the edit of another instruction, too.
        """
        samples, edits = [], []
        for path, (task, instruction) in zip(list_photographs(PHOTOS, "heldout"), CHECKED.items(), strict=False):
            pixels = centre_square(read_photograph(path), CHECK_SIDE)
            other = EDITS[next(name for name in CHECKED if name != task)](pixels)
            for edit in (EDITS[task](pixels), pixels, other):
                samples.append(Sample(len(samples), Image.fromarray(pixels), instruction))
                edits.append(Image.fromarray(edit))
        values = [marks.get("judge_o") for marks in self.mark(samples, edits)]
        cases = list(zip(values[::3], values[1::3], values[2::3], strict=True))
        if wrong := [case for case in cases if None in case or not case[0] > max(case[1:])]:
            raise InputError(
                f"--judge_model {self._options.judge_model} fails the check of itself in {len(wrong)} of {len(cases)} "
                "cases: it has to mark an exact edit higher than the unedited input and than another edit. Its marks "
                f"(O) of exact, unedited, other: {wrong[0]}. Use a stronger vision model"
            )
        shown = "; ".join(" > ".join(f"{value:.1f}" for value in (case[0], max(case[1:]))) for case in cases)
        return f"the judge marks exact edits above unedited and wrong ones (O: {shown})"

    def _ask(self, question: str, images: list[Image.Image], read: Any) -> dict | None:
        """The answer, of the file or of the server; None if the server refuses the question."""
        contents = [as_png(image) for image in images]
        digest = hashlib.sha256(f"{self._options.judge_model}\n{question}".encode())
        for content in contents:
            digest.update(hashlib.sha256(content).digest())
        key = digest.hexdigest()[:32]
        if key in self._known:
            return self._known[key]

        def read_counted(completion: Any) -> dict:
            try:
                return read(completion.choices[0].message.content)
            except (ValueError, AttributeError, LookupError, TypeError) as error:
                self.num_malformed += 1
                raise ValueError(f"no valid judgement: {error}") from None

        urls = [f"data:image/png;base64,{base64.b64encode(content).decode()}" for content in contents]
        parts = [{"type": "text", "text": question}]
        parts += [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        body = {"model": self._options.judge_model, "messages": [{"role": "user", "content": parts}], "temperature": 0}
        try:
            answer = self._client.request(
                self._client.openai.chat.completions.create,
                body | {"max_tokens": MAX_TOKENS},
                read_counted,
                self._cancelled,
            )
        except RequestRefused:
            self.num_refused += 1
            return None
        except InputError as error:
            raise InputError(_with_own_flags(str(error))) from None
        with self._lock:
            append_json_line(self._path, {"key": key} | answer)
            self._known[key] = answer
        return answer


def _with_own_flags(message: str) -> str:
    """A message of the client, which names the flags of generate_captions.py, with those of the judge."""
    message = message.partition(" Finished shards")[0].replace("--api_key_env", "--judge_key_env")
    message = message.replace("--base_url", "--judge").replace("--model", "--judge_model")
    return f"{message} Answers are kept: run the same command again to resume"


def as_png(image: Image.Image) -> bytes:
    """The image as it is sent, its longer side at most `MAX_SIDE` pixels."""
    content = io.BytesIO()
    shown = image.convert("RGB")
    shown.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    shown.save(content, "PNG")
    return content.getvalue()


def read_marks(text: str) -> dict[str, float]:
    """The four marks of an answer. Raises ValueError."""
    values = _read_object(text)
    marks = {name: values.get(name) for name in MARKS}
    for name, value in marks.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 10:
            raise ValueError(f"{name} is {value!r}, not a number from 0 to 10")
    return {name: float(value) for name, value in marks.items()}


def read_choice(text: str) -> dict[str, str]:
    """{"better": "A" or "B"}. Raises ValueError."""
    better = _read_object(text).get("better")
    if better not in ("A", "B"):
        raise ValueError(f"better is {better!r}, not A or B")
    return {"better": better}


def _read_object(text: str) -> dict:
    """The JSON object in an answer, which may have text or a code fence around it. Raises ValueError."""
    match = re.search(r"\{.*\}", text, re.DOTALL) if isinstance(text, str) else None
    values = json.loads(match[0]) if match else None
    if not isinstance(values, dict):
        raise ValueError("no JSON object")
    return values


def read_judgements(path: Path) -> dict[str, dict]:
    """The answers of former runs by their key; half-written lines are left out."""
    known = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            values = parse_json_object(line, str(path))
            known[values.pop("key")] = values
        except (ValueError, KeyError, TypeError):
            continue
    return known
