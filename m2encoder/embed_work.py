"""How batches of pictures and of texts become rows of a VectorTable.

Not for the cache and the ranks (vector_work.py), nor for what comes in and goes out (embed.py).
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from m2encoder.encoder import BadItem, Encoder, OnError, checked_text
from m2encoder.errors import DataError
from m2encoder.images import open_image
from m2encoder.overlap import Threads, overlapped
from m2encoder.pictures import Pictures
from m2encoder.tokenizer import clip
from m2encoder.vector_table import TRUNCATED, WHOLE, Span, VectorTable, cut

Precision = Literal["float32", "bfloat16", "float16"]
"""float32 computes as the weights are; the others let torch choose them for each operation."""

CPU_PIXELS = 8 * 224 * 224
"""Per batch on CPUs: eight pictures of 224 pixels, whose activations still fit the caches."""
WINDOW_BATCHES = 16
"""Batches of texts that are sorted by length together."""


@contextmanager
def _inference(device: torch.device, precision: Precision) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        if precision != "float32":
            stack.enter_context(torch.autocast(device.type, getattr(torch, precision)))
        yield


def _numpy(vectors: Tensor) -> NDArray[np.float32]:
    return vectors.float().cpu().numpy()


@dataclass(frozen=True)
class PictureWork:
    """Fills a table with vectors of pictures. With on_error="raise" the first bad one raises."""

    encoder: Encoder
    pictures: Pictures
    table: VectorTable
    batch_size: int
    on_error: OnError
    upright: bool
    precision: Precision
    workers: int | None

    def spans(self) -> list[Span]:
        """Return the batches."""
        on_cpu = self.encoder.device.type == "cpu"
        most = CPU_PIXELS // self.encoder.image_processor.size_px**2
        size = min(self.batch_size, max(1, most)) if on_cpu else self.batch_size
        return cut(len(self.table), size, fine_tail=on_cpu)

    def __call__(self, spans: Sequence[Span]) -> Generator[Span, None, None]:
        """Fill the rows of some batches; yields each batch that is done, in order."""
        threads = Threads.on(self.encoder.device, self.workers)
        batches = (range(*span) for span in spans)
        with closing(overlapped(batches, self.prepare, self._vectors, threads)) as done:
            for span, (vectors, bad) in zip(spans, done, strict=True):
                good = np.ones(len(span), bool)
                for item in bad:
                    good[item.position - span.first] = False
                    self.table.set_bad(item.position, item.reason)
                rows = span.first + np.flatnonzero(good)
                self.table.vectors[rows] = vectors
                self.table.states[rows] = WHOLE
                yield span

    def prepare(self, position: int) -> NDArray[np.float32] | BadItem:
        """Return a picture as (3, S, S) float32 in 0..1, or why it cannot be read."""
        name = self.pictures.name(position)
        source = self.pictures.read(position)
        try:
            picture = open_image(source, name=name, upright=self.upright)
        except DataError as error:
            if self.on_error == "raise":
                raise
            return BadItem(position, name, str(error).removeprefix(f"{name}: "))
        return self.encoder.image_processor.to_pixels(picture)

    def _vectors(
        self, prepared: list[NDArray[np.float32] | BadItem]
    ) -> tuple[NDArray[np.float32], list[BadItem]]:
        bad = [item for item in prepared if isinstance(item, BadItem)]
        pixels = [item for item in prepared if not isinstance(item, BadItem)]
        if not pixels:
            return np.zeros((0, self.encoder.dim), np.float32), bad
        device = self.encoder.device
        with _inference(device, self.precision):
            batch = torch.from_numpy(np.stack(pixels)).to(device)
            return _numpy(self.encoder.model.encode_image(batch)), bad


class _TextBatch(NamedTuple):
    """Texts of about the same length."""

    rows: NDArray[np.int64]
    """(B,) where they stand in the table."""
    ids: Tensor
    """(B, L) int64"""
    mask: Tensor
    """(B, L) int64, 1 where real."""
    states: NDArray[np.uint8]
    """(B,) WHOLE or TRUNCATED."""


@dataclass(frozen=True)
class TextWork:
    """Fills a table with vectors of texts, texts of one length together: little padding."""

    encoder: Encoder
    texts: Sequence[str]
    table: VectorTable
    batch_size: int
    precision: Precision

    def spans(self) -> list[Span]:
        """Return the windows, inside which texts are sorted."""
        size = WINDOW_BATCHES * self.batch_size
        return cut(len(self.table), size, fine_tail=self.encoder.device.type == "cpu")

    def __call__(self, spans: Sequence[Span]) -> Generator[Span, None, None]:
        """Fill the rows of some windows; yields each window that is done, in order.

        Raises DataError at the first text that is empty or no text.
        """
        threads = Threads.on(self.encoder.device, workers=1)
        batches = ([batch] for span in spans for batch in self._batches(span))
        with closing(overlapped(batches, _as_it_is, self._vectors, threads)) as done:
            for span in spans:
                filled = 0
                while filled < len(span):
                    batch, vectors = next(done)
                    self.table.vectors[batch.rows] = vectors
                    self.table.states[batch.rows] = batch.states
                    filled += len(batch.rows)
                yield span

    def _batches(self, span: Span) -> Iterator[_TextBatch]:
        """Tokenize a window as the Encoder does, and cut it, the longest texts first."""
        texts = [checked_text(self.texts[row], f"text {row}") for row in range(*span)]
        tokenizer = self.encoder.needed_tokenizer()
        side = "left" if tokenizer.truncation_side == "left" else "right"
        clipped = [clip(text, side) for text in texts]
        inputs = tokenizer(clipped, padding=True, truncation=True, return_tensors="pt")
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        lengths = mask.sum(dim=1)
        states = np.where(_truncated(inputs, lengths, tokenizer), TRUNCATED, WHOLE)
        for i, (text, short) in enumerate(zip(texts, clipped, strict=True)):
            if len(short) < len(text) and len(short) < len(text.strip()):
                states[i] = TRUNCATED
        # Others may mean their padding: SigLIP was trained on it.
        trims = isinstance(tokenizer, PreTrainedTokenizerFast)
        order = torch.argsort(lengths, descending=True, stable=True)
        for chosen in order.split(self.batch_size):
            width = int(lengths[chosen[0]]) if trims else ids.shape[1]
            is_left = trims and tokenizer.padding_side == "left"
            columns = slice(ids.shape[1] - width if is_left else 0, None if is_left else width)
            rows = chosen.numpy()
            yield _TextBatch(
                span.first + rows,
                ids[chosen][:, columns],
                mask[chosen][:, columns],
                states[rows].astype(np.uint8),
            )

    def _vectors(self, prepared: list[_TextBatch]) -> tuple[_TextBatch, NDArray[np.float32]]:
        (batch,) = prepared
        device = self.encoder.device
        with _inference(device, self.precision):
            ids, mask = batch.ids.to(device), batch.mask.to(device)
            return batch, _numpy(self.encoder.model.encode_text(ids, mask))


def _truncated(inputs: Any, lengths: Tensor, tokenizer: Any) -> NDArray[np.bool_]:
    """Say of which texts tokens were dropped.

    A tokenizer that is not a fast one does not tell: there it is those that fill all tokens.
    """
    if encodings := getattr(inputs, "encodings", None):
        return np.asarray([bool(encoding.overflowing) for encoding in encodings])
    return (lengths >= tokenizer.model_max_length).numpy()


def _as_it_is(batch: _TextBatch) -> _TextBatch:
    return batch
