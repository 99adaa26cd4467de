"""What the training loop receives: one batch, and the stream that gives batches by step.

Not for reading shards (data_pipeline/stream.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from torch import Tensor


class Captions(NamedTuple):
    """Captions of one language in a batch."""

    ids: Tensor  # (M, L) int64, right-padded
    mask: Tensor  # (M, L) int64, 1 where real
    rows: Tensor  # (M,) int64: caption m describes picture rows[m]
    keys: Tensor  # (M,) int64: equal where the texts are (hashing.text_key)


@dataclass
class Batch:
    """One process's share of a global batch; a picture may lack a caption in a language."""

    pixels: Tensor
    """(B, 3, S, S) uint8."""
    captions: dict[str, Captions]
    """BCP-47 tag to captions, at most one per picture."""
    keys: list[str]
    """The pairs' names, in order."""
    positions: Tensor
    """(B,) int64, each pair's place in the global stream."""
    dropped: list[tuple[str, str]] = field(default_factory=list)
    """(key, reason) of pairs that could not be used."""
    texts: dict[str, list[str]] = field(default_factory=dict)
    """The captions as text, in the order of `captions`: what a record of bad samples shows."""
    work_s: dict[str, float] = field(default_factory=dict)
    """Seconds spent on this batch by kind: read, decode (and augment), tokenise. Workers spend them
    beside the training, so they are no waiting yet."""

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory, from where copies to a GPU overlap with work."""
        captions = {
            language: Captions(*(tensor.pin_memory() for tensor in captions))
            for language, captions in self.captions.items()
        }
        pixels, positions = self.pixels.pin_memory(), self.positions.pin_memory()
        return replace(self, pixels=pixels, captions=captions, positions=positions)


class BatchStream(Protocol):
    """Batches by step: the same step always gives the same batch."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per pass over the data."""
        ...

    @property
    def pairs(self) -> int:
        """Pairs of a pass over the data."""
        ...

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """Yield this process's share of the batches of steps first_step .. last_step - 1."""
        ...
