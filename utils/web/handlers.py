"""What the page in the browser does when something is pressed: plain values in, updates of its parts by name out."""

from __future__ import annotations

import logging
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr

from utils.editing.edit_images import save_image
from utils.editing.random_edits import EASY_INSTRUCTIONS, draw_scales
from utils.editing.records import KEY, as_text
from utils.editing.service import save_edit
from utils.errors import InputError
from utils.web.links import Wish, from_query, to_query
from utils.web.page_text import complain, say
from utils.web.request_queue import Stopped, Ticket
from utils.web.studio import Edit, Progress, Studio

logger = logging.getLogger(__name__)
WITH_PICTURE, WITH_TWIN = "picture and edit", "the two models"
WELCOME = "Choose a picture to begin with, or load the example."
COMPARISON = "before | after"
BUG = "Something went wrong on the server; its log says what. The next edit is not touched by it."


@dataclass(frozen=True)
class Shown:
    """One edit in the gallery; the files live as long as the visitor's session."""

    model: str
    seed: int
    caption: str
    original: str
    edited: str


class Runs:
    """The actions of all visitors. A visitor is known by the session that Gradio gives to each open page."""

    def __init__(self, studio: Studio, example_pictures: list[Path]) -> None:
        self._studio, self._examples = studio, example_pictures
        self._running: dict[str, Ticket] = {}

    def edit(
        self, picture: str | None, wish: Wish, new_seed: bool, new_guidance: bool, shown: list[Shown], session: str
    ) -> Iterator[dict[str, Any]]:
        """The course of an edit as updates of the page; it always ends with the page ready for the next one."""
        done: list[Edit] = []
        tickets: list[Ticket] = []
        yield {"status": say("Starting", 0.0), "run": gr.update(interactive=False), "stop": gr.update(interactive=True)}
        try:
            wish = self._draw(wish, new_seed, new_guidance)
            for event in self._studio.run(picture, wish, lambda ticket: tickets.append(self._seat(session, ticket))):
                if isinstance(event, Progress):
                    yield {"status": say(event.text, event.share)}
                    continue
                done.append(event)
                if len(done) == 1:
                    remove_files(shown)
                    shown, folder = [], Path(tempfile.mkdtemp(prefix="edits-"))
                shown = arrange([*shown, _save(event, folder, len(wish.models) > 1)], wish)
                yield self._show(shown, wish, is_first=len(done) == 1)
            last = say(_summary(done, wish))
        except Stopped as reason:
            last = say(f"{reason} {len(done)} of {wish.images * len(wish.models)} images were done.")
        except InputError as error:
            last = complain(str(error))
        except Exception:
            logger.exception("an edit failed")
            last = complain(BUG)
        finally:
            if tickets and self._running.get(session) is tickets[0]:
                del self._running[session]
        # The gallery once more: in the browser an image that follows another at once may have got lost.
        again = {"gallery": show_gallery(shown, wish)} if done else {}
        ready = {"run": gr.update(interactive=True), "stop": gr.update(interactive=False)}
        yield {"status": last} | ready | again

    def call(self, picture: str | None, wish: Wish, progress: gr.Progress) -> tuple[list[tuple], dict[str, Any]]:
        """The same for the API: all edits with their captions, and what was done. Raises gr.Error."""
        edits: list[Edit] = []
        try:
            for event in self._studio.run(picture, wish, lambda ticket: None):
                if isinstance(event, Progress):
                    progress(event.share, desc=event.text)
                else:
                    edits.append(event)
        except (Stopped, InputError) as error:
            raise gr.Error(str(error), print_exception=False) from error
        facts = [
            {"model": edit.model, "seed": edit.seed, "blocked": edit.is_blocked, **asdict(edit.settings)}
            for edit in edits
        ]
        for edit in edits:  # Gradio makes the files, and writes an image's texts into them
            edit.edited.info[KEY] = as_text(edit.record | {"batch": [0, 1]})
        return [(edit.edited, _caption(edit, True)) for edit in edits], {"link": to_query(wish), "edits": facts}

    def _seat(self, session: str, ticket: Ticket) -> Ticket:
        """A page runs one edit: loading an example while another edit runs takes its place."""
        self.stop(session)
        self._running[session] = ticket
        return ticket

    def stop(self, session: str) -> None:
        if ticket := self._running.get(session):
            ticket.stop()

    def check_picture(self, picture: str | None) -> dict[str, Any]:
        """Say at once what is wrong with an upload, and take it off the page."""
        try:
            width, height = self._studio.load_picture(picture).picture.size
            return {"status": say(f"{width} x {height} pixels.")}
        except InputError as error:
            return {"status": complain(str(error)), "picture": None}

    def choose_model(self, model: str) -> dict[str, Any]:
        """A model brings the settings with which it edits best."""
        best = self._studio.shelf.recommended(model)
        return {"steps": best.steps, "cfg_text": best.guidance_scale, "cfg_image": best.image_guidance_scale}

    def select(self, edited: str, shown: list[Shown], against: str) -> dict[str, Any]:
        """One edit of the gallery beside its picture, or beside the other model's edit with the same seed."""
        chosen = next((item for item in shown if item.edited == edited), None)
        if chosen is None:
            return {}
        pair = [item for item in shown if item.seed == chosen.seed]
        if against == WITH_TWIN and len(pair) == 2:
            files, names = [item.edited for item in pair], [item.caption for item in pair]
        else:
            files, names = (chosen.original, chosen.edited), ("picture", chosen.caption)
        return {"selected": edited, "comparison": gr.update(value=tuple(files), label=" | ".join(names))}

    def load_example(self) -> dict[str, Any]:
        return {"picture": str(secrets.choice(self._examples)), "instruction": secrets.choice(EASY_INSTRUCTIONS)}

    def default_wish(self) -> Wish:
        model = self._studio.shelf.names[0]
        values = self.choose_model(model)
        return Wish(model=model, seed=1371, **values)

    def reset(self) -> dict[str, Any]:
        """The page as it was opened without a link."""
        empty = dict(picture=None, shown=[], selected="", gallery=[], query="", status=say(WELCOME))
        empty |= dict(comparison=gr.update(value=None, label=COMPARISON), against=gr.update(visible=False))
        ready = dict(run=gr.update(interactive=True), stop=gr.update(interactive=False))
        return asdict(self.default_wish()) | empty | ready | dict(new_seed=True, new_guidance=False)

    def restore(self, query: dict[str, str]) -> dict[str, Any]:
        """The settings of the link by which the page was opened. They are meant, so nothing is drawn anew."""
        names = self._studio.shelf.names
        default = self.default_wish()
        if query.get("model") in names:
            default = replace(default, model=query["model"], **self.choose_model(query["model"]))
        wish, ignored = from_query(query, default, names)
        updates: dict[str, Any] = asdict(wish)
        if "seed" in query:
            updates["new_seed"] = False
        updates["status"] = complain("\n".join(ignored)) if ignored else say(WELCOME)
        return updates

    def _draw(self, wish: Wish, new_seed: bool, new_guidance: bool) -> Wish:
        if new_seed:
            wish = replace(wish, seed=secrets.randbelow(100_000))
        if new_guidance and wish.model in self._studio.shelf.names:
            recommended = self._studio.shelf.recommended(wish.model)
            text, image = draw_scales(None, (recommended.guidance_scale, recommended.image_guidance_scale))
            wish = replace(wish, cfg_text=text, cfg_image=image)
        return wish

    def _show(self, shown: list[Shown], wish: Wish, is_first: bool) -> dict[str, Any]:
        changed = {"shown": shown, "gallery": show_gallery(shown, wish)}
        if not is_first:  # the visitor may have chosen one already
            return changed
        numbers = dict(seed=wish.seed, cfg_text=wish.cfg_text, cfg_image=wish.cfg_image, query=to_query(wish))
        changed["against"] = gr.update(visible=len(wish.models) > 1, value=WITH_PICTURE)
        return changed | numbers | self.select(shown[0].edited, shown, WITH_PICTURE)


