"""What the page does on each event: plain values in, updates of its components by name out."""

import logging
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr

from utils.editing.records import KEY, as_text, save_image
from utils.editing.settings import DEFAULT_SETTINGS, EASY_INSTRUCTIONS, SCALES, draw_scales
from utils.errors import InputError
from utils.web.edit_requests import EditRequest, PageEdit, RequestRunner, from_query, to_query
from utils.web.page_text import error_html, status_html
from utils.web.request_queue import QueueSlot, RequestProgress, Stopped

logger = logging.getLogger(__name__)
IMAGE_AND_EDIT, TWO_MODELS = "image and edit", "the two models"
WELCOME = "Choose an image, or load the example."
COMPARISON = "before | after"
BUG = "Something went wrong on the server, see its log. The next edit is not affected."
DEFAULT_SEED = 1371


@dataclass(frozen=True)
class GalleryItem:
    """One edit in the gallery; its files exist as long as the visitor's session."""

    model: str
    seed: int
    caption: str
    original: str
    edited: str


class PageHandlers:
    """The event handlers for all visitors. Gradio gives each open page a session."""

    def __init__(self, runner: RequestRunner, examples: list[Path]) -> None:
        self._runner, self._models, self._examples = runner, runner.models, examples
        self._running: dict[str, QueueSlot] = {}

    def edit(
        self,
        image: str | None,
        request: EditRequest,
        new_seed: bool,
        new_guidance: bool,
        gallery: list[GalleryItem],
        session: str,
    ) -> Iterator[dict[str, Any]]:
        """The progress and edits of a request as updates of the page; `ready` comes after them."""
        done: list[PageEdit] = []
        slots: list[QueueSlot] = []
        starting = {"run": gr.update(interactive=False), "stop": gr.update(interactive=True)}
        yield {"status": status_html("Starting", 0.0)} | starting
        try:
            request = self._draw(request, new_seed, new_guidance)
            for event in self._runner.run(image, request, lambda slot: slots.append(self._start(session, slot))):
                if isinstance(event, RequestProgress):
                    yield {"status": status_html(event.text, event.fraction)}
                    continue
                done.append(event)
                if len(done) == 1:
                    remove_files(gallery)
                    gallery, folder = [], Path(tempfile.mkdtemp(prefix="edits-"))
                gallery = _sort([*gallery, _save(event, folder, len(request.models) > 1)], request)
                yield self._show(gallery, request, is_first=len(done) == 1)
            last = status_html(_summary(done, request))
        except Stopped as reason:
            last = status_html(f"{reason} {len(done)} of {request.num_edits} images were finished.")
        except InputError as error:
            last = error_html(_message(error))
        except Exception:
            logger.exception("an edit failed")
            last = error_html(BUG)
        finally:
            if slots and self._running.get(session) is slots[0]:
                del self._running[session]
        # The gallery again: the browser may lose an image that immediately follows another.
        again = {"gallery": _show_gallery(gallery, request)} if done else {}
        yield {"status": last} | again

    def ready(self) -> dict[str, Any]:
        """An event of its own: Gradio ignores a press before the last request has ended, later than its last update."""
        return {"run": gr.update(interactive=True), "stop": gr.update(interactive=False)}

    def call(
        self, image: str | None, request: EditRequest, progress: gr.Progress, is_connected: Callable[[], bool]
    ) -> tuple[list[tuple], dict[str, Any]]:
        """For the API: all edits with their captions, and their settings. Raises gr.Error.

        is_connected: asked after each step; a client that has left frees the device.
        """
        edits, facts = [], []
        slots: list[QueueSlot] = []
        try:
            for event in self._runner.run(image, request, slots.append):
                if not is_connected():
                    slots[0].stop()
                if isinstance(event, RequestProgress):
                    progress(event.fraction, desc=event.text)
                    continue
                result, settings = event.result, event.result.record["settings"]
                result.image.info[KEY] = as_text(result.record)  # Gradio saves the image with its texts
                edits.append((result.image, _caption(event, True)))
                used = {name: settings.get(name) for name in (*DEFAULT_SETTINGS, "scheduler", "keep_size")}
                made_by = {"model": event.model, "seed": result.record["seed"], "blocked": result.is_flagged}
                facts.append(made_by | used)
        except (Stopped, InputError) as error:
            raise gr.Error(_message(error), print_exception=False) from error
        return edits, {"link": to_query(request), "edits": facts}

    def _start(self, session: str, slot: QueueSlot) -> QueueSlot:
        """A page runs one request: a new one, as of the example, stops the one before."""
        self.stop(session)
        self._running[session] = slot
        return slot

    def stop(self, session: str) -> None:
        if slot := self._running.get(session):
            slot.stop()

    def check_image(self, image: str | None) -> dict[str, Any]:
        """Report what is wrong with an upload at once, and remove it from the page."""
        try:
            height, width = self._runner.check_upload(image)
            return {"status": status_html(f"{width} x {height} pixels.")}
        except InputError as error:
            return {"status": error_html(str(error)), "image": None}

    def choose_model(self, model: str) -> dict[str, Any]:
        """Set the sliders to the settings that a model recommends."""
        settings = self._models.settings(model)
        scales = dict(cfg_text=settings[SCALES[0]], cfg_image=settings[SCALES[1]])
        resolution = self._runner.resolution or settings["resolution"] or 0
        return dict(
            steps=settings["steps"], guidance_rescale=settings["guidance_rescale"], resolution=resolution, **scales
        )

    def select(self, edited: str, gallery: list[GalleryItem], against: str) -> dict[str, Any]:
        """Compare one edit of the gallery with its image, or with the other model's edit of the same seed."""
        chosen = next((item for item in gallery if item.edited == edited), None)
        if chosen is None:
            return {}
        pair = [item for item in gallery if item.seed == chosen.seed]
        if against == TWO_MODELS and len(pair) == 2:
            files, names = [item.edited for item in pair], [item.caption for item in pair]
        else:
            files, names = (chosen.original, chosen.edited), ("image", chosen.caption)
        return {"selected": edited, "comparison": gr.update(value=tuple(files), label=" | ".join(names))}

    def edit_again(self, edited: str) -> dict[str, Any]:
        """Make the selected edit the next image; a copy, because the next edit removes the files of this one."""
        if not Path(edited).is_file():
            return {"status": error_html("There is no edit to edit again: make one first.")}
        copy = Path(tempfile.mkdtemp(prefix="again-"), Path(edited).name)
        shutil.copy(edited, copy)
        return {"image": str(copy), "status": status_html("The edit is the image now: describe the next change.")}

    def load_example(self) -> dict[str, Any]:
        return {"image": str(secrets.choice(self._examples)), "instruction": secrets.choice(EASY_INSTRUCTIONS)}

    def default_request(self, model: str | None = None) -> EditRequest:
        model = model or self._models.names[0]
        return EditRequest(model=model, seed=DEFAULT_SEED, **self.choose_model(model))

    def reset(self) -> dict[str, Any]:
        """The page as it opens without a link."""
        empty = dict(image=None, items=[], selected="", gallery=[], query="", status=status_html(WELCOME))
        empty |= dict(comparison=gr.update(value=None, label=COMPARISON), against=gr.update(visible=False))
        empty["again"] = gr.update(interactive=False)
        return asdict(self.default_request()) | empty | self.ready() | dict(new_seed=True, new_guidance=False)

    def restore(self, query: dict[str, str]) -> dict[str, Any]:
        """The values of the link with which the page was opened. Its seed is not replaced by a random one."""
        names = self._models.names
        default = self.default_request(query["model"] if query.get("model") in names else None)
        request, ignored = from_query(query, default, names)
        updates: dict[str, Any] = asdict(request)
        if "seed" in query:
            updates["new_seed"] = False
        updates["status"] = error_html("\n".join(ignored)) if ignored else status_html(WELCOME)
        return updates

    def _draw(self, request: EditRequest, new_seed: bool, new_guidance: bool) -> EditRequest:
        if new_seed:
            request = replace(request, seed=secrets.randbelow(100_000))
        if new_guidance and request.model in self._models.names:
            settings = self._models.settings(request.model)
            text, image = draw_scales(None, tuple(settings[name] for name in SCALES))
            request = replace(request, cfg_text=text, cfg_image=image)
        return request

    def _show(self, gallery: list[GalleryItem], request: EditRequest, is_first: bool) -> dict[str, Any]:
        updates = {"items": gallery, "gallery": _show_gallery(gallery, request)}
        if not is_first:  # the visitor may have selected one already
            return updates
        used = dict(seed=request.seed, cfg_text=request.cfg_text, cfg_image=request.cfg_image, query=to_query(request))
        updates["again"] = gr.update(interactive=True)
        updates["against"] = gr.update(visible=len(request.models) > 1, value=IMAGE_AND_EDIT)
        return updates | used | self.select(gallery[0].edited, gallery, IMAGE_AND_EDIT)


