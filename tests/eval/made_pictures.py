"""Tiny real pictures, tars and tables for tests of reading data."""

import base64
import io
import json
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image


def picture(shade: int = 0, kind: str = "PNG") -> bytes:
    """A real picture of 4 x 4 pixels in one colour."""
    out = io.BytesIO()
    Image.new("RGB", (4, 4), (shade % 256, 255 - shade % 256, 99)).save(out, kind)
    return out.getvalue()


def put_pictures(folder: Path, names: list[str]) -> None:
    for shade, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(shade))


def put_lines(path: Path, records: list[Any]) -> Path:
    """JSON lines; a str stands as it is."""
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def put_tar(path: Path, members: list[tuple[str, bytes | str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            raw = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return path


def put_tsv(path: Path, pictures: dict[str, bytes]) -> Path:
    """CN-CLIP's table of pictures."""
    lines = [f"{name}\t{base64.b64encode(raw).decode()}" for name, raw in pictures.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
