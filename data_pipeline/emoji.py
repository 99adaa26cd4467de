"""Emoji pictures and their human names as shards: one artist's style to train, another's to test.

Pictures come from two npm archives that the user hands over, names from the PyPI package `emoji`.
Nothing is downloaded here, and nothing of it may be committed: shards carry the attribution.
"""

import gzip
import io
import json
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from PIL import Image

from m2encoder.errors import DataError, MissingExtraError
from m2encoder.images import open_image
from m2encoder.shards import Pair, ShardIndex, write_shards

Style = Literal["google", "twitter"]
STYLES: tuple[Style, ...] = get_args(Style)

ARCHIVE_VERSION = "16.0.0"
DATA_MEMBER = "package/emoji.json"
IMAGE_MEMBER = re.compile(r"package/img/(google|twitter)/64/([0-9a-f-]+\.png)")
SKIN_TONES = frozenset("\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff")
ATTRIBUTION_NAME = "ATTRIBUTION.txt"

CREDITS: dict[Style, str] = {
    "google": "Noto Emoji pictures, copyright Google LLC, "
    "https://github.com/googlefonts/noto-emoji, under the Apache License 2.0, https://www.apache.org/licenses/LICENSE-2.0",
    "twitter": "Twemoji pictures, copyright Twitter, Inc and other contributors, "
    "https://github.com/jdecked/twemoji, under CC-BY 4.0, "
    "https://creativecommons.org/licenses/by/4.0/",
}
COMMON_CREDIT = (
    "Changes: laid over a white background and scaled.",
    "Packaged by emoji-datasource, Copyright (c) 2013 Cal Henderson, "
    "https://github.com/iamcal/emoji-data, under the MIT License.",
    "Names by the Python package emoji, https://github.com/carpedm20/emoji, under the BSD License.",
)


class Concept(NamedTuple):
    """One emoji: its characters, the stem of its pictures' names, and its name per language."""

    char: str
    image_name: str
    names: dict[str, str]


class Archives(NamedTuple):
    """What was found in the archives: the encoded pictures by style and name, and emoji.json."""

    pictures: dict[Style, dict[str, bytes]]
    table: list[dict[str, Any]]


def make_emoji(
    out_dir: Path,
    *,
    archives: Sequence[Path],
    size_px: int = 64,
    train_style: Style = "google",
    test_style: Style = "twitter",
) -> dict[str, ShardIndex]:
    """Write `out_dir/train` in one artist's style and `out_dir/test` in the other's, same concepts.

    archives: emoji-datasource-google-16.0.0.tgz and emoji-datasource-twitter-16.0.0.tgz.
    Takes every emoji that has both pictures and both names, without skin tones: 1,906. Each pair
    has one caption per language, its human name. The attribution is in both indexes and in
    `out_dir/ATTRIBUTION.txt`.
    Raises DataError on missing or wrong archives, MissingExtraError without the package `emoji`.
    """
    found = read_archives(archives, styles=(train_style, test_style))
    concepts = [
        concept
        for concept in name_concepts(found.table)
        if all(concept.image_name in pictures for pictures in found.pictures.values())
    ]
    if not concepts:
        raise DataError(
            f"{_names(archives)}: no emoji with pictures in both styles and names in both "
            f"languages; {_advice((train_style, test_style))}"
        )
    attribution = attribution_text((train_style, test_style))
    indexes: dict[str, ShardIndex] = {}
    styles: dict[str, Style] = {"train": train_style, "test": test_style}
    for split, style in styles.items():
        pairs = _make_pairs(concepts, found.pictures[style], style=style, size_px=size_px)
        indexes[split] = write_shards(pairs, out_dir / split, attribution=attribution)
    (out_dir / ATTRIBUTION_NAME).write_text(attribution + "\n", encoding="utf-8")
    return indexes


def attribution_text(styles: Sequence[Style]) -> str:
    """Return whom to name wherever these pictures are shown, one line each."""
    return "\n".join([*dict.fromkeys(CREDITS[style] for style in styles), *COMMON_CREDIT])