def _message(error: Exception) -> str:
    """An error in the words of the page: the same settings have flags in infer.py."""
    return str(error).removeprefix("--")


def _show_gallery(gallery: list[GalleryItem], request: EditRequest) -> dict[str, Any]:
    columns = 2 if len(request.models) > 1 else 4
    return gr.update(value=[(item.edited, item.caption) for item in gallery], columns=columns)


def _save(edit: PageEdit, folder: Path, with_model: bool) -> GalleryItem:
    number, seed = len(list(folder.glob("edit-*"))), edit.result.record["seed"]
    original, edited = folder / f"image-{number}.png", folder / f"edit-{number}-seed-{seed}.png"
    save_image(edit.original, original)
    edit.result.save(edited)
    return GalleryItem(edit.model, seed, _caption(edit, with_model), str(original), str(edited))


def _caption(edit: PageEdit, with_model: bool) -> str:
    record = edit.result.record
    parts = [edit.model, f"{record['settings']['steps']} steps"] if with_model else []
    flagged = ["black: flagged by the model's safety checker"] if edit.result.is_flagged else []
    return " · ".join([*parts, f"seed {record['seed']}", *flagged])


def _summary(done: list[PageEdit], request: EditRequest) -> str:
    count = f"{len(done)} images" if len(done) > 1 else "Done"
    scales = f"text guidance {request.cfg_text:g}, image guidance {request.cfg_image:g}"
    is_first = done[0].result.record["settings"].get("first_frame")
    only = " Only the first frame is edited: infer.py edits animations." if is_first else ""
    return f"{count}: {request.steps} steps, seed {request.seed}, {scales}.{only}"


def _sort(gallery: list[GalleryItem], request: EditRequest) -> list[GalleryItem]:
    """By seed, then by model, so that the two edits of one seed are side by side in a comparison."""
    return sorted(gallery, key=lambda item: (item.seed, request.models.index(item.model)))


def remove_files(gallery: list[GalleryItem]) -> None:
    for folder in {Path(item.edited).parent for item in gallery}:
        shutil.rmtree(folder, ignore_errors=True)
