"""What a run trains on: its sources with their weights and languages, checked before it starts.

Reads indexes and a few tar headers, no pairs. Not for the order of pairs (order.py).
"""

import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from m2encoder.config import Data, Source
from m2encoder.data_pipeline.order import LANE_ROWS, WINDOW_STEPS, Mixture
from m2encoder.data_pipeline.remote import RemoteFolder, is_remote
from m2encoder.data_pipeline.shard_files import LocalFolder, PackedShard, ShardFiles, ShardFolder
from m2encoder.errors import ConfigError, DataError
from m2encoder.shards import ShardReader

LANGUAGES = ("zh", "en")


class TrainingSource(NamedTuple):
    """One source: where its shards lie and the pairs of them that count."""

    path: str
    weight: float
    languages: tuple[str, ...]
    """Languages whose captions are taken."""
    folder: ShardFolder
    shards: list[PackedShard]
    left_out: int
    """Pairs without a caption in one of the languages."""
    captions: dict[str, int]
    """Captions per language, as the index counts them."""

    @property
    def pairs(self) -> int:
        """Pairs that count."""
        return sum(shard.pairs for shard in self.shards)

    @property
    def size_bytes(self) -> int:
        """Size of all shards together."""
        return sum(shard.size_bytes for shard in self.shards)


def open_sources(
    settings: Data, languages: Sequence[str] = LANGUAGES, *, rank: int = 0, world_size: int = 1
) -> list[TrainingSource]:
    """Open every source and check it; the ranks share the look into the tars.

    Raises DataError where an index is missing or disagrees with its tars, a language has no caption
    anywhere, or a batch takes more pairs of a source than it has; ConfigError on a weight so small
    that nothing is drawn.
    """
    sources = [_open(source, settings, languages) for source in settings.train_sources]
    _check_languages(sources, languages)
    _check_sizes(sources, settings.batch_size)
    for source in sources:
        if isinstance(source.folder, LocalFolder):  # others are checked when they arrive
            for shard in source.shards[rank::world_size]:
                check_members(source.folder.local(shard), shard)
    return sources


def _open(source: Source, settings: Data, languages: Sequence[str]) -> TrainingSource:
    taken = tuple(x for x in languages if not source.languages or x in source.languages)
    if is_remote(source.path):
        if settings.cache is None:
            raise ConfigError(
                f"{source.path}: far away, and data.cache is not set; name a folder for copies"
            )
        folder = RemoteFolder(source.path, Path(settings.cache), settings.cache_gb)
        index = folder.index()
    else:
        path = Path(source.path)
        folder = LocalFolder(path)
        index = ShardReader(path).index
    shards = [PackedShard.of(shard, _that_count(shard.pairs, taken)) for shard in index.shards]
    left_out = index.count - sum(shard.pairs for shard in shards)
    return TrainingSource(
        source.path, source.weight, taken, folder, shards, left_out, index.captions
    )


def _that_count(entries: list[dict[str, Any]], languages: Sequence[str]) -> list[dict[str, Any]]:
    """Leave out pairs whose entry says that they have no caption in the languages."""
    wanted = set(languages)
    return [e for e in entries if not wanted.isdisjoint(e.get("languages", languages))]


def _check_languages(sources: list[TrainingSource], languages: Sequence[str]) -> None:
    where = ", ".join(source.path for source in sources)
    absent = [
        language
        for language in languages
        if not any(language in s.languages and s.captions.get(language) for s in sources)
    ]
    if absent:
        raise DataError(
            f"{where}: no captions in {' or '.join(absent)}, an objective needs them; "
            f"add some, or name only the other objectives"
        )


def _check_sizes(sources: list[TrainingSource], batch_size: int) -> None:
    mixture = Mixture([source.weight for source in sources], batch_size)
    for source, drawn, most in zip(sources, mixture.per_window, mixture.most(), strict=True):
        if not drawn:
            raise ConfigError(
                f"{source.path}: weight {source.weight:g} gives it no pair in {WINDOW_STEPS} "
                f"batches; raise the weight or leave the source out"
            )
        if source.pairs < most:
            share = " of it" if len(sources) > 1 else ""
            raise DataError(
                f"{source.path}: {source.pairs:,} pairs, a batch takes {most}{share}; "
                f"lower data.batch_size or add data"
            )


def check_members(path: Path, shard: PackedShard) -> None:
    """Compare the tar's headers of a shard's first and last pair with the index; DataError."""
    lines = shard.lines()
    with path.open("rb") as file:
        for line in {lines[0], lines[-1]} if lines else ():
            entry = json.loads(line)
            _, offset, size = entry["image"]
            file.seek(offset - tarfile.BLOCKSIZE)
            try:
                header = tarfile.TarInfo.frombuf(
                    file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape"
                )
                found = f"{header.name!r} of {header.size:,} bytes"
            except tarfile.HeaderError:
                header, found = None, "no member"
            if header is None or header.size != size or not _is_named(header.name, entry["key"]):
                raise DataError(
                    f"{path}: the index says that pair {entry['key']!r} has a picture of {size:,} "
                    f"bytes at {offset:,}, found {found}; index or shard is another's, write the "
                    f"index again or restore the file"
                )


def _is_named(name: str, key: str) -> bool:
    """Compare where the header itself can hold the name: short and plain, else it is elsewhere."""
    if not key.isascii() or len(key) > 80:
        return True
    return name.removeprefix("./").startswith(f"{key.rpartition('/')[2]}.") or f"{key}." in name


def describe_sources(settings: Data, languages: Sequence[str] = LANGUAGES) -> list[str]:
    """Return the shard plan as lines: pairs, shards, bytes, share and lanes of each source.

    Reads indexes, and needs neither tokenizer nor GPU. Raises what open_sources does.
    """
    return plan_lines(open_sources(settings, languages), settings)


def plan_lines(sources: list[TrainingSource], settings: Data) -> list[str]:
    """describe_sources of sources that are open."""
    mixture = Mixture([source.weight for source in sources], settings.batch_size)
    pairs = sum(source.pairs for source in sources)
    steps = max(1, pairs // settings.batch_size)
    lines = []
    for i, source in enumerate(sources):
        share = mixture.per_window[i] / mixture.per_window.sum()
        passes = share * steps * settings.batch_size / source.pairs
        lanes = max(1, int(mixture.fewest()[i]) // LANE_ROWS)
        without = f", {source.left_out:,} more without a caption" if source.left_out else ""
        lines.append(
            f"{source.path}: {source.pairs:,} pairs ({' '.join(source.languages)}){without} in "
            f"{len(source.shards):,} shards of {source.size_bytes / 1e9:.2f} GB; {share:.1%} of "
            f"each batch, {passes:.2f} passes per epoch, {lanes} lanes"
        )
    kind = "every pair once per pass" if settings.order == "exact" else "shards drawn anew"
    lines.append(f"{pairs:,} pairs, {steps:,} steps of {settings.batch_size:,} per epoch, {kind}")
    return lines


def source_texts(settings: Data) -> Iterator[str]:
    """Yield every caption that a run may train on, source by source, wherever it lies.

    A tokenizer is trained on them. Raises what open_sources does, and DataError on a damaged pair.
    """
    for source in open_sources(settings):
        files = ShardFiles(source.folder, source.shards, limit=1)
        for number, shard in enumerate(source.shards):
            for place in range(shard.pairs):
                captions = files.pair(number, place).captions
                for language in sorted(captions.keys() & set(source.languages)):
                    yield from captions[language]
