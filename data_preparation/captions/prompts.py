"""What a language model is asked about a caption, and how its answer is parsed into a triple (caption, edit, output).

There are two formats. In "chat" an instruct model answers with a JSON object. In "legacy", the format of the original
InstructPix2Pix, a fine-tuned model continues `caption\\n##\\n` with `edit\\n%%\\noutput\\nEND`.
"""

import hashlib
import json
import re
import unicodedata
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from utils.checks.prompt_checks import MAX_TOKENS, estimate_tokens
from utils.json_lines import read_json_lines

EXAMPLES = Path(__file__).with_name("examples.jsonl")
TASK = (
    "You write training data for a model that edits pictures by instruction. For each caption of a picture, invent one "
    "change that can be seen and say it as a short instruction (edit), in the way of someone who talks to a picture "
    "editor; then give the caption of the changed picture (output). Keep in the output whatever the edit does not "
    "concern, the style and the medium too. Vary: replace, add or remove a thing, change a material, colour, age, "
    "season, weather, time of day, place, mood or artistic style. Be inventive, but let the edit fit the picture. Name "
    "neither left nor right. The edit has at most 12 words. Answer with one JSON object with the keys edit and output, "
    "and nothing else."
)
SCHEMA = {
    "type": "object",
    "properties": {"edit": {"type": "string"}, "output": {"type": "string"}},
    "required": ["edit", "output"],
    "additionalProperties": False,
}
PROMPT_END, SEPARATOR, STOP = "\n##\n", "\n%%\n", "\nEND"  # of the original's dataset_creation/prepare_for_gpt.py
MAX_EDIT_WORDS = 30
NUM_SEEDS = 2**31  # servers accept 32-bit seeds
_REASONING = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
_CODE_FENCE = re.compile(r"\A\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*\Z", re.DOTALL)
_DECODER = json.JSONDecoder(strict=False)  # allows line breaks inside strings; `clean_text` turns them into spaces


class Triple(NamedTuple):
    """A caption, an edit instruction, and the caption after the edit. Each is one line of text."""

    caption: str
    edit: str
    output: str


class Rejected(NamedTuple):
    """Why an answer is not a usable triple. reason: one of few texts, which are counted; detail: of this answer."""

    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Question:
    """One request to a model. seed: below NUM_SEEDS; determines the sampling and the worked examples."""

    caption: str
    seed: int


@dataclass(frozen=True)
class SamplingOptions:
    """How answers are sampled; the fields are flags. num_examples: worked examples before each caption."""

    format: str = "chat"
    temperature: float = 0.7
    top_p: float = 1.0
    max_tokens: int = 256
    frequency_penalty: float = 0.1
    num_examples: int = 8


@cache
def read_examples() -> tuple[Triple, ...]:
    """The worked examples of examples.jsonl."""
    return tuple(Triple(**row) for _, row in read_json_lines(EXAMPLES))


def digest_prompts() -> str:
    """A digest of the task and the worked examples, which determine the answers."""
    words = json.dumps([TASK, read_examples()], ensure_ascii=False)
    return hashlib.blake2b(words.encode(), digest_size=8).hexdigest()


def draw_examples(seed: int, count: int) -> list[Triple]:
    """`count` worked examples in an order that depends on the seed; models imitate them, so variety helps."""
    from data_preparation.photographs import seeded_rng

    examples = read_examples()
    return [examples[index] for index in seeded_rng(seed, 0).permutation(len(examples))[:count]]


def chat_messages(question: Question, num_examples: int) -> list[dict[str, str]]:
    """The messages for a chat model: the task, the worked examples as earlier turns, and the caption."""
    messages = [{"role": "system", "content": TASK}]
    for example in draw_examples(question.seed, num_examples):
        messages += example_messages(example)
    return [*messages, {"role": "user", "content": f"Caption: {question.caption}"}]


def example_messages(example: Triple) -> list[dict[str, str]]:
    """A worked example as a turn of the user and a turn of the assistant."""
    user = {"role": "user", "content": f"Caption: {example.caption}"}
    return [user, {"role": "assistant", "content": _chat_answer(example)}]


def plain_prompt(question: Question, num_examples: int) -> str:
    """The same as plain text, for a model without a chat template. The answer ends where the next caption begins."""
    examples = draw_examples(question.seed, max(num_examples, 1))  # a base model needs at least one
    turns = "".join(f"Caption: {example.caption}\nAnswer: {_chat_answer(example)}\n\n" for example in examples)
    return f"{TASK}\n\n{turns}Caption: {question.caption}\nAnswer:"


def legacy_prompt(caption: str) -> str:
    """The prompt of the original InstructPix2Pix."""
    return f"{caption}{PROMPT_END}"


def _chat_answer(example: Triple) -> str:
    return json.dumps({"edit": example.edit, "output": example.output}, ensure_ascii=False)


def parse_chat_answer(caption: str, text: str, is_finished: bool = True) -> Triple | Rejected:
    """Parse `{"edit": ..., "output": ...}`. Reasoning before it, a code fence and text around it are ignored."""
    text = _REASONING.sub("", text)
    fenced = _CODE_FENCE.match(text)
    text = fenced.group(1) if fenced else text
    if not text.strip():
        return Rejected("empty")
    try:
        answer, _ = _DECODER.raw_decode(text, text.index("{"))
    except (ValueError, RecursionError):
        return Rejected("no JSON" if is_finished else "cut off")
    if not all(key in answer for key in ("edit", "output")):
        return Rejected("missing key")
    if not all(isinstance(answer[key], str) for key in ("edit", "output")):
        return Rejected("not text")
    return check_triple(caption, answer["edit"], answer["output"])


def parse_legacy_answer(caption: str, text: str, is_finished: bool = True) -> Triple | Rejected:
    """Parse `edit\\n%%\\noutput`, up to the stop word if the text still contains it."""
    text, stop, _ = text.partition(STOP)
    if not text.strip():
        return Rejected("empty")
    if not (stop or is_finished):
        return Rejected("cut off")
    parts = text.split(SEPARATOR)
    if len(parts) != 2 or PROMPT_END in text:
        return Rejected("no delimiter")
    return check_triple(caption, *parts)


PARSERS = {"chat": parse_chat_answer, "legacy": parse_legacy_answer}


def check_triple(caption: str, edit: str, output: str) -> Triple | Rejected:
    """The triple with normalized white space, or the reason why it is rejected."""
    try:
        caption, edit, output = map(clean_text, (caption, edit, output))
    except UnicodeError:
        return Rejected("not text")
    if not (caption and comparable_text(edit) and comparable_text(output)):
        return Rejected("empty")
    if comparable_text(output) == comparable_text(caption):
        return Rejected("output equal to caption")
    if len(edit.split()) > MAX_EDIT_WORDS or estimate_tokens(edit) > MAX_TOKENS:
        return Rejected("edit too long")
    if estimate_tokens(output) > MAX_TOKENS:
        return Rejected("output too long")
    return Triple(caption, edit, output)


def clean_text(text: str) -> str:
    """One line without control characters. Raises UnicodeError for a lone surrogate, which UTF-8 cannot encode."""
    text.encode()
    text = "".join(" " if unicodedata.category(letter) in ("Cc", "Zl", "Zp") else letter for letter in text)
    return " ".join(text.split())


def comparable_text(text: str) -> str:
    """The letters, digits and symbols of a text, case-folded and NFKC-normalized, for comparisons."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    kept = (letter if unicodedata.category(letter)[0] in "LMNS" else " " for letter in text)
    return " ".join("".join(kept).split())
