"""Perceptual hashes: find copies of a picture that were encoded again, scaled or slightly cropped.

Not for other pictures of the same thing (embeddings find those), nor for texts (hashing.py).
"""

# B pictures   V crops before hashing   S side of a small copy   K values of a hash
# C crops of a comparison   H frequencies above those of a hash

import hashlib
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import faiss
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from m2encoder.errors import DataError
from m2encoder.images import ImageSource, open_image

SIDE_PX = 48
"""Side of the small copy that everything is computed from."""
GRID = 32
"""Samples along a side that are transformed, as in pHash."""
LOW, LOW_CHROMA, HIGH = 8, 4, 20
"""Frequencies along a side: of a hash, of its colour part, of the comparison of two candidates."""
INSETS = (0.0, 0.02, 0.04)
"""Shares cut off at every side before hashing, to find cropped copies."""
MIN_COSINE = 0.92
"""Hashes less alike are not compared further."""
MIN_CONTRAST = 2.0
"""Pictures with less (RMS, of 255 levels) say too little: only copies of the file are found."""
MAX_RESIDUAL = 0.28
MAX_LOW_RESIDUAL = 0.3
MAX_SHIFT, MAX_SHIFT_SMOOTH, MAX_LOCAL = 28.0, 10.0, 24.0
"""Levels of 255 by which some 64th of the picture may differ after alignment: the mean of a colour,
the same where there is no detail to go by, and the brightness (RMS)."""
NOISE = 2.0
"""RMS of the details, in levels, below which they are mostly noise."""
NEIGHBOURS = 64
"""Hashes looked at for each picture; in a crowd of look-alikes the nearest are compared."""

_STEPS = (0.0, 0.015, 0.03, 0.045)
Small = NDArray[np.uint8]
Ends = tuple[float, float]
"""Shares cut off at both ends of a side."""
EVEN: tuple[Ends, ...] = tuple((i, i) for i in (0.0, 0.01, 0.02, 0.03, 0.04, 0.05))
UNEVEN: tuple[Ends, ...] = tuple((i, j) for i in _STEPS for j in _STEPS)


class Thumbprint(NamedTuple):
    """What is kept of a picture: enough to recognise it and its copies."""

    sha256: bytes
    """Of the encoded file."""
    small: Small
    """(S, S, 3) RGB, squashed to a square."""


class Copy(NamedTuple):
    """A known picture that another one is a copy of."""

    row: int
    kind: Literal["file", "copy"]
    """The same bytes, or the same picture in other bytes."""
    residual: float
    """How much of the details differs, 0 for equal ones; see `copy_residual`."""


def thumbprint(source: ImageSource, *, name: str | None = None) -> Thumbprint:
    """Return a picture's thumbprint. Raises DataError if it cannot be read.

    Turned upright by EXIF, as by whoever encodes a picture again without its EXIF data. Of a
    picture that is decoded already, the pixels stand for the file.
    """
    if isinstance(source, str | os.PathLike):
        name = name or str(source)
        try:
            source = Path(source).read_bytes()
        except OSError as error:
            reason = (error.strerror or "refused").lower()
            raise DataError(f"{name}: cannot be read ({reason}), expected a picture file") from None
    picture = open_image(source, name=name, upright=True)
    content = source if isinstance(source, bytes) else np.asarray(picture).tobytes()
    return Thumbprint(hashlib.sha256(content).digest(), small_copy(picture))


def small_copy(picture: Image.Image) -> Small:
    """Return an RGB picture squashed to (S, S, 3)."""
    size = (SIDE_PX, SIDE_PX)
    return np.array(picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0))


def perceptual_hashes(small_BSS3: Small) -> NDArray[np.float32]:
    """Return (B, V, K): per small copy a unit vector for each of INSETS; zeros if it is plain.

    The lowest frequencies of its discrete cosine transform, the mean left out: 8 x 8 of brightness,
    4 x 4 of each colour difference. That is pHash (C. Zauner, "Implementation and Benchmarking of
    Perceptual Image Hash Functions", 2010) with the numbers themselves instead of their signs. The
    sign of what is nearly zero is chance: within 10 of 64 signs, 3 to 8 % of 235 pieces of
    photographs, plain ones among them, were not found again after JPEG; by the cosine, all were.
    """
    ycc_BCSS = (small_BSS3.astype(np.float32) @ _YCC).transpose(0, 3, 1, 2)
    found: list[NDArray[np.float32]] = []
    for inset in INSETS:
        low = _cropped_dct(inset, inset, LOW)
        waves = low @ ycc_BCSS @ low.T
        parts = waves[:, 0], *(waves[:, c, :LOW_CHROMA, :LOW_CHROMA] for c in (1, 2))
        vector = np.concatenate([part.reshape(len(part), -1)[:, 1:] for part in parts], axis=1)
        norm = np.linalg.norm(vector, axis=1, keepdims=True)
        found.append(np.where(norm < MIN_CONTRAST * GRID, 0, vector / np.maximum(norm, 1e-6)))
    return np.stack(found, axis=1)


