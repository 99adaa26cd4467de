"""Names to weights: where the files of the released models lie, and fetching them once.

`sources.json` lists the sources as their owners published them; nobody here has been able to ask
the hubs whether they still hold, so a size or sha256 that is not known is not checked. Not for how
a hub is read (hub.py), a checkpoint converted (convert.py) or a folder opened (load.py).
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from m2encoder.errors import CheckpointError, MissingExtraError
from m2encoder.hub import Hub, download_file, hub_name, remove_download
from m2encoder.presets import preset

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemoteFile:
    """A file on a hub; None where it is not known."""

    hub: Hub
    repository: str
    path: str
    revision: str | None = None
    size_bytes: int | None = None
    sha256: str | None = None
    known_from: str = ""
    """Who says that it is there."""

    def __str__(self) -> str:
        return f"{hub_name(self.hub, self.repository, self.revision)}/{self.path}"


@dataclass(frozen=True)
class Release:
    """What a released model is made from; each list in order of preference."""

    parameters: int
    extra_parameters: int
    """Numbers that the released code's model has and never uses; kept beside ours."""
    licence: str
    config: dict[str, Any]
    """Keys of a released configuration that give the sizes; another model is refused by them."""
    checkpoint: tuple[RemoteFile, ...]
    tokenizer: tuple[RemoteFile, ...]


@dataclass(frozen=True)
class ModelInfo:
    """A released model, and whether it has been fetched."""

    name: str
    parameters: int
    extra_parameters: int
    dim: int
    image_size: int
    max_text_length: int
    languages: tuple[str, ...]
    licence: str
    sources: tuple[RemoteFile, ...]
    """Where its checkpoint is, in order of preference."""
    cached: bool
    folder: Path
    """Its model folder in the cache, there or not."""


def read_table(path: Path | None = None) -> dict[str, Release]:
    """Return the released models by name, from `path` or the table that ships."""
    source = path or resources.files("m2encoder") / "sources.json"
    table: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
    tokenizer = tuple(RemoteFile(**file) for file in table["tokenizer"])
    return {
        name: Release(
            parameters=model["parameters"],
            extra_parameters=model["extra_parameters"],
            licence=table["licence"],
            config=model["config"],
            checkpoint=tuple(RemoteFile(**file) for file in model["checkpoint"]),
            tokenizer=tokenizer,
        )
        for name, model in table["models"].items()
    }


def list_models() -> list[ModelInfo]:
    """Return the released models, smallest first. Loads no torch and asks no hub."""
    return [_info(name, release) for name, release in read_table().items()]


def _info(name: str, release: Release) -> ModelInfo:
    shape, folder = preset(name), cache_folder(name)
    return ModelInfo(
        name=name,
        parameters=release.parameters,
        extra_parameters=release.extra_parameters,
        dim=shape.projection_dim,
        image_size=shape.image_size,
        max_text_length=shape.max_text_length,
        languages=("zh", "en"),
        licence=release.licence,
        sources=release.checkpoint,
        cached=_is_complete(folder),
        folder=folder,
    )


def cache_folder(name: str) -> Path:
    """Return where `fetch` keeps a model: under HF_HOME, the setting people have already."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "m2encoder" / name


def fetch(name: str, *, table: dict[str, Release] | None = None) -> Path:
    """Return the model folder of a released model, downloaded and converted at the first call.

    From then on no network is needed. Processes that ask at the same time wait for the first.
    table: other sources than `read_table` gives.
    Raises CheckpointError if the name is unknown or none of its sources can be read (all are
    named), or if the checkpoint is damaged; nothing half-done is left in the cache.
    """
    releases = read_table() if table is None else table
    if name not in releases:
        raise CheckpointError(
            f"{name}: no released model of this name; expected one of {', '.join(releases)}"
        )
    folder = cache_folder(name)
    if _is_complete(folder):
        return folder
    with _only_process(folder):
        if not _is_complete(folder):  # another process may have been quicker
            _fetch(name, releases[name], folder)
    return folder


def _fetch(name: str, release: Release, folder: Path) -> None:
    checkpoint = _first_available(name, release.checkpoint)
    tokenizer = _first_available(name, release.tokenizer)
    from m2encoder.convert import convert_released  # and torch with it

    logger.info("converting %s, once", checkpoint.name)
    with TemporaryDirectory() as temporary:
        config = Path(temporary) / "config.json"
        config.write_text(json.dumps(release.config), encoding="utf-8")
        convert_released(checkpoint, folder, config=config, tokenizer=tokenizer)
    logger.info("%s is in %s; the download is not needed any more: %s", name, folder, checkpoint)


def _is_complete(folder: Path) -> bool:
    return (folder / "config.json").is_file()  # conversion puts a folder there whole or not at all


@contextmanager
def _only_process(folder: Path) -> Iterator[None]:
    """Hold a lock beside `folder`, waiting for other processes. Raises CheckpointError."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder.with_name(folder.name + ".lock"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("another process is fetching %s; waiting for it", folder.name)
            lock.acquire()
    except OSError as error:
        raise CheckpointError(
            f"{folder.parent}: cannot be written ({error.strerror or error}); set HF_HOME to a "
            f"folder that can"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _first_available(name: str, sources: Sequence[RemoteFile]) -> Path:
    """Download from the first source that gives the file. Raises CheckpointError naming all."""
    failures: dict[str, str] = {}  # a missing library is named once, at its first source
    for source in sources:
        try:
            path = download_file(
                source.hub, source.repository, source.path, revision=source.revision
            )
            _check(source, path)
        except MissingExtraError as error:
            failures.setdefault(str(error), f"{source}: {error}")
        except CheckpointError as error:
            failures[str(error)] = str(error)
        else:
            logger.info("read %s", source)
            return path
    reasons = " | ".join(failures.values())
    raise CheckpointError(
        f"{name}: no source gives {sources[0].path}: {reasons} | or download it by hand and run: "
        f"m2enc convert CHECKPOINT {cache_folder(name)} --tokenizer sp.model"
    )


def _check(source: RemoteFile, path: Path) -> None:
    """Raise CheckpointError unless the file is as expected; a wrong one is deleted."""
    size, wrong = path.stat().st_size, ""
    if source.size_bytes is not None and size != source.size_bytes:
        wrong = f"has {size:,} bytes, expected {source.size_bytes:,}"
    elif source.sha256 is not None and (found := sha256_of(path)) != source.sha256:
        wrong = f"has sha256 {found}, expected {source.sha256}"
    if wrong:
        remove_download(path)
        raise CheckpointError(f"{source} {wrong}; deleted, the next try downloads it anew")


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
