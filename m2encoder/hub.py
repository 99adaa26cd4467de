"""Files and snapshots from the Hugging Face Hub and from ModelScope, through their own libraries.

So their cache, mirror, token, offline and progress-bar settings hold, and there are none of ours.
Not for which files a released model consists of (sources.py).
"""

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from m2encoder.errors import CheckpointError, ConfigError, MissingExtraError

Hub = Literal["huggingface", "modelscope"]
PREFIXES: dict[str, Hub] = {"hf": "huggingface", "modelscope": "modelscope"}

NEEDED = ["*.json", "*.safetensors", "*.model", "*.txt", "README.md"]
"""What opening a model can need: no code, no pickle, no other frameworks' weights."""
PICKLED = ["*pytorch_model*.bin"]
"""Weights of repositories from before safetensors; transformers reads them weights-only."""

MAX_REASON = 200
"""Characters of a library's message that are shown."""


def download_file(hub: Hub, repository: str, path: str, *, revision: str | None = None) -> Path:
    """Return where one file of a repository lies in the hub library's cache, downloaded if needed.

    A connection that drops goes on where it stopped. After a process was stopped, ModelScope's
    library goes on too (1.40), while Hugging Face's (2.4) begins the file again.
    Raises CheckpointError saying why the file cannot be had, MissingExtraError if the hub's library
    is not installed.
    """
    # As a snapshot of one file: unlike a single download, it checks the repository first and so
    # does not spend half a minute on a network that is not there.
    file = _snapshot(hub, repository, revision, [path]) / path
    if not file.is_file():
        raise CheckpointError(f"{hub_name(hub, repository, revision)}: has no file {path}")
    return file


def fetch_hub(spec: str) -> Path:
    """Return a downloaded copy of `hf:ORG/NAME` or `modelscope:ORG/NAME`, `@REVISION` if wanted.

    Only NEEDED files, and PICKLED ones where there is no safetensors file.
    Raises ConfigError if `spec` is none, CheckpointError saying why it cannot be had,
    MissingExtraError if the hub's library is not installed.
    """
    prefix, _, rest = spec.partition(":")
    repository, _, revision = rest.partition("@")
    if prefix not in PREFIXES or not repository:
        raise ConfigError(f"{spec!r} is no hub name, expected hf:ORG/NAME or modelscope:ORG/NAME")
    folder = _snapshot(PREFIXES[prefix], repository, revision or None, NEEDED)
    if not any(folder.rglob("*.safetensors")):
        folder = _snapshot(PREFIXES[prefix], repository, revision or None, NEEDED + PICKLED)
    return folder


def _snapshot(hub: Hub, repository: str, revision: str | None, patterns: list[str]) -> Path:
    if hub == "huggingface":
        from huggingface_hub import snapshot_download
    elif find_spec("modelscope") is None:
        raise MissingExtraError("modelscope", extra="modelscope")
    else:
        from modelscope.hub.snapshot_download import (  # pyright: ignore[reportMissingImports]
            snapshot_download,
        )
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except Exception as error:  # their own errors, HTTP's, the system's and ValueErrors
        where = hub_name(hub, repository, revision)
        raise CheckpointError(f"{where}: {_reason(error)}") from error


def hub_name(hub: Hub, repository: str, revision: str | None = None) -> str:
    """Return what `fetch_hub` takes: `hf:ORG/NAME@REVISION`."""
    prefix = next(prefix for prefix, name in PREFIXES.items() if name == hub)
    return f"{prefix}:{repository}" + (f"@{revision}" if revision else "")


def remove_download(path: Path) -> None:
    """Delete a downloaded file from the hub library's cache, so that the next call fetches it."""
    blob = path.resolve()  # Hugging Face's cache holds links to the files
    path.unlink(missing_ok=True)
    blob.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    """Say in a few words what went wrong; by class name, as the libraries' versions differ."""
    chain = list(_causes(error))
    names = {kind.__name__ for e in chain for kind in type(e).__mro__}
    statuses = [getattr(getattr(e, "response", None), "status_code", None) for e in chain]
    status = next(filter(None, statuses), None)
    if "OfflineModeIsEnabled" in names:
        return "not downloaded yet, and HF_HUB_OFFLINE keeps it from being; unset that once"
    if "GatedRepoError" in names or status == 403:
        return "access refused, it is gated or private; ask for access on its page and log in"
    if "RevisionNotFoundError" in names:
        return "no such revision; check what follows the @"
    if "RemoteEntryNotFoundError" in names:
        return "no such file in the repository"
    if status in (401, 404):
        return "no such repository or file, or it is private; check the name, or log in"
    if status is not None:
        return f"the server answered {status}; try again later"
    text = next((str(e).strip() for e in reversed(chain) if str(e).strip()), type(error).__name__)
    system = re.search(r"\[Errno -?\d+\] [\w ,.]+", text)  # the heart of a long HTTP message
    shown = system[0] if system else text.splitlines()[0][:MAX_REASON]
    return f"cannot be downloaded ({shown}); check the network and the name"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