def copy_residual(one: Small, other: Small) -> float:
    """Return how much of the details of two small copies differs, 0 to about 2; at best alignment.

    Details are the frequencies above those of a hash: pictures of one layout share the low ones,
    only copies share these. Either may be cropped by up to 5 % at each side. It is the square root
    of the differing energy over that of the stronger one, or over what noise has; infinite if the
    low frequencies or the colours of some part say that it is another picture.
    """
    best = _best_alignment(one, other, EVEN)
    if MAX_RESIDUAL < best.residual < 1:  # perhaps cropped at some sides only
        best = min(best, _best_alignment(one, other, UNEVEN))
    shift, local = _worst_block(one, other, best)
    allowed = MAX_SHIFT_SMOOTH if best.is_smooth else MAX_SHIFT
    if best.low_residual > MAX_LOW_RESIDUAL or shift > allowed or local > MAX_LOCAL:
        return float("inf")
    return best.residual


class CopyFinder:
    """Finds which of its pictures others are copies of.

    Keeps about 9 KB for each of its own, nothing of the others; looks at each of its own for each
    of the others, 0.3 million in a millisecond or so.
    """

    def __init__(self, known: Sequence[Thumbprint]) -> None:
        self.small = [print_.small for print_ in known]
        self.rows_of_file: dict[bytes, list[int]] = {}
        for row, print_ in enumerate(known):
            self.rows_of_file.setdefault(print_.sha256, []).append(row)
        hashes = _hashes_in_parts(self.small)
        self.plain = ~hashes.any(axis=(1, 2))
        """Pictures whose copies are only found by their bytes."""
        # A known picture may be cropped, or the other one: never both, so two indexes are enough.
        self._all = _index(hashes.reshape(-1, hashes.shape[2]))
        self._whole = _index(hashes[:, 0])

    def find(self, others: Sequence[Thumbprint]) -> list[list[Copy]]:
        """Return for each of `others` the pictures that it is a copy of, in order of their rows."""
        if not others or not self.small:
            return [[] for _ in others]
        hashes = perceptual_hashes(np.stack([print_.small for print_ in others]))
        candidates: list[set[int]] = [set() for _ in others]
        _add_near(candidates, self._all, hashes[:, 0], len(INSETS))
        for variant in range(1, len(INSETS)):
            _add_near(candidates, self._whole, hashes[:, variant], 1)
        return [
            self._confirmed(other, rows) for other, rows in zip(others, candidates, strict=True)
        ]

    def _confirmed(self, other: Thumbprint, rows: set[int]) -> list[Copy]:
        same = self.rows_of_file.get(other.sha256, [])
        found = [Copy(row, "file", 0.0) for row in same]
        for row in rows.difference(same):
            residual = copy_residual(self.small[row], other.small)
            if residual <= MAX_RESIDUAL:
                found.append(Copy(row, "copy", residual))
        return sorted(found)


def _hashes_in_parts(small: Sequence[Small]) -> NDArray[np.float32]:
    """Return `perceptual_hashes` of many: as float32, all small copies at once would be large."""
    parts = [
        perceptual_hashes(np.stack(small[start : start + 1024]))
        for start in range(0, len(small), 1024)
    ]
    width = LOW * LOW + 2 * LOW_CHROMA * LOW_CHROMA - 3
    return np.concatenate([np.zeros((0, len(INSETS), width), np.float32), *parts])


def _index(vectors: NDArray[np.float32]) -> faiss.IndexFlatIP:
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(np.ascontiguousarray(vectors))  # pyright: ignore[reportCallIssue]
    return index


