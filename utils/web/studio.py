"""A wish and a picture -> edits, one after the other, with every step reported; what the browser and its API run."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from utils.editing.edit_images import edit_images, fit_to_model
from utils.editing.encodings import Encodings
from utils.editing.jobs import Recommended, Settings, resolve_settings
from utils.editing.records import make_record
from utils.errors import InputError
from utils.pixels import BadRow, decode_image
from utils.web.links import Wish, check_wish
from utils.web.model_cache import Shelf
from utils.web.request_queue import Ticket, Turns

LOOK_ROUND_SECONDS = 0.5  # how often one who waits looks whether they were stopped


@dataclass(frozen=True)
class Progress:
    """Where a wish is: a sentence, and the share of its work that is done."""

    text: str
    share: float = 0.0


@dataclass(frozen=True)
class Edit:
    """One finished image, with the picture as the model saw it, and the record by which `infer.py` repeats it."""

    model: str
    seed: int
    settings: Recommended
    original: Image.Image
    edited: Image.Image
    record: dict

    @property
    def is_blocked(self) -> bool:
        return bool(self.edited.info.get("flagged"))


@dataclass(frozen=True)
class Upload:
    """A visitor's picture: the file as it came, and what it shows, upright and RGB."""

    name: str
    content: bytes
    picture: Image.Image


class Studio:
    """Models, the line before them, and what a visitor may send."""

    def __init__(self, shelf: Shelf, turns: Turns, *, resolution: int | None, max_pixels: int, max_bytes: int) -> None:
        self.shelf, self.turns = shelf, turns
        self._resolution, self._max_pixels, self._max_bytes = resolution, max_pixels, max_bytes

    def load_picture(self, path: str | None) -> Upload:
        """The uploaded picture. Raises InputError in a visitor's words."""
        if not path or not Path(path).is_file():
            raise InputError("There is no picture: choose one first.")
        try:
            if (size := Path(path).stat().st_size) > self._max_bytes:
                raise BadRow(f"too large: {size / 2**20:.1f} MB, at most {self._max_bytes / 2**20:g} MB are taken")
            content = Path(path).read_bytes()
            return Upload(Path(path).name, content, decode_image(content, max_pixels=self._max_pixels))
        except BadRow as error:
            raise InputError(f"The picture cannot be used: {error.reason}. Choose another one.") from error

    def run(self, path: str | None, wish: Wish, ticket_taken: Callable[[Ticket], None]) -> Iterator[Progress | Edit]:
        """Everything that happens until the last edit is done. Raises InputError and `Stopped`.

        Closing the iterator stops the edit at its next step: the line must not wait for somebody who has left.
        """
        wish = check_wish(wish, self.shelf.names)
        upload = self.load_picture(path)
        ticket = self.turns.join()
        ticket_taken(ticket)
        events: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=partial(self._work, upload, wish, ticket, events.put), daemon=True).start()
        try:
            while (event := _latest(events)) is not None:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            ticket.stop()

    def settings_for(self, wish: Wish, model: str) -> Recommended:
        """With what a model edits: the wish's settings are meant for its first model.

        In a comparison the second one edits with its own where one of the two brings its own, as an adapted editor
        does: four steps without guidance would show nothing of the editor that it was made from.
        """
        is_other = model != wish.model
        if is_other and (self.shelf.has_its_own(model) or self.shelf.has_its_own(wish.model)):
            return self.shelf.recommended(model)
        sliders = dict(steps=wish.steps, guidance_scale=wish.cfg_text, image_guidance_scale=wish.cfg_image)
        return replace(self.shelf.recommended(model), **sliders)

    def _work(self, upload: Upload, wish: Wish, ticket: Ticket, report: Callable[[Any], None]) -> None:
        """Runs in a thread of its own; None or an exception is the last thing that it reports."""
        try:
            with self.turns.leaving(ticket):
                while place := self.turns.wait(ticket, LOOK_ROUND_SECONDS):
                    ticket.check()
                    report(Progress(f"Waiting: {place} {'edit' if place == 1 else 'edits'} before yours"))
                ticket.start_clock()
                for position, model in enumerate(wish.models):
                    self._edit_all(model, position, upload, wish, ticket, report)
        except BaseException as error:
            report(error)
        else:
            report(None)

    def _edit_all(
        self, model: str, position: int, upload: Upload, wish: Wish, ticket: Ticket, report: Callable
    ) -> None:
        ticket.check()
        if not self.shelf.is_loaded(model):
            report(Progress(f"Loading {model}", position / len(wish.models)))
        opened, settings = self.shelf.take(model), self.settings_for(wish, model)
        pipeline = opened.pipeline
        chosen = Settings(**asdict(settings), resolution=self._resolution)
        resolved = resolve_settings(chosen, {}, type(pipeline.scheduler).__name__)
        original = fit_to_model(upload.picture, pipeline, self._resolution)
        encodings = Encodings(pipeline)  # picture and instruction are encoded once for all seeds
        of_model = f" · {model}" if len(wish.models) > 1 else ""

        for number, seed in enumerate(wish.seeds):
            ticket.check()
            of_images = f" · image {number + 1} of {wish.images}" if wish.images > 1 else ""
            before = position * wish.images + number

            def after_step(done: int, total: int, text: str = of_images + of_model, before: int = before) -> None:
                share = (before + done / total) / (wish.images * len(wish.models))
                report(Progress(f"Step {done} of {total}{text}", share))
                ticket.check()

            edited = edit_images(
                pipeline,
                [original],
                [wish.instruction],
                seeds=[seed],
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance_scale,
                image_guidance_scale=settings.image_guidance_scale,
                eta=settings.eta,
                on_step=after_step,
                encodings=encodings,
            )[0]
            record = make_record(
                opened.origin,
                name=upload.name,
                content=upload.content,
                instruction=wish.instruction,
                seed=seed,
                settings=resolved,
            )
            report(Edit(model, seed, settings, original, edited, record))


def _latest(events: queue.SimpleQueue) -> Any:
    """The next event; of several steps that have piled up, the last one: a slow browser must not lag behind."""
    event = events.get()
    while isinstance(event, Progress) and not events.empty():
        event = events.get()
    return event
