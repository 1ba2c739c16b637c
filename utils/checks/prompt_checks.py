"""Checks of an instruction without a model: its length in tokens, and the task that it names."""

import math
import re
from collections.abc import Callable

MAX_TOKENS = 77  # of CLIP's text encoders, including start and end
# CLIP's tokenizer splits a prompt into these before it looks up its vocabulary: words, digits, runs of symbols.
PIECES = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|[^\s\w]+|_+", re.IGNORECASE)
LETTERS_PER_TOKEN = 12
CountTokens = Callable[[str], int]
_REMOVE = (
    r"(remove|reduce|clean\w*|clear|lift|get rid of|take (away|out|off)|without|eliminate|undo|fix|correct|suppress|"
    r"filter|wipe|less|free of|erase|lose|cure)\b.{0,25}\b"
)
# The words of an instruction that name a task, if no column does. Instructions for the opposite do not match.
TASK_WORDS = {
    "denoise": rf"de-?nois\w*|{_REMOVE}((?<!mosquito )(?<!compression )noise|grain|speckles?)",
    "deblur": rf"de-?blur\w*|{_REMOVE}(blur|camera shake|shake|smear)",
    "dehaze": rf"de-?haz\w*|{_REMOVE}(haze|fog|mist)",
    "derain": rf"de-?rain\w*|{_REMOVE}rain(fall| streaks)?(?! ?drops)",
    "sharpen": r"sharpen\w*|make (it|the \w+) (sharper|crisper)",
    "super_resolve": r"super-?resol\w*|upscale\w*|(increase|enhance|raise) the resolution",
    "colorize": r"colou?ri[sz]e\w*|(add|give|bring) .{0,12}colou?rs? (to|back)",
    "low_light": r"low-?light|(brighten|light) (up )?(the|this|it)|under-?exposed",
    "jpeg": rf"{_REMOVE}(jpe?g|compression)",
    "identity": r"(no|zero|not|any|skip|nothing|don't)\b.{0,30}\b(edit|chang|modif|alter|touch|fix|do\b)\w*|"
    r"(do|change) nothing|(leave|let|keep|stay|preserve|retain|maintain|return|reproduce|repeat|copy the|output|"
    r"hand back|give me back|pass|remain)\b.{0,40}\b(as it|alone|unchanged|untouched|unaltered|unedited|same|original|"
    r"input|exactly|be$|it\W*$|faithfully|through)|same picture again|exactly this picture|fine as it is|"
    r"the way it is|identical copy",
}
TASK_PATTERNS = {task: re.compile(rf"\b({words})", re.IGNORECASE) for task, words in TASK_WORDS.items()}


def estimate_tokens(prompt: str) -> int:
    """About how many tokens CLIP makes of a prompt, including start and end.

    A word of up to 12 letters counts as one token. Too low for rare words, so plain English is never reported wrongly.
    Text that is not ASCII counts as half a token for each byte.
    """
    count = 2
    for piece in PIECES.findall(prompt):
        count += math.ceil(len(piece) / LETTERS_PER_TOKEN if piece.isascii() else len(piece.encode("utf-8")) / 2)
    return count


def guess_task(prompt: str) -> str | None:
    """The restoration task that an instruction names, such as "denoise", or "identity", or None."""
    return next((task for task, pattern in TASK_PATTERNS.items() if pattern.search(prompt)), None)
