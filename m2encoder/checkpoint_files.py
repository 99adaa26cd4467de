"""The files of a training checkpoint: shards, JSON, and a manifest with the hash of each.

The shards are safetensors as torch.distributed.checkpoint writes and reads them for Hugging Face
(HuggingFaceStorageReader opens a checkpoint folder). Not for what is in them
(checkpoint_state.py) nor when they are written (checkpoint.py).
"""

import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from m2encoder.errors import CheckpointError
from m2encoder.shards import sha256_of

FORMAT = 2
MANIFEST, PROGRESS = "manifest.json", "progress.json"
DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int
    """Optimizer steps done."""
    samples: int
    """Pairs consumed, the whole state of the stream."""
    dropped: int
    """Of these, pairs that could not be used."""
    seconds: float
    """Training time so far, evaluation left out."""
    steps_per_epoch: int
    """Of the data this run trains on; another number means other data."""
    format: int = FORMAT


class Piece(NamedTuple):
    """A box of a tensor: what one rank holds of it."""

    tensor: Tensor  # on the CPU, contiguous
    offsets: tuple[int, ...]  # where its first element stands in the whole


class FileFacts(NamedTuple):
    """What the manifest says of a file."""

    bytes: int
    sha256: str


def write_shard(path: Path, pieces: Mapping[str, Piece]) -> FileFacts:
    """Write one safetensors file and have it on the disk; raises OSError.

    torch's own writer (HuggingFaceStorageWriter) first builds the whole file in memory, twice,
    under Python's lock, so that a training thread beside it stands still. This one writes and
    hashes each tensor from where it lies.
    """
    header: dict[str, Any] = {
        "__metadata__": {
            "DCP_SHARDING_INFO": json.dumps(
                {name: {"saved_offsets": piece.offsets} for name, piece in pieces.items()}
            ),
            "DCP_VERSION": "1.0",
            "format": "pt",
        }
    }
    end = 0
    for name, (tensor, _) in pieces.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors start at a multiple of 8
    tensors = (_bytes_of(piece.tensor) for piece in pieces.values())
    return _write(path, [struct.pack("<Q", len(encoded)), encoded], tensors)


def write_json(path: Path, content: Any) -> FileFacts:
    """Write a JSON file and have it on the disk; raises OSError."""
    return _write(path, [(json.dumps(content, indent=2) + "\n").encode()])


def write_manifest(folder: Path, files: Mapping[str, FileFacts]) -> None:
    """Write manifest.json: bytes and sha256 of each file by name; raises OSError."""
    listed = {name: facts._asdict() for name, facts in sorted(files.items())}
    write_json(folder / MANIFEST, {"format": FORMAT, "files": listed})


def write_progress(folder: Path, progress: Progress) -> FileFacts:
    """Write progress.json; raises OSError."""
    return write_json(folder / PROGRESS, asdict(progress))


def read_progress(path: Path) -> Progress:
    """Return the progress of the checkpoint `path`; CheckpointError where it cannot be read."""
    raw = _read_json(path, PROGRESS)
    if raw.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: checkpoint format {raw.get('format')}, this version reads {FORMAT}; "
            f"go on with the version that wrote it, or choose another --out"
        )
    try:
        return Progress(**raw)
    except TypeError as error:
        raise damaged(path, f"{PROGRESS}: {error}") from None


def verify_files(path: Path, *, share: int = 0, shares: int = 1) -> None:
    """Compare every `shares`-th file of a checkpoint, from `share` on, with its manifest.

    The number and sizes of all are compared. Raises CheckpointError naming the first that differs.
    """
    listed = _read_json(path, MANIFEST).get("files")
    try:
        facts = {name: FileFacts(**found) for name, found in listed.items()}  # pyright: ignore[reportOptionalMemberAccess]
    except (TypeError, AttributeError) as error:
        raise damaged(path, f"{MANIFEST}: {error}") from None
    for name, expected in facts.items():
        try:
            found = (path / name).stat().st_size
        except OSError as error:
            raise damaged(path, f"{name}: {error.strerror or error}") from None
        if found != expected.bytes:
            raise damaged(path, f"{name}: {found} bytes, expected {expected.bytes}")
    unknown = {file.name for file in path.glob("*.safetensors")} - facts.keys()
    if unknown:
        raise damaged(path, f"{min(unknown)} is not in {MANIFEST}")
    for name in sorted(facts)[share::shares]:
        try:
            digest = sha256_of(path / name)
        except OSError as error:
            raise damaged(path, f"{name}: {error.strerror or error}") from None
        if digest != facts[name].sha256:
            raise damaged(path, f"{name}: its content is not what was written (sha256 differs)")


def damaged(path: Path, reason: str) -> CheckpointError:
    """Return the error that says a checkpoint cannot be read, and what to do."""
    return CheckpointError(
        f"{path}: damaged checkpoint ({reason}); delete it to go on from an earlier one"
    )


def sync_folder(folder: Path) -> None:
    """Have a folder's names on the disk, where the file system can do that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(
    path: Path, start: Iterable[bytes], rest: Iterable[memoryview] | None = None
) -> FileFacts:
    digest, count = sha256(), 0
    with path.open("wb") as file:
        for part in _chained(start, rest):
            file.write(part)
            digest.update(part)
            count += len(part)
        file.flush()
        os.fsync(file.fileno())
    return FileFacts(count, digest.hexdigest())


def _chained(
    start: Iterable[bytes], rest: Iterable[memoryview] | None
) -> Iterator[bytes | memoryview]:
    yield from start
    yield from rest or ()


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data  # no copy


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads((path / name).read_text())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise damaged(path, f"{name}: {reason}") from None
    if not isinstance(found, dict):
        raise damaged(path, f"{name} holds a {type(found).__name__}, expected an object")
    return found
