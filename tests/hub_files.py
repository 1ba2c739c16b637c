"""Repositories for downloads from the server of tests/hub_server.py."""

from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.hub_server import LFS_SUFFIXES, Hub, Repo, connect_client


def serve_folder(hub: Hub, repo_id: str, folder: Path) -> None:
    """Add a public model repository with the files of a folder."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    repo = hub.repos[f"models/{repo_id}"] = Repo("models", repo_id, private=False, blobs=hub.blobs)
    stored = {name: hub.store(path.read_bytes(), path.suffix in LFS_SUFFIXES) for name, path in files.items()}
    repo.commit("all", stored)


def connect_downloads(monkeypatch: pytest.MonkeyPatch, url: str, folder: Path) -> None:
    """`connect_client`, and the template of download URLs, which the client sets when it is imported."""
    connect_client(monkeypatch, url, folder)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
