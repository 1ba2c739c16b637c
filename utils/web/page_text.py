"""The texts, the style (page.css) and the scripts (*.js) of the page."""

import html
from pathlib import Path

_FOLDER = Path(__file__).parent

TITLE = "Edit images by instruction"
INTRODUCTION = f"""# {TITLE}
Choose an image, describe the change, press **Enter**. **Escape** stops an edit."""
TIPS = (_FOLDER / "tips.md").read_text("utf-8")
CSS = (_FOLDER / "page.css").read_text("utf-8")
SHOW_LINK = (_FOLDER / "show_link.js").read_text("utf-8").strip()  # the settings of the last edit, in the address bar
HEAD = f"<script>\n{(_FOLDER / 'keys.js').read_text('utf-8')}</script>"


def status_html(text: str, fraction: float | None = None) -> str:
    """The status line, with a progress bar if `fraction` is given. Screen readers announce it."""
    bar = "" if fraction is None else f'<progress max="1" value="{fraction:.4f}" aria-label="progress"></progress>'
    return f'<div role="status" aria-live="polite"><span>{html.escape(text)}</span>{bar}</div>'


def error_html(text: str) -> str:
    """An error message; line breaks are kept."""
    return f'<div role="alert" class="error">{html.escape(text).replace(chr(10), "<br>")}</div>'
