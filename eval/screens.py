"""Products of many vectors with many, computed quickly, with a bound on how wrong each may be.

Two ways: bfloat16 where the processor multiplies matrices of it, and float32. Not for deciding
anything by them: exact_ranks.py computes again whatever a screen leaves open.
"""

# N vectors   D their width   Q queries of one side   p pairs of some   n, m texts, images of a tile

import functools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from m2encoder.errors import DataError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Map = Callable[[Callable[[slice], Any], list[slice]], Iterable[Any]]
ROWS = 2048
"""Vectors that one worker measures and rounds at a time."""
FEW = 128
"""Vectors rounded together, few enough for a fast cache."""
LONGEST = 1e15
"""The longest vector whose products float32 surely holds."""
UNDERFLOW = 2.0**-120
"""More than what a product or a component loses that is too small for float32."""


class Edges(NamedTuple):
    """Per query the keys that decide: below `low` a product is surely lower, above `high` higher.

    Lower and higher than the query's best right score, (Q,) each.
    """

    low: NDArray[Any]
    high: NDArray[Any]


@dataclass(frozen=True)
class Vectors:
    """One side of the products, with what bounds their errors."""

    values: NDArray[Any]
    """(N, D) float32 or float64, contiguous."""
    norms: Floats
    """(N,) lengths, slightly overstated."""


def measured(values: NDArray[Any], what: str = "embeddings", each: Map = map) -> Vectors:
    """Return vectors with their lengths. each: maps a function over parts, perhaps on threads.

    Raises DataError on NaN, infinity, and vectors that are too long for products in float32.
    """
    wide = values.dtype == np.float64 or np.issubdtype(values.dtype, np.integer)
    values = np.ascontiguousarray(values, np.float64 if wide else np.float32)
    tensor = torch.from_numpy(values)
    norms = np.concatenate(list(each(lambda part: _lengths(tensor[part]), _parts(len(values)))))
    if not np.isfinite(norms).all():
        check_finite(values, what)
    if not (longest := norms.max()) <= LONGEST:
        raise DataError(
            f"{what}: the longest has length {longest:.3g}, expected unit length and at most "
            f"{LONGEST:.0e}; normalise them"
        )
    return Vectors(values, norms)


def check_finite(values: NDArray[Any], what: str) -> None:
    """Raise DataError, and say where, if a row (N, ...) holds NaN or infinity."""
    bad = ~np.isfinite(values).all(axis=1)
    if bad.any():
        raise DataError(
            f"{what}: {np.count_nonzero(bad):,} of {len(values):,} rows hold NaN or infinity, the "
            f"first is row {int(bad.argmax())}; check the model's weights"
        )


def _parts(count: int) -> list[slice]:
    return [slice(start, start + ROWS) for start in range(0, count, ROWS)]


def _lengths(values: torch.Tensor) -> Floats:
    """Return (N,) lengths or a little more."""
    return _overstated(torch.linalg.vector_norm(values, dim=1), values.shape[1])


def _overstated(lengths: torch.Tensor, width: int) -> Floats:
    """Return lengths that are not too small: a sum of D squares may be off by D * 2 ** -24."""
    return lengths.double().numpy() * (1 + width * 2.0**-23) + UNDERFLOW


@dataclass(frozen=True)
class _Rounded:
    """Vectors in the precision of a screen."""

    values: torch.Tensor
    norms: Floats
    """(N,) lengths of these, or more."""
    lost: Floats
    """(N,) lengths of what rounding took away, or more."""


def _rounded(vectors: Vectors, dtype: torch.dtype, each: Map) -> _Rounded:
    values = torch.from_numpy(vectors.values)
    if values.dtype == dtype:
        return _Rounded(values, vectors.norms, np.zeros(len(values)))
    rounded = torch.empty(values.shape, dtype=dtype)

    def round_part(part: slice) -> Floats:
        few_values, few_rounded = values[part].split(FEW), rounded[part].split(FEW)
        lost = torch.empty(len(values[part]), dtype=values.dtype)
        buffer = torch.empty((FEW, values.shape[1]), dtype=values.dtype)
        for before, after, length in zip(few_values, few_rounded, lost.split(FEW), strict=True):
            after.copy_(before)
            away = buffer[: len(before)]
            away.copy_(after)
            torch.linalg.vector_norm(away.sub_(before), dim=1, out=length)
        return _overstated(lost, values.shape[1])

    lost = np.concatenate(list(each(round_part, _parts(len(values)))))
    return _Rounded(rounded, vectors.norms + lost, lost)


def _errors(own: _Rounded, own_norms: Floats, others: _Rounded, other_norms: Floats) -> Floats:
    """Return (Q,) how far a product with any other may be from its exact value, as float32.

    By Cauchy and Schwarz: with a = a' + da and b = b' + db, ab - a'b' = da b + a' db. A sum of D
    products in float32, in whatever order, is off by D * 2 ** -24 of |a'| |b'|, twice that where
    it is not rounded to nearest. The exact value is then rounded to float32 itself.
    """
    width = own.values.shape[1]
    longest, longest_rounded = other_norms.max(), others.norms.max()
    error = own.lost * longest + own.norms * others.lost.max()
    error = error + width * 2.0**-23 * own.norms * longest_rounded
    return error + 2.0**-22 * own_norms * longest + width * UNDERFLOW * (1 + longest + own.norms)


