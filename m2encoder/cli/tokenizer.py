"""`m2enc tokenizer`: train a tokenizer on the captions of shards or the lines of text files."""

from collections.abc import Iterator
from pathlib import Path


def train(sources: list[Path], *, out: Path, vocab_size: int = 4000) -> int:
    """Train a bilingual SentencePiece tokenizer and write it as one file.

    Args:
        sources: shard folders, or UTF-8 text files with one text per line.
        out: the file to write, for example sp.model.
        vocab_size: pieces at most; little text gives fewer.
    """
    from m2encoder.tokenizer import TextTokenizer, train_tokenizer

    model = train_tokenizer(read_texts(sources), vocab_size=vocab_size)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(model)
    pieces = TextTokenizer(model, max_length=52).vocab_size
    print(f"{out}: {pieces:,} pieces")
    return 0


def read_texts(sources: list[Path]) -> Iterator[str]:
    """Yield every caption and line of the sources. Raises DataError on one that is missing."""
    from m2encoder.errors import DataError
    from m2encoder.shards import ShardReader

    for source in sources:
        if source.is_dir():
            for pair in ShardReader(source):
                for texts in pair.captions.values():
                    yield from texts
            continue
        try:
            yield from source.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            raise DataError(f"{source}: no such file or shard folder; check the path") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{source}: not UTF-8 ({error}); convert it first") from None
