"""`m2enc data`: write the demo data, index others' tars, and check a shard folder.

Not for training or evaluation; results go to stdout, errors are raised for the caller to print.
"""

from pathlib import Path
from typing import Literal


def demo(
    *,
    out: Path,
    source: Literal["scenes", "emoji"] = "scenes",
    seed: int = 0,
    train_pairs: int = 12_000,
    test_pairs: int = 400,
    archives: list[Path] | None = None,
) -> int:
    """Write demo data with Chinese and English captions as shards.

    Args:
        out: Folder to write `train`, `test` and (scenes) `val` into.
        source: Drawn scenes, which need no download, or emoji art from two npm archives.
        seed: Another seed gives other pictures and other held-out combinations (scenes).
        train_pairs: Pictures to train on (scenes).
        test_pairs: Pictures of held-out combinations (scenes).
        archives: The archives emoji-datasource-google and emoji-datasource-twitter (emoji).
    """
    if source == "scenes":
        from m2encoder.data_pipeline.scenes import make_scenes

        indexes = make_scenes(out, seed=seed, train_pairs=train_pairs, test_pairs=test_pairs)
    else:
        from m2encoder.data_pipeline.emoji import make_emoji

        indexes = make_emoji(out, archives=archives or [])
    for split, index in indexes.items():
        print(f"{out / split}: {_counts(index.count, index.captions, len(index.shards))}")
    if attribution := indexes["train"].attribution:
        print(attribution)
    return 0


def index(tars: list[Path], *, text_language: str | None = None) -> int:
    """Write index.json beside webdataset tars of others, so that they can be trained on.

    Args:
        tars: A folder of tars, or tars of one folder.
        text_language: Language of captions that name none, such as zh; else told by script.
    """
    from m2encoder.data_pipeline.foreign_index import index_tars

    found = index_tars(tars, text_language=text_language)
    counts = _counts(found.index.count, found.index.captions, len(found.index.shards))
    print(f"{found.folder}: {counts}")
    left_out = "".join(f" + {n:,} {reason}" for reason, n in sorted(found.dropped.items()))
    print(f"{found.samples:,} samples = {found.index.count:,} pairs{left_out}")
    return 0


def verify(folder: Path) -> int:
    """Compare every shard of a folder with its index: sizes, hashes and captions.

    Args:
        folder: A folder with `index.json` and its tars.
    """
    from m2encoder.errors import DataError
    from m2encoder.shards import ShardReader

    reader = ShardReader(folder)
    reader.verify()
    captions: dict[str, int] = {}
    for pair in reader:
        for language, texts in pair.captions.items():
            captions[language] = captions.get(language, 0) + len(texts)
    if captions != reader.index.captions:
        raise DataError(
            f"{folder}: captions {captions} found, the index says {reader.index.captions}; "
            f"write the shards again"
        )
    print(f"{folder}: {_counts(len(reader), captions, len(reader.index.shards))}, undamaged")
    return 0


def _counts(pairs: int, captions: dict[str, int], shards: int) -> str:
    languages = ", ".join(f"{count:,} {language}" for language, count in sorted(captions.items()))
    return f"{pairs:,} pairs, captions {languages}, {shards} shard{'s' * (shards != 1)}"
