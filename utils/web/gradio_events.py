"""What Gradio does not offer for events: whether the client is still there, and checks before it fetches files.

Both use parts of the pinned Gradio that are not documented.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
from gradio.context import LocalContext

REMOTE_FILE = (
    "The image must be uploaded: this server fetches no addresses. Send the file to /upload, and give its path."
)


def make_connection_check(blocks: gr.Blocks) -> Callable[[], bool]:
    """Called in an event handler: a function that tells whether the client of this event still waits for its result.

    Gradio notices that the connection was closed, or that the event was cancelled, but it lets the handler run on.
    """
    queue, event_id = blocks._queue, LocalContext.event_id.get(None)

    def is_connected() -> bool:
        event = queue.event_ids_to_events.get(event_id)
        # A cancelled event may still be alive, but nothing is sent to its client any more.
        return (
            event is not None
            and event.alive
            and event_id in queue.pending_event_ids_session.get(event.session_hash, ())
        )

    return is_connected


def check_inputs_early(blocks: gr.Blocks, accepts_fewer: str) -> None:
    """Before Gradio fetches and decodes the inputs of an event: refuse files that are addresses of other servers, and
    text in place of numbers.

    Gradio would fetch them, as large as they are, from the server's own network. `accepts_fewer`: the API function
    whose last values may be left out, as by a client that does not know them; Gradio refuses a list that ends early.
    """
    validate = blocks.validate_inputs

    def validate_inputs(block_fn: Any, values: list[Any]) -> None:
        if any("://" in path for path in _find_paths(values)):
            raise gr.Error(REMOTE_FILE, print_exception=False)
        if block_fn.api_name == accepts_fewer and len(values) > 2:
            values += [part.value for part in block_fn.inputs[len(values) :]]
        for index, (part, value) in enumerate(zip(block_fn.inputs, values, strict=False)):
            if isinstance(part, (gr.Slider, gr.Number)):
                values[index] = _read_number(part, value)
        validate(block_fn, values)

    preprocess = blocks.preprocess_data

    async def preprocess_data(*arguments: Any, **settings: Any) -> Any:
        try:
            return await preprocess(*arguments, **settings)
        except gr.Error as error:  # a mistake of the client, such as a model that is not there
            error.print_exception = False
            raise

    blocks.validate_inputs, blocks.preprocess_data = validate_inputs, preprocess_data


def _read_number(part: gr.Slider | gr.Number, value: Any) -> float | None:
    """The value of a slider or field. Raises gr.Error for others, which Gradio would refuse with a traceback."""
    lowest, highest = (-math.inf if part.minimum is None else part.minimum), part.maximum or math.inf
    try:
        number = value if value is None or isinstance(value, (int, float)) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if number is None:
        return None
    if not lowest <= number <= highest:
        message = f"{part.label} is {value!r:.50}; it must be a number from {lowest:g} to {highest:g}"
        raise gr.Error(message, print_exception=False)
    return int(number) if isinstance(value, str) and number.is_integer() else number


def _find_paths(value: Any) -> Iterator[str]:
    """The "path" of every file in the inputs of an event, however deep."""
    if isinstance(value, dict):
        if isinstance(path := value.get("path"), str):
            yield path
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _find_paths(part)
