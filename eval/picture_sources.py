"""Pictures in the containers that data sets come in: base64 tables, CIFAR's binary files.

Each has what m2encoder.pictures.Pictures asks for. Not for tars (foreign_tars.py).
"""

import base64
import binascii
import hashlib
import io
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from m2encoder.errors import DataError


class TsvPictures:
    """CN-CLIP's and MUGE's `valid_imgs.tsv`: a line for each picture, its id, a tab, base64.

    Opening reads the file once for the ids and remembers where lines begin. Raises DataError on a
    line without a tab, an id that comes twice, or no line at all.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ids: list[str] = []
        self.starts = array("q")  # of the base64 part, in bytes
        self.sizes = array("q")
        try:
            self._scan()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from None
        self.rows = {name: row for row, name in enumerate(self.ids)}
        if len(self.rows) != len(self.ids):
            seen: set[str] = set()
            twice = next(name for name in self.ids if name in seen or seen.add(name))
            raise DataError(f"{path}: picture {twice} is there twice; ids must differ")
        if not self.ids:
            raise DataError(f"{path}: no pictures, expected lines of id, tab and base64")

    def _scan(self) -> None:
        offset = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                name, tab, content = line.rstrip(b"\r\n").partition(b"\t")
                if line.strip():
                    if not tab or not name:
                        raise DataError(
                            f"{self.path}, line {number}: no tab, expected an id, a tab and base64"
                        )
                    self.ids.append(name.decode("utf-8", "replace"))
                    self.starts.append(offset + len(name) + 1)
                    self.sizes.append(len(content))
                offset += len(line)

    def __len__(self) -> int:
        return len(self.ids)

    def name(self, position: int) -> str:
        """The picture's id."""
        return self.ids[position]

    def read(self, position: int) -> bytes:
        """Return its encoded bytes. Raises DataError if they are no base64."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.starts[position])
                text = file.read(self.sizes[position])
            # both alphabets are in use: CN-CLIP writes the plain one, reads the one for URLs
            return base64.b64decode(text.translate(bytes.maketrans(b"-_", b"+/")), validate=True)
        except binascii.Error:
            raise DataError(
                f"{self.path}: picture {self.ids[position]} is not base64; write it again"
            ) from None
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror})") from None

    def content_key(self) -> str:
        """Return a hash of ids, places, and the file's size and time; the pixels are not read."""
        return _file_key("tsv", [self.path], [*self.ids, *map(str, self.starts)])


class CifarPictures:
    """CIFAR's "binary version": records of label bytes and 3 x 32 x 32 colours, in plain files.

    label_bytes: 1 for CIFAR-10, 2 for CIFAR-100, whose second is the fine label. Raises DataError
    if a file is missing or no whole number of records.
    """

    SIZE_PX = 32

    def __init__(self, paths: Sequence[Path], *, label_bytes: int) -> None:
        self.paths, self.label_bytes = list(paths), label_bytes
        self.record_bytes = label_bytes + 3 * self.SIZE_PX**2
        self.counts: list[int] = []
        for path in self.paths:
            size = path.stat().st_size
            if not size or size % self.record_bytes:
                raise DataError(
                    f"{path}: {size:,} bytes, expected a multiple of {self.record_bytes:,}; is it "
                    f"CIFAR's binary version, complete?"
                )
            self.counts.append(size // self.record_bytes)

    def __len__(self) -> int:
        return sum(self.counts)

    def _find(self, position: int) -> tuple[Path, int]:
        if position < 0:
            raise IndexError(position)
        for path, count in zip(self.paths, self.counts, strict=True):
            if position < count:
                return path, position
            position -= count
        raise IndexError(position)

    def name(self, position: int) -> str:
        """The file's name and the record's number in it."""
        path, row = self._find(position)
        return f"{path.stem}-{row:05d}"

    def read(self, position: int) -> bytes:
        """Return the picture as PNG."""
        path, row = self._find(position)
        with path.open("rb") as file:
            file.seek(row * self.record_bytes + self.label_bytes)
            raw = file.read(3 * self.SIZE_PX**2)
        pixels = np.frombuffer(raw, np.uint8).reshape(3, self.SIZE_PX, self.SIZE_PX)
        out = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(out, "PNG")
        return out.getvalue()

    def labels(self) -> NDArray[np.int64]:
        """Return (N,) int64, the class of each picture."""
        columns = []
        for path in self.paths:
            records = np.fromfile(path, np.uint8).reshape(-1, self.record_bytes)
            columns.append(records[:, self.label_bytes - 1].astype(np.int64))
        return np.concatenate(columns)

    def content_key(self) -> str:
        """Return a hash of the files' names, sizes and times; the pixels are not read."""
        return _file_key("cifar", self.paths, [str(self.label_bytes)])


def _file_key(kind: str, paths: Sequence[Path], parts: Sequence[str]) -> str:
    digest = hashlib.sha256(kind.encode())
    for path in paths:
        state = path.stat()
        digest.update(f"{path.name}\0{state.st_size}\0{state.st_mtime_ns}\n".encode())
    for part in parts:
        digest.update(f"{len(part)}\0{part}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
