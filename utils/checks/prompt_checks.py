"""What can be said of an instruction without a model: its length in tokens, and the task that its words name."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np

MAX_TOKENS = 77  # of CLIP's text encoders, start and end included
# As CLIP's tokenizer cuts before it looks into its vocabulary: words, single digits, runs of marks.
PIECES = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|[^\s\w]+|_+", re.IGNORECASE)
WORD_LETTERS = 12  # letters that a long word's tokens have about
CountTokens = Callable[[str], int]
_AWAY = (
    r"(remove|reduce|clean\w*|clear|lift|get rid of|take (away|out|off)|without|eliminate|undo|fix|correct|suppress|"
    r"filter|wipe|less|free of|erase|lose|cure)\b.{0,25}\b"
)
# What the words of an instruction ask for, where no column says it. Phrases that ask for the opposite do not match.
TASK_WORDS = {
    "denoise": rf"de-?nois\w*|{_AWAY}((?<!mosquito )(?<!compression )noise|grain|speckles?)",
    "deblur": rf"de-?blur\w*|{_AWAY}(blur|camera shake|shake|smear)",
    "dehaze": rf"de-?haz\w*|{_AWAY}(haze|fog|mist)",
    "derain": rf"de-?rain\w*|{_AWAY}rain(fall| streaks)?(?! ?drops)",
    "sharpen": r"sharpen\w*|make (it|the \w+) (sharper|crisper)",
    "super_resolve": r"super-?resol\w*|upscale\w*|(increase|enhance|raise) the resolution",
    "colorize": r"colou?ri[sz]e\w*|(add|give|bring) .{0,12}colou?rs? (to|back)",
    "low_light": r"low-?light|(brighten|light) (up )?(the|this|it)|under-?exposed",
    "jpeg": rf"{_AWAY}(jpe?g|compression)",
    "identity": r"(no|zero|not|any|skip|nothing|don't)\b.{0,30}\b(edit|chang|modif|alter|touch|fix|do\b)\w*|"
    r"(do|change) nothing|(leave|let|keep|stay|preserve|retain|maintain|return|reproduce|repeat|copy the|output|"
    r"hand back|give me back|pass|remain)\b.{0,40}\b(as it|alone|unchanged|untouched|unaltered|unedited|same|original|"
    r"input|exactly|be$|it\W*$|faithfully|through)|same picture again|exactly this picture|fine as it is|"
    r"the way it is|identical copy",
}
TASK_PATTERNS = {task: re.compile(rf"\b({words})", re.IGNORECASE) for task, words in TASK_WORDS.items()}


def usable_prompts(value: object) -> list[str]:
    """The instructions of a row that training can draw: of a string or a list of strings, those that are not empty."""
    values = value if isinstance(value, (list, tuple, np.ndarray)) else [value]
    return [prompt for prompt in values if isinstance(prompt, str) and prompt.strip()]


def estimate_tokens(prompt: str) -> int:
    """About how many tokens CLIP makes of a prompt, start and end included.

    A word of up to 12 letters counts as one, which holds for all but rare ones; letters beyond ASCII are cut into bytes
    and count for half of these. So a prompt of plain English that is said to be too long is.
    """
    count = 2
    for piece in PIECES.findall(prompt):
        if not piece.isascii():
            count += math.ceil(len(piece.encode("utf-8")) / 2)
        else:
            count += math.ceil(len(piece) / WORD_LETTERS)
    return count


def guess_task(prompt: str) -> str | None:
    """The restoring task that an instruction names, such as "denoise", or None."""
    return next((task for task, pattern in TASK_PATTERNS.items() if pattern.search(prompt)), None)
