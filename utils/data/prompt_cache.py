"""The embeddings of all prompts of a run, encoded once and kept in memory-mapped files that ranks and runs share.

CACHE_DIR/prompts-KEY/NAME.safetensors, with a KEY for each tokenizer, text encoder, dtype and batch size, holds the
embeddings of up to `PROMPTS_PER_SHARD` prompts: `hidden` (rows, 77, D), and `pooled` (rows, P) for SDXL. The metadata
lists the truncated prompts. NAME is a digest of the prompts in their order, so an existing file is always the right
one, and its bits do not depend on what else was encoded. The null prompt has a file of its own.

Main memory holds 16 bytes of each prompt and its row: about 0.15 GB for a million prompts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from utils.atomic_files import UNFINISHED, flush_to_disk, remove_unfinished
from utils.errors import InputError
from utils.models.conditioning import PromptEmbeds, PromptEncoder, concatenate

logger = logging.getLogger(__name__)
PROMPTS_PER_SHARD = 1024  # a multiple of the batch size; a killed run repeats at most so many prompts of each process
RESIDENT_BYTES = 256 * 2**20  # fewer embeddings are kept on the device
FREE_SHARE = 0.9  # of the free disk that the files may fill; checkpoints need the rest
OPEN_SHARDS = 256
DAY = 24 * 3600.0


class StoredPrompts:
    """Reads prompt embeddings: from the device if there are few, else from the files."""

    def __init__(self, paths: list[Path], rows: dict[bytes, int], device: torch.device, num_bytes: int) -> None:
        """rows: the digest of each prompt -> its row, counted over all files. num_bytes: of all embeddings."""
        self._paths, self._rows, self._device = paths, rows, device
        self._resident = None
        if num_bytes <= RESIDENT_BYTES:
            self._resident = concatenate([_read_shard(path) for path in paths]).to(device)

    def __call__(self, prompts: list[str]) -> PromptEmbeds | None:
        """Embeddings of B prompts on the device, which nothing waits for; None if one of them is not stored."""
        rows = [self._rows.get(_digest(prompt), -1) for prompt in prompts]
        if min(rows) < 0:
            return None
        if self._resident is None:
            return self._gather(rows).to(self._device, non_blocking=True)
        indices = torch.tensor(rows, pin_memory=self._is_pinned).to(self._device, non_blocking=True)
        return PromptEmbeds(*(value if value is None else value.index_select(0, indices) for value in self._resident))

    @property
    def _is_pinned(self) -> bool:
        """Whether copies start in pinned memory: from other memory, they would wait for the GPU's work."""
        return self._device.type == "cuda"

    def _gather(self, rows: list[int]) -> PromptEmbeds:
        """Copy rows of the mapped files into one batch in main memory."""
        stored = [
            _open_shard(self._paths[row // PROMPTS_PER_SHARD]).rows(slice(place := row % PROMPTS_PER_SHARD, place + 1))
            for row in rows
        ]
        batch = []
        for values in zip(*stored, strict=True):
            if values[0] is not None:
                shape = (len(rows), *values[0].shape[1:])
                target = torch.empty(shape, dtype=values[0].dtype, pin_memory=self._is_pinned)
                torch.cat(values, out=target)
                batch.append(target)
        return PromptEmbeds(*batch)


def _read_shard(path: Path) -> PromptEmbeds:
    """The embeddings of a file as tensors that are mapped, not read."""
    with safe_open(path, framework="pt") as shard:
        stored = shard.keys()
        return PromptEmbeds(*(shard.get_tensor(name) for name in PromptEmbeds._fields if name in stored))


_open_shard = lru_cache(maxsize=OPEN_SHARDS)(_read_shard)


def store_prompts(
    accelerator: Accelerator, cache_dir: Path, list_prompts: Callable[[], Iterable[str]], encoder: PromptEncoder
) -> bool:
    """Encode the prompts that are not stored yet, split among the processes; `encoder` then reads them all.

    list_prompts: all prompts of the run, the same at every call and in every process; repetitions are allowed. The text
    encoders are moved to the device of `encoder` only if something is missing, and are on the CPU afterwards. Returns
    False, with a warning, if the disk has no room.
    """
    rows, names = _index(list_prompts())
    folder = cache_dir / f"prompts-{_digest_encoder(encoder)}"
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder, older_than=DAY)  # of killed runs; younger ones may belong to a run beside this one
    paths = [folder / f"{name}.safetensors" for name in names]
    null_path = folder / f"{_name_of(_digest(''))}.safetensors"
    if accelerator.is_main_process:
        _remove_damaged([*paths, null_path])

    def write_missing(shards: Iterable[int]) -> None:
        missing = {shard for shard in shards if not paths[shard].exists()}
        if missing:
            _write_shards(paths, _prompts_of(list_prompts(), rows, missing), encoder, accelerator.is_main_process)

    has_room = _has_room(folder, sum(not path.exists() for path in paths) * PROMPTS_PER_SHARD, len(rows), encoder)
    accelerator.wait_for_everyone()  # every process looks at the disk before one writes
    if has_room:
        write_missing(range(accelerator.process_index, len(paths), accelerator.num_processes))
        _write_shard(null_path, [""], encoder)
    accelerator.wait_for_everyone()
    if not has_room:
        return False
    write_missing(range(len(paths)))  # those of other machines, where the folder is not shared
    for text_encoder in encoder.text_encoders:
        text_encoder.to("cpu")
    encoder.truncated.update(*map(_read_truncated, paths))
    encoder.null_embeds = encoder.as_null(_read_shard(null_path).to(encoder.device))
    encoder.stored = StoredPrompts(paths, rows, encoder.device, len(rows) * _row_bytes(encoder)) if paths else None
    return True


def _index(prompts: Iterable[str]) -> tuple[dict[bytes, int], list[str]]:
    """The row of each distinct prompt, by digest, in the order of first appearance; and the name of each file."""
    rows: dict[bytes, int] = {}
    for prompt in prompts:
        rows.setdefault(_digest(prompt), len(rows))
    digests = b"".join(rows)
    step = 16 * PROMPTS_PER_SHARD
    return rows, [_name_of(digests[start : start + step]) for start in range(0, len(digests), step)]


def _digest(prompt: str) -> bytes:
    return hashlib.blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _name_of(digests: bytes) -> str:
    return hashlib.sha256(digests).hexdigest()[:32]


def _prompts_of(prompts: Iterable[str], rows: dict[bytes, int], shards: set[int]) -> Iterator[tuple[int, list[str]]]:
    """The distinct prompts of each of the shards; one shard is in memory at a time."""
    texts: list[str] = []
    next_row = 0
    for prompt in prompts:
        if rows[_digest(prompt)] != next_row:
            continue
        next_row += 1
        texts.append(prompt)
        if len(texts) == PROMPTS_PER_SHARD or next_row == len(rows):
            if (shard := (next_row - 1) // PROMPTS_PER_SHARD) in shards:
                yield shard, texts
            texts = []
            if next_row == len(rows):
                return


def _remove_damaged(paths: list[Path]) -> None:
    """Remove files that a full or failing disk cut off, so that their prompts are encoded again."""
    for path in filter(Path.exists, paths):
        try:
            _read_truncated(path)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError):
            logger.warning("%s is damaged: its prompts are encoded again", path)
            path.unlink(missing_ok=True)


def _read_truncated(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as shard:
        return json.loads(shard.metadata()["truncated"])


def _write_shards(
    paths: list[Path], shards: Iterator[tuple[int, list[str]]], encoder: PromptEncoder, shows_progress: bool
) -> None:
    with tqdm(desc="encoding prompts", unit="prompt", disable=not shows_progress) as bar:
        for shard, prompts in shards:
            _write_shard(paths[shard], prompts, encoder)
            bar.update(len(prompts))


def _write_shard(path: Path, prompts: list[str], encoder: PromptEncoder) -> None:
    """Encode the prompts and write the file, unless another run wrote it meanwhile."""
    if path.exists():
        return
    for text_encoder in encoder.text_encoders:
        text_encoder.to(encoder.device)
    size = encoder.batch_size
    batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    embeds = concatenate([encoder.encode(batch).to("cpu") for batch in batches])
    tensors = {name: value.contiguous() for name, value in embeds._asdict().items() if value is not None}
    truncated = [prompt for prompt in prompts if prompt in encoder.truncated]
    unfinished = path.with_name(f"{UNFINISHED}{secrets.token_hex(8)}-{path.name}")  # another run may share the folder
    try:
        save_file(tensors, unfinished, metadata={"truncated": json.dumps(truncated)})
        flush_to_disk(unfinished)
        unfinished.replace(path)
    except (OSError, SafetensorError) as error:
        unfinished.unlink(missing_ok=True)
        raise InputError(
            f"{path}, embeddings of the prompts, could not be written (a full disk?): {error}. Make room, or give a "
            "--latent_cache_dir on another disk, and start again"
        ) from error


def _row_bytes(encoder: PromptEncoder) -> int:
    """Bytes of the embeddings of one prompt."""
    configs = [text_encoder.config for text_encoder in encoder.text_encoders]
    values = encoder.tokenizers[0].model_max_length * sum(config.hidden_size for config in configs)
    values += configs[-1].projection_dim if len(configs) > 1 else 0
    return values * encoder.text_encoders[0].dtype.itemsize


def _has_room(folder: Path, num_missing: int, num_prompts: int, encoder: PromptEncoder) -> bool:
    """Whether the missing prompts fit on the disk; if not, says what to do."""
    needed, free = min(num_missing, num_prompts) * _row_bytes(encoder), shutil.disk_usage(folder).free
    if needed <= FREE_SHARE * free:
        return True
    logger.warning(
        "the embeddings of %d prompts need %.1f GB, and %s has %.1f GB free: they are not stored but encoded again in "
        "each run; make room, or give a --latent_cache_dir on another disk",
        num_prompts,
        needed / 1e9,
        folder,
        free / 1e9,
    )
    return False


def _describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Everything that the tokens of a prompt depend on."""
    described = [type(tokenizer).__name__, tokenizer.model_max_length]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).iterdir()):
            content = json.loads(path.read_text()) if path.suffix == ".json" else path.read_text()
            if isinstance(content, dict):  # the last call sets these two
                content = {key: value for key, value in content.items() if key not in ("padding", "truncation")}
            described.append([path.name, content])
    return json.dumps(described, sort_keys=True)


def _digest_encoder(encoder: PromptEncoder) -> str:
    """A digest of everything but the prompts that the embeddings depend on."""
    digest = hashlib.sha256(f"1 {encoder.batch_size} {encoder.device.type}".encode())
    for tokenizer in encoder.tokenizers:
        digest.update(_describe_tokenizer(tokenizer).encode())
    for text_encoder in encoder.text_encoders:
        config = text_encoder.config.to_dict()
        for key in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
            config.pop(key, None)
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
        for name, value in text_encoder.state_dict().items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
