"""app.py as a Space on the Hugging Face Hub: its files, its front matter, and the upload.

README.md   space.py (starts app.py with the flags)   app.py   utils/   requirements.txt   models/ (local models)
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, SpaceCardData, get_token

from utils.errors import InputError
from utils.hub import check_push_rights, failure_reason, files_to_publish, retry_upload, validate_card
from utils.hub_names import is_hub_id
from utils.licences import is_hub_licence, read_license_fields

REPOSITORY = Path(__file__).resolve().parents[2]
MAX_BYTES = 1_000_000_000  # that the Hub allows in the repository of a Space
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "huggingface_hub", "safetensors", "numpy")
PACKAGES += ("pillow", "opencv-python-headless", "Jinja2", "PyYAML", "requests", "tqdm", "gradio")
START = '''"""Starts the page of app.py in this Space. Written by app.py --publish_space."""

import sys

from app import main

sys.exit(main({flags}))
'''


@dataclass(frozen=True)
class SpaceOptions:
    """name: of the Space, with or without its owner; models: folders, files or Hub ids, the first one selected.

    adapters, vae, single_file_config: as the flags of app.py; settings: its other flags, as they are given to it.
    toy: the editor that app.py shows when no model is named; examples: images of the page. All paths are local.
    """

    name: str
    models: Sequence[str]
    adapters: Sequence[str] = ()
    vae: str | None = None
    single_file_config: str | None = None
    settings: Sequence[str] = ()
    toy: Path | None = None
    examples: Sequence[Path] = ()
    private: bool = False
    hardware: str | None = None
    token: str | None = None

    @property
    def shown(self) -> list[str]:
        return list(self.models) or [str(self.toy)]


def publish_space(options: SpaceOptions, waits: Sequence[float] = (5, 20, 60)) -> str:
    """Create or update the Space, and return its address.

    Everything is sent in one commit, which also deletes files of a former version. waits: seconds between attempts.
    Raises InputError.
    """
    sent = _files_of_models(options)
    _check_size(sent)
    login = options.token or get_token()
    repo_id = check_push_rights(options.name, options.token, options.name, options.private, repo_type="space")
    texts = {
        "README.md": make_space_card(options, repo_id),
        "space.py": START.format(flags=json.dumps(space_flags(options), ensure_ascii=True)),
        "requirements.txt": space_requirements(),
    }
    programs = [REPOSITORY / "app.py", REPOSITORY / "LICENSE", *options.examples, *_package_files()]
    files = texts | sent | {path.relative_to(REPOSITORY).as_posix(): path for path in programs}
    api = HfApi(token=login)

    def send() -> None:
        validate_card(texts["README.md"], "space", "the Space")
        stale = set(api.list_repo_files(repo_id, repo_type="space")) - files.keys() - {".gitattributes"}
        operations: list[Any] = [CommitOperationDelete(path) for path in sorted(stale)]
        operations += [
            CommitOperationAdd(path, content.encode() if isinstance(content, str) else content)
            for path, content in sorted(files.items())
        ]
        api.create_commit(repo_id, operations, repo_type="space", commit_message="Page of the editor")

    retry_upload(send, repo_id, login, waits, "Nothing of it was changed: run the same command again")
    if options.hardware:
        _request_hardware(api, repo_id, options.hardware, login)
    return f"{api.endpoint}/spaces/{repo_id}"


def space_flags(options: SpaceOptions) -> list[str]:
    """The flags of app.py in the Space, with the places of local models there."""
    flags = ["--server_name=0.0.0.0"]  # the port of a Space is 7860, the first that app.py tries
    flags += [f"--model={_place_of(model)}" for model in options.models]
    flags += ["--lora", *map(_place_of, options.adapters)] if options.adapters else []
    single = {"vae": options.vae, "single_file_config": options.single_file_config}
    return flags + [f"--{name}={_place_of(value)}" for name, value in single.items() if value] + list(options.settings)


def make_space_card(options: SpaceOptions, repo_id: str) -> str:
    """README.md of the Space, with the front matter from which the Hub builds it."""
    names = options.shown
    fields = {} if is_hub_id(names[0]) else read_license_fields(names[0])
    data = SpaceCardData(
        title=re.sub(r"[-_.]+", " ", repo_id.partition("/")[2]).strip().capitalize() or "Editor",
        emoji="🖼️",
        colorFrom="blue",
        colorTo="green",
        sdk="gradio",
        sdk_version=version("gradio"),
        python_version="3.11",
        app_file="space.py",
        short_description="Change a photo by an instruction",
        models=[name for name in [*names, *options.adapters] if is_hub_id(name)] or None,
        license=fields.get("license") if is_hub_licence(fields.get("license", "")) else None,
    )
    shown = ", ".join(f"`{name if is_hub_id(name) else Path(name).name}`" for name in names)
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {data.title}\n\nUpload a photo and describe the change. Editor: {shown}.\n\n"
        "The page is `app.py`, started by `space.py`. On the free hardware, without a GPU, an edit with a model of the "
        "size of Stable Diffusion takes minutes; choose a GPU in the settings of the Space.\n"
    )


def space_requirements() -> str:
    """The pinned requirements of the page alone."""
    lines = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = {line.partition("==")[0]: line.partition("#")[0].strip() for line in lines if "==" in line}
    return "".join(f"{pins[name]}\n" for name in PACKAGES)


def _package_files() -> list[Path]:
    files = [path for path in sorted((REPOSITORY / "utils").rglob("*")) if path.is_file()]
    return [path for path in files if "__pycache__" not in path.parts and not path.name.startswith(".")]


def _files_of_models(options: SpaceOptions) -> dict[str, Path]:
    """Place in the Space -> local file, of all models that are not on the Hub. Raises InputError for equal names."""
    given = [*options.models, *options.adapters, options.vae, options.single_file_config]
    places = [(Path(one), _place_of(one)) for one in given if one and not is_hub_id(one)]
    if not options.models:
        places.append((options.toy, options.toy.relative_to(REPOSITORY).as_posix()))
    files: dict[str, Path] = {}
    taken: dict[str, Path] = {}
    for path, place in places:
        if taken.setdefault(place, path.resolve()) != path.resolve():
            raise InputError(
                f"{taken[place]} and {path} have the same name, and would overwrite each other: rename one"
            )
        inside = files_to_publish(path) if path.is_dir() else []
        files |= {f"{place}/{name}": path / name for name in inside} if path.is_dir() else {place: path}
    return files


def _place_of(model: str) -> str:
    return model if is_hub_id(model) else f"models/{Path(model).resolve().name}"


def _check_size(files: Mapping[str, Path]) -> None:
    size = sum(path.stat().st_size for path in files.values())
    if size > MAX_BYTES:
        raise InputError(
            f"the local models have {size / 1e9:.1f} GB, and a Space may have {MAX_BYTES / 1e9:g} GB: publish them as "
            "models (`hf upload NAME FOLDER`, or --push_to_hub of the training scripts) and give their Hub ids"
        )


def _request_hardware(api: HfApi, repo_id: str, hardware: str, login: str | None) -> None:
    try:
        api.request_space_hardware(repo_id, hardware)
    except Exception as error:  # the Space is there and works; whatever the Hub says is the message
        raise InputError(
            f"{repo_id} is published, but the Hub refused --space_hardware {hardware}: choose its hardware in its "
            f"settings ({failure_reason(error, login)})"
        ) from None
