"""The pictures that a result names, found again in its data and made small for a page.

Not for pictures in bulk (m2encoder/embed.py).
"""

import base64
import io
from pathlib import Path

from m2encoder.errors import M2EncoderError
from m2encoder.eval.caption_sources import open_captions
from m2encoder.eval.picture_sources import TsvPictures
from m2encoder.images import ImageSource, open_image
from m2encoder.pictures import Pictures, ShardPictures
from m2encoder.shards import INDEX_NAME, ShardReader

SIZE_PX = 192
SMALL_PX = 128
"""Up to this size a picture is kept without loss."""


class PictureFinder:
    """Gives pictures by name; what is not there or unreadable is counted, not an error."""

    def __init__(self, data: Path, *, images: Path | None = None, language: str = "zh") -> None:
        """Look in `images` where it is given, otherwise in the data that was measured."""
        self.missing: set[str] = set()
        self.shown = 0
        self._uris: dict[str, str | None] = {}
        self._pictures = _open(data, images, language)
        listed = self._pictures
        self._rows = {listed.name(row): row for row in range(len(listed))} if listed else {}
        place = images or data
        self._folder = place if place.is_dir() else place.parent

    def uri(self, name: str) -> str | None:
        """Return a small copy of the picture as a data URI; None where it cannot be had."""
        if name not in self._uris:
            try:
                source = self._find(name)
                self._uris[name] = None if source is None else small_picture(source, name)
            except (M2EncoderError, OSError, ValueError):  # gone, damaged, or no name of a file
                self._uris[name] = None
            if self._uris[name] is None:
                self.missing.add(name)
            else:
                self.shown += 1
        return self._uris[name]

    def _find(self, name: str) -> ImageSource | None:
        if self._pictures is not None and name in self._rows:
            return self._pictures.read(self._rows[name])
        path = (self._folder / name).resolve()
        # a result may come from anybody: what it names must not lead out of the folder
        inside = path.is_relative_to(self._folder.resolve())
        return path if inside and path.is_file() else None


def _open(data: Path, images: Path | None, language: str) -> Pictures | None:
    """Open what lists pictures by name: shards, a table, annotations; None for a plain folder."""
    try:
        for place in (images, None if images else data):
            if place is not None and (place / INDEX_NAME).is_file():
                return ShardPictures(ShardReader(place))
        if images is not None:
            return TsvPictures(images) if images.suffix.lower() == ".tsv" else None
        source = open_captions(data, images=None, language=language, split=None)
        return source.find_pictures().pictures
    except (M2EncoderError, OSError):
        return None


def small_picture(source: ImageSource, name: str) -> str:
    """Return a picture, upright, at most 192 pixels long, as a data URI. Raises DataError."""
    picture = open_image(source, name=name, upright=True)
    picture.thumbnail((SIZE_PX, SIZE_PX))
    kind = "png" if max(picture.size) <= SMALL_PX else "jpeg"
    stream = io.BytesIO()
    picture.save(stream, kind, quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
