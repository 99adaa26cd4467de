"""Small encoded pictures that tests make, and a list of them that counts what is read."""

import io
import time
from pathlib import Path

import numpy as np
from PIL import Image

from m2encoder.pictures import ListedBytes


def encoded_picture(seed, size=(48, 40), kind="PNG"):
    """A picture of random patches, encoded."""
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(stream, kind)
    return stream.getvalue()


def listed(count, *, bad=(), seed=0):
    """`count` pictures of different sizes; those at positions `bad` cannot be read."""
    names = [f"图{i}.png" for i in range(count)]
    contents = [
        b"no picture" if i in bad else encoded_picture(seed * 1000 + i, (20 + i % 7, 30 - i % 5))
        for i in range(count)
    ]
    return ListedBytes(names, contents)


class CountedReads(ListedBytes):
    """Notes every position that is read, in a file that survives a kill; takes its time."""

    def __init__(self, pictures: ListedBytes, log: Path, *, seconds: float = 0.0) -> None:
        super().__init__(pictures.names, pictures.contents)
        self.log, self.seconds = log, seconds

    def read(self, position: int) -> bytes:
        with self.log.open("a") as file:
            file.write(f"{position}\n")
        time.sleep(self.seconds)
        return super().read(position)

    def positions(self) -> list[int]:
        """What was read since the last call."""
        found = [int(line) for line in self.log.read_text().split()] if self.log.exists() else []
        self.log.write_text("")
        return found