def show_gallery(shown: list[Shown], wish: Wish) -> dict[str, Any]:
    columns = 2 if len(wish.models) > 1 else 4
    return gr.update(value=[(item.edited, item.caption) for item in shown], columns=columns)


def _save(edit: Edit, folder: Path, names_model: bool) -> Shown:
    number = len(list(folder.glob("edit-*")))
    files = [folder / f"picture-{number}.png", folder / f"edit-{number}-seed-{edit.seed}.png"]
    save_image(edit.original, files[0])
    save_edit(edit.edited, files[1], edit.record)
    return Shown(edit.model, edit.seed, _caption(edit, names_model), *map(str, files))


def _caption(edit: Edit, names_model: bool) -> str:
    parts = [edit.model, f"{edit.settings.steps} steps"] if names_model else []
    blocked = ["black: the model's safety checker objected"] if edit.is_blocked else []
    return " · ".join([*parts, f"seed {edit.seed}", *blocked])


def _summary(done: list[Edit], wish: Wish) -> str:
    count = f"{len(done)} images" if len(done) > 1 else "Done"
    scales = f"text guidance {wish.cfg_text:g}, image guidance {wish.cfg_image:g}"
    return f"{count}: {wish.steps} steps, seed {wish.seed}, {scales}."


def arrange(shown: list[Shown], wish: Wish) -> list[Shown]:
    """By seed, then by model: in a comparison the two edits of one seed stand side by side."""
    return sorted(shown, key=lambda item: (item.seed, wish.models.index(item.model)))


def remove_files(shown: list[Shown]) -> None:
    for folder in {Path(item.edited).parent for item in shown}:
        shutil.rmtree(folder, ignore_errors=True)
