"""The prompt files that the original InstructPix2Pix publishes, by name: downloaded once, to the cache of datasets."""

from pathlib import Path

import requests
import urllib3

from utils.atomic_files import write_atomically
from utils.errors import InputError
from utils.json_lines import parse_json_object

SITE = "https://instruct-pix2pix.eecs.berkeley.edu"
FILES = ("human-written-prompts.jsonl", "gpt-generated-prompts.jsonl")  # 700 and 451,990 triples
TIMEOUT_SECONDS = 30


def find_published_prompts(name: str) -> Path | None:
    """The file of a published name, with or without .jsonl; None for any other name and for an existing path.

    Raises InputError if the file is not in the cache and cannot be downloaded.
    """
    file = next((file for file in FILES if name in (file, file.removesuffix(".jsonl"))), None)
    if file is None or Path(name).exists():
        return None
    import datasets

    path, url = Path(datasets.config.HF_DATASETS_CACHE) / "instruct-pix2pix" / file, f"{SITE}/{file}"
    if not path.is_file():
        try:
            with requests.get(url, timeout=TIMEOUT_SECONDS) as response:
                response.raise_for_status()
                first_line = response.content.partition(b"\n")[0].decode(errors="replace")
                parse_json_object(first_line, f"{name}: {url} is not a file of prompts: its first line")
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, response.content)
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            raise InputError(
                f"{name}: {url} cannot be downloaded to {path.parent} ({type(error).__name__}). Check the "
                "network, or download it elsewhere and give the path of the file"
            ) from error
    return path