def read_archives(paths: Sequence[Path], *, styles: Sequence[Style]) -> Archives:
    """Read the 64 px pictures of `styles` and the emoji table. Raises DataError."""
    pictures: dict[Style, dict[str, bytes]] = {style: {} for style in styles}
    table: list[dict[str, Any]] = []
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: no such archive; {_advice(styles)}")
        try:
            for name, content in _members(path):
                if match := IMAGE_MEMBER.fullmatch(name):
                    style: Style = "google" if match[1] == "google" else "twitter"
                    pictures.setdefault(style, {})[match[2]] = content
                elif name == DATA_MEMBER and not table:
                    table = json.loads(content)
        except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as error:
            raise DataError(f"{path}: damaged archive ({error}); {_advice(styles)}") from None
    for style in styles:
        if not pictures[style] or not table:
            raise DataError(
                f"{_names(paths)}: no 64 px pictures in {style} style with their emoji.json found; "
                f"{_advice(styles)}"
            )
    return Archives({style: pictures[style] for style in styles}, table)


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the files that matter, in one pass: a tar inside gzip cannot be read at random.

    Reads to the end, because tarfile by itself takes a cut archive for a short one.
    """
    with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            if member.isfile() and (
                member.name == DATA_MEMBER or IMAGE_MEMBER.fullmatch(member.name)
            ):
                file = tar.extractfile(member)
                assert file is not None  # a plain file always opens
                yield member.name, file.read()
        while stream.read(1 << 20):
            pass


def name_concepts(table: Sequence[dict[str, Any]]) -> list[Concept]:
    """Join the emoji table with the names in both languages, in the table's order.

    The five bare skin tones are left out; the table keeps toned variants inside their base emoji,
    where we do not look.
    """
    try:
        import emoji
    except ImportError:
        raise MissingExtraError("emoji", extra="data") from None
    emoji.config.load_language("zh")
    concepts: list[Concept] = []
    for char, image_name in _chars(table):
        names = emoji.EMOJI_DATA.get(char, {})
        if "en" in names and "zh" in names and not SKIN_TONES & set(char):
            cleaned = {language: clean_name(names[language]) for language in ("zh", "en")}
            concepts.append(Concept(char, image_name, cleaned))
    return concepts


def _chars(table: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return each row's characters and the name of its pictures. Raises DataError."""
    try:
        return [
            ("".join(chr(int(code, 16)) for code in row["unified"].split("-")), str(row["image"]))
            for row in table
        ]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DataError(
            f"damaged emoji.json ({type(error).__name__}: {error}); {_advice(STYLES)}"
        ) from None


def clean_name(name: str) -> str:
    """Turn ":red_heart:" into "red heart", and ":按键_1:" into "按键 1"."""
    return " ".join(name.strip(":").replace("_", " ").split())


def _make_pairs(
    concepts: Sequence[Concept], pictures: dict[str, bytes], *, style: Style, size_px: int
) -> Iterator[Pair]:
    for concept in concepts:
        encoded = _over_white(pictures[concept.image_name], concept.image_name, size_px)
        captions = {language: [name] for language, name in concept.names.items()}
        key = Path(concept.image_name).stem
        yield Pair(key, encoded, captions, {"emoji": concept.char, "style": style})


def _over_white(encoded: bytes, name: str, size_px: int) -> bytes:
    """Return an RGB PNG of `size_px` squared, laid over white.

    The model drops alpha without compositing, as the released one does; whatever colour a painting
    program left under transparent pixels (mostly black) would then become the background.
    """
    open_image(encoded, name=name)  # one line on a damaged or huge picture
    with Image.open(io.BytesIO(encoded)) as image:
        art = image.convert("RGBA")
    white = Image.new("RGBA", art.size, "white")
    flat = Image.alpha_composite(white, art).convert("RGB")
    if flat.size != (size_px, size_px):
        flat = flat.resize((size_px, size_px), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    flat.save(stream, "PNG")
    return stream.getvalue()


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(str(path) for path in paths) or "no archives"


def _advice(styles: Sequence[Style]) -> str:
    packages = " ".join(f"emoji-datasource-{style}@{ARCHIVE_VERSION}" for style in styles)
    return f"fetch them with: npm pack {packages}"