def _add_near(
    candidates: list[set[int]], index: faiss.IndexFlatIP, hashes: NDArray[np.float32], variants: int
) -> None:
    """Add the rows whose hashes are near; `variants` vectors of the index belong to each row."""
    queries = np.ascontiguousarray(hashes)
    k = min(NEIGHBOURS, index.ntotal)
    cosines, found = index.search(queries, k)  # pyright: ignore[reportCallIssue]
    for position, neighbour in np.argwhere(cosines > MIN_COSINE):
        candidates[position].add(int(found[position, neighbour]) // variants)


# --- alignment: crops and transforms are matrices, multiplied from the left and from the right ----

# Brightness and colour differences of JPEG (ITU-T T.871), columns Y, Cb, Cr.
_YCC = np.array(
    [[0.299, -0.168736, 0.5], [0.587, -0.331264, -0.418688], [0.114, 0.5, -0.081312]], np.float32
)


Crop = tuple[Ends, Ends]
"""From top and bottom, from left and right."""

_HIGHER = np.flatnonzero(np.add.outer(np.arange(HIGH) >= LOW, np.arange(HIGH) >= LOW))
"""Places of the frequencies that are not part of a hash, among HIGH x HIGH."""


class _Alignment(NamedTuple):
    """Two small copies laid over each other; smaller is better."""

    residual: float
    low_residual: float
    is_smooth: bool
    crop: Crop
    other_crop: Crop


def _best_alignment(one: Small, other: Small, ends: tuple[Ends, ...]) -> _Alignment:
    """Crop one of the two in each of the ways, the first of which leaves it whole."""
    crops = [(rows, columns) for rows in ends for columns in ends]
    waves = [_waves(small, ends) for small in (one, other)]
    low = [part[:, :LOW, :LOW].reshape(len(crops), -1)[:, 1:] for part in waves]
    high = [part.reshape(len(crops), -1)[:, _HIGHER] for part in waves]
    best: list[_Alignment] = []
    for cropped, whole in ((0, 1), (1, 0)):
        residuals = _residuals(high[cropped], high[whole][0])
        c = int(residuals.argmin())
        low_residual = _residuals(low[cropped][c : c + 1], low[whole][0])[0]
        strongest = max(np.linalg.norm(high[cropped][c]), np.linalg.norm(high[whole][0]))
        is_smooth = bool(strongest < NOISE / 2 * GRID)
        pair = (crops[c], crops[0]) if cropped == 0 else (crops[0], crops[c])
        best.append(_Alignment(float(residuals[c]), float(low_residual), is_smooth, *pair))
    return min(best)


def _residuals(waves_CH: NDArray[np.float32], whole_H: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return (C,) norms of the differences, relative to the stronger one or to noise."""
    stronger = np.maximum(_norms(waves_CH), np.linalg.norm(whole_H))
    return np.asarray(_norms(waves_CH - whole_H) / np.maximum(stronger, NOISE * GRID), np.float32)


def _norms(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.sqrt(np.einsum("ch,ch->c", rows, rows)).astype(np.float32)


def _waves(small: Small, ends: tuple[Ends, ...]) -> NDArray[np.float32]:
    """Return (C, HIGH, HIGH), the brightness' lowest frequencies, C = len(ends) squared crops."""
    transform = _transforms(ends)
    brightness = small.astype(np.float32) @ _YCC[:, 0]
    waves = (transform @ brightness @ transform.T).reshape(len(ends), HIGH, len(ends), HIGH)
    return np.asarray(waves.swapaxes(1, 2), np.float32).reshape(-1, HIGH, HIGH)


def _worst_block(one: Small, other: Small, at: _Alignment) -> tuple[float, float]:
    """Return by how much some of 8 x 8 blocks differs in a mean colour, and in brightness (RMS)."""
    grids = [_sampled(one, at.crop), _sampled(other, at.other_crop)]
    difference = (grids[0] - grids[1]).reshape(3, 8, GRID // 8, 8, GRID // 8)
    shift = np.abs(difference.mean(axis=(2, 4))).max()
    brightness = np.einsum("crxsy,c->rxsy", difference, _YCC[:, 0])
    local = np.square(brightness - brightness.mean()).mean(axis=(1, 3)).max() ** 0.5
    return float(shift), float(local)


def _sampled(small: Small, crop: Crop) -> NDArray[np.float32]:
    """Return (3, GRID, GRID), the cropped picture."""
    rows, columns = (_averages(*ends, GRID) for ends in crop)
    return np.asarray(rows @ small.transpose(2, 0, 1).astype(np.float32) @ columns.T, np.float32)


@cache
def _transforms(ends: tuple[Ends, ...]) -> NDArray[np.float32]:
    return np.concatenate([_cropped_dct(start, end, HIGH) for start, end in ends])


@cache
def _cropped_dct(start: float, end: float, count: int) -> NDArray[np.float32]:
    """Return (count, S): crop a side, resample it to GRID values and take its DCT-II."""
    k, x = np.arange(count)[:, None], np.arange(GRID)[None]
    waves = np.cos(np.pi * (2 * x + 1) * k / (2 * GRID)) * np.sqrt(2 / GRID)
    waves[0] /= np.sqrt(2)
    return (waves @ _averages(start, end, GRID)).astype(np.float32)


@cache
def _averages(start: float, end: float, count: int) -> NDArray[np.float32]:
    """Return (count, S): the mean of each of `count` equal parts of a side without its ends."""
    edges = np.linspace(start * SIDE_PX, SIDE_PX - end * SIDE_PX, count + 1)
    pixel = np.arange(SIDE_PX)
    overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    overlap = np.clip(overlap, 0, None)
    return (overlap / overlap.sum(axis=1, keepdims=True)).astype(np.float32)