class Screen(ABC):
    """What both ways have: two sides in one precision, and the edges of each side's queries."""

    dtype: ClassVar[torch.dtype]
    lowest: ClassVar[float]
    """A key below all others."""
    image_edges: Edges
    text_edges: Edges

    def __init__(
        self, image: Vectors, text: Vectors, best_I: Floats, best_T: Floats, each: Map = map
    ) -> None:
        self.image = _rounded(image, self.dtype, each)
        self.text = _rounded(text, self.dtype, each)
        errors_I = _errors(self.image, image.norms, self.text, text.norms)
        errors_T = _errors(self.text, text.norms, self.image, image.norms)
        self.image_edges = self._edges(best_I - errors_I, best_I + errors_I)
        self.text_edges = self._edges(best_T - errors_T, best_T + errors_T)

    @abstractmethod
    def keys(self, texts: slice, images: slice) -> NDArray[Any]:
        """Return (n, m) approximate products, a row for each text, as values that compare alike."""

    @abstractmethod
    def _edges(self, low: Floats, high: Floats) -> Edges:
        """Return the keys of low and high; whatever rounds a product must keep that order."""


class Float32Screen(Screen):
    """Products by NumPy's float32 matrix product, which no setting of torch makes less precise."""

    dtype = torch.float32
    lowest = -np.inf

    def __init__(
        self, image: Vectors, text: Vectors, best_I: Floats, best_T: Floats, each: Map = map
    ) -> None:
        super().__init__(image, text, best_I, best_T, each)
        _hear_warning()  # here, because threads must not change what warnings do

    def keys(self, texts: slice, images: slice) -> NDArray[np.float32]:
        """Return (n, m) products."""
        return self.text.values[texts].numpy() @ self.image.values[images].numpy().T

    def pair_keys(
        self, texts: slice, images: slice, pairs: tuple[Ints, Ints], axis: int
    ) -> tuple[NDArray[np.float32], Edges]:
        """Return products of single pairs of a tile, (P,), and the edges of each pair's query.

        pairs: (queries, candidates), in the order of the queries, which are texts on axis 0 and
        images on axis 1.
        """
        sides = [self.text.values[texts], self.image.values[images]]
        edges = ((self.text_edges, texts), (self.image_edges, images))[axis]
        query, candidate = sides if axis == 0 else sides[::-1]
        ends = np.zeros(len(query) + 1, np.int64)
        np.cumsum(np.bincount(pairs[0], minlength=len(query)), out=ends[1:])
        places = _sparse(ends, pairs[1], (len(query), len(candidate)))
        keys = torch.sparse.sampled_addmm(places, query, candidate.T, beta=0.0).values().numpy()
        return keys, Edges(*(edge[edges[1]][pairs[0]] for edge in edges[0]))

    def _edges(self, low: Floats, high: Floats) -> Edges:
        below, above = np.float32(-np.inf), np.float32(np.inf)
        return Edges(
            np.nextafter(low.astype(np.float32), below),
            np.nextafter(high.astype(np.float32), above),
        )


def _sparse(ends: Ints, columns: Ints, shape: tuple[int, int]) -> torch.Tensor:
    """Return a matrix of stored zeros: row i has them in the columns up to place ends[i + 1]."""
    return torch.sparse_csr_tensor(
        torch.from_numpy(ends),
        torch.from_numpy(columns),
        torch.zeros(len(columns)),
        size=shape,
        check_invariants=False,
    )


@functools.cache
def _hear_warning() -> None:
    """Let torch say now, the one time that it does, that sparse tensors are "in beta state"."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _sparse(np.zeros(2, np.int64), np.zeros(0, np.int64), (1, 1))


class Bfloat16Screen(Screen):
    """Products in bfloat16, summed in float32, rounded to bfloat16: a sixth of float32's time.

    A key is the 16 bits of a product, as an integer. Integers have the order of the numbers where
    these are positive, so wherever an edge is not, all keys are put in order.
    """

    dtype = torch.bfloat16
    lowest = -(2**15)

    @staticmethod
    def is_fast() -> bool:
        """Say whether this processor multiplies bfloat16 matrices (AMX) and torch makes use of it.

        Elsewhere torch may add them up in bfloat16, which is slow and breaks the bound.
        """
        return bool(torch.cpu._is_amx_tile_supported() and torch.backends.mkldnn.enabled)

    def keys(self, texts: slice, images: slice) -> NDArray[np.int16]:
        """Return (n, m) keys of products."""
        products = self.text.values[texts] @ self.image.values[images].T
        bits = products.view(torch.int16).numpy()
        lowest = min(self.image_edges.low[images].min(), self.text_edges.low[texts].min())
        return bits if lowest > 0 else _in_order(bits)

    def _edges(self, low: Floats, high: Floats) -> Edges:
        bits = [torch.from_numpy(edge).bfloat16().view(torch.int16).numpy() for edge in (low, high)]
        return Edges(_in_order(bits[0]), _in_order(bits[1]))


def _in_order(bits: NDArray[np.int16]) -> NDArray[np.int16]:
    """Change the bits of bfloat16 numbers, in place, to integers that have their order."""
    sign = bits >> 15
    sign &= 0x7FFF
    bits ^= sign  # the other bits of a negative number are its size
    return bits
