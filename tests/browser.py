"""app.py as a process, and visitors of its page in Chromium."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.runs import ENVIRONMENT, REPOSITORY

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
INSTALL = "no Chromium here: `apt-get install --no-install-recommends chromium` brings Debian's"
STATUS = "#status [role]"  # without Gradio's own timer
PATIENCE = 600_000  # milliseconds until something counts as missing


class Server:
    """`python app.py` in its own process."""

    def __init__(self, log: Path, *flags: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.log = log
        command = [sys.executable, "app.py", f"--server_port={port}", *flags]
        self.process = subprocess.Popen(
            command, cwd=REPOSITORY, env=ENVIRONMENT, stdout=log.open("wb"), stderr=subprocess.STDOUT
        )
        self.url = f"http://127.0.0.1:{port}/"
        for _ in range(PATIENCE // 200):
            if f"open {self.url}" in log.read_text():
                return
            assert self.process.poll() is None, log.read_text()
            time.sleep(0.2)
        self.process.kill()
        raise AssertionError(f"the server does not answer: {log.read_text()}")

    def end(self) -> int:
        """Send SIGTERM, as a service manager does, and return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=PATIENCE / 1000)


@contextmanager
def running_chromium() -> Iterator:
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox refuses root
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


@contextmanager
def open_page() -> Iterator:
    """An empty page of a new browser."""
    with running_chromium() as chromium:
        page = chromium.new_page()
        page.set_default_timeout(PATIENCE)
        yield page


class Visitor:
    """One open page with its own cookies and session."""

    def __init__(self, chromium, url: str, query: str = "", width: int = 1280, height: int = 900) -> None:
        self.context = chromium.new_context(viewport={"width": width, "height": height})
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.requested: list[str] = []
        self.page.on("request", lambda request: self.requested.append(request.url))
        self.page.goto(url + query)
        self.wait_for_status(".", "the page does not load")  # the first status comes after the link is restored

    @property
    def instruction(self):
        return self.page.locator("#instruction").locator("input, textarea")

    @property
    def edits(self):
        return self.page.locator("#gallery .thumbnail-item")

    def wait_for_edits(self, count: int) -> None:
        """The gallery may draw its images after the last status."""
        self.page.wait_for_function(
            "count => document.querySelectorAll('#gallery .thumbnail-item').length === count", arg=count
        )

    @property
    def compared_images(self) -> list[str]:
        return [image.get_attribute("src") for image in self.page.locator("#comparison img").all()]

    def status(self) -> str:
        return self.page.inner_text(STATUS)

    def upload(self, path: Path) -> None:
        """Choose a file and wait for the status of the upload."""
        self.forget_status()
        self.page.locator("#image input[type=file]").set_input_files(path)
        self.wait_for_status(".", "no status of the upload")

    def set(self, name: str, value: object) -> None:
        """Set the number of a slider or field."""
        field = self.page.locator(f"#{name} input[type=number]")
        field.fill(str(value))
        field.press("Tab")

    def open_more_settings(self) -> None:
        """Open the accordion; Gradio gives its fields their first values one frame after it has drawn them."""
        self.page.get_by_text("More settings").click()
        self.page.locator("#resolution input[type=number]").wait_for()
        frames = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))"
        self.page.evaluate(frames)

    def number(self, name: str) -> float:
        return float(self.page.locator(f"#{name} input[type=number]").input_value())

    def choose(self, name: str, option: str) -> None:
        self.page.locator(f"#{name} input").click()
        self.page.get_by_role("option", name=option, exact=True).click()

    def edit(self, instruction: str) -> None:
        """Start an edit and wait until it is done."""
        self.instruction.fill(instruction)
        self.forget_status()
        self.page.click("#run")
        self.wait_until_done()

    def forget_status(self) -> None:
        """Clear the status, so that the one before is not mistaken for the next one."""
        self.page.evaluate("selector => { document.querySelector(selector).innerText = '' }", STATUS)

    def wait_until_done(self) -> None:
        self.wait_for_status(r"^(Done|\d+ images)", "the edit does not end")
        self.page.wait_for_selector("button#run:not([disabled])")

    def wait_for_status(self, pattern: str, problem: str) -> str:
        try:
            self.page.wait_for_function(
                "([selector, pattern]) => new RegExp(pattern).test(document.querySelector(selector)?.innerText ?? '')",
                arg=[STATUS, pattern],
            )
        except Exception as error:
            raise AssertionError(f"{problem}: {self.status()!r}") from error
        return self.status()

    def bytes_of(self, url: str) -> bytes:
        return self.context.request.get(url).body()

    def close(self) -> None:
        self.context.close()
