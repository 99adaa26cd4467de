"""Shards: what is written comes back, to the byte, and damage is named in one line."""

import gc
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2encoder.errors import DataError
from m2encoder.shards import INDEX_NAME, Pair, ShardIndex, ShardReader, write_shards

CAPTIONS = {
    "zh": [
        "一只猫",
        "一隻貓在窗臺上，曬著太陽。",
        "ＡＢＣ　１２３！",
        "🐱🏽‍🚀❤️",
        "",
        "长" * 10_000,
        'a "quoted" \\ line\nand\ttabs\x00',
    ],
    "en": ["a cat", "  spaces  kept  ", "naïve café"],
}


def make_pairs(count: int = 5) -> list[Pair]:
    return [
        Pair(
            key=f"pair-{i:03d}",
            image=bytes([i]) * (500 * i),  # sizes on and off tar's 512-byte blocks, one empty
            captions={"zh": [f"第{i}张"], "en": [f"number {i}", f"no. {i}"]},
            meta={"label": f"类{i}", "nested": {"box": [i, 1.5, None]}},
            image_ext="jpg" if i % 2 else "png",
        )
        for i in range(count)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of five pairs in three shards."""
    write_shards(make_pairs(), tmp_path, pairs_per_shard=2)
    return tmp_path


# ── round trip ──────────────────────────────────────────────────────────────────────────────────


def test_what_is_written_is_read_back(folder: Path) -> None:
    reader = ShardReader(folder)
    assert list(reader) == make_pairs()
    assert [reader[i] for i in (4, 0, 2)] == [make_pairs()[i] for i in (4, 0, 2)]
    assert reader.keys == [pair.key for pair in make_pairs()]
    reader.verify()


def test_the_index_counts_pairs_captions_and_shards(folder: Path) -> None:
    index = ShardReader(folder).index
    assert (index.count, index.captions) == (5, {"en": 10, "zh": 5})
    assert [shard.name for shard in index.shards] == [f"shard-00000{i}.tar" for i in range(3)]
    assert [len(shard.pairs) for shard in index.shards] == [2, 2, 1]


def test_captions_of_every_kind_survive(tmp_path: Path) -> None:
    write_shards([Pair("one", b"x", CAPTIONS)], tmp_path)
    assert ShardReader(tmp_path)[0].captions == CAPTIONS


@settings(max_examples=50, deadline=None)
@given(
    image=st.binary(max_size=2_000),
    captions=st.dictionaries(
        st.sampled_from(["zh", "en", "zh-Hant"]),
        st.lists(st.text(st.characters(exclude_categories=["Cs"]))),
    ),
)
def test_any_bytes_and_any_text_survive(
    tmp_path_factory: pytest.TempPathFactory, image: bytes, captions: dict[str, list[str]]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    write_shards([Pair("a", image, captions), Pair("b", b"", {})], folder)
    assert ShardReader(folder)[0] == Pair("a", image, captions)
    shutil.rmtree(folder)


def test_the_same_pairs_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    write_shards(make_pairs(), again, pairs_per_shard=2)
    for path in again.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()


def test_pairs_are_drawn_from_a_generator_one_shard_at_a_time(tmp_path: Path) -> None:
    written_before: list[int] = []

    def stream() -> Iterator[Pair]:
        for pair in make_pairs(6):
            written_before.append(len(list(tmp_path.glob("*.tar"))))
            yield pair

    write_shards(stream(), tmp_path, pairs_per_shard=2)
    assert written_before == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("key", ["猫", "k" * 300, "with space"])
def test_chinese_and_long_keys_are_found_again(tmp_path: Path, key: str) -> None:
    pairs = [Pair(key, b"first", {"zh": ["一"]}), Pair("next", b"second", {"zh": ["二"]})]
    write_shards(pairs, tmp_path)
    assert list(ShardReader(tmp_path)) == pairs


def test_attribution_is_kept(tmp_path: Path) -> None:
    write_shards(make_pairs(1), tmp_path, attribution="图 © somebody")
    assert ShardReader(tmp_path).index.attribution == "图 © somebody"


def test_a_shorter_second_run_leaves_no_shard_of_the_first(folder: Path) -> None:
    (folder / "mine.tar").write_bytes(b"not ours")
    write_shards(make_pairs(1), folder)
    assert sorted(path.name for path in folder.glob("*.tar")) == ["mine.tar", "shard-000000.tar"]


def test_an_interrupted_run_leaves_no_index(folder: Path) -> None:
    with pytest.raises(DataError, match="appears twice"):
        write_shards([*make_pairs(3), make_pairs(1)[0]], folder, pairs_per_shard=2)
    assert not (folder / INDEX_NAME).exists()


# ── other readers ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_webdataset_reads_the_same_samples_in_the_same_order(folder: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    urls = [str(folder / shard.name) for shard in ShardReader(folder).index.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    gc.collect()  # webdataset 1.0 leaves its files to the collector: let it warn here, not later
    assert len(samples) == 5
    for sample, pair in zip(samples, ShardReader(folder), strict=True):
        assert sample["__key__"] == pair.key
        assert sample[pair.image_ext] == pair.image
        record = json.loads(sample["json"])
        assert (record["captions"], record["meta"]) == (pair.captions, pair.meta)


def test_plain_tar_tools_find_two_files_per_pair(folder: Path) -> None:
    with tarfile.open(folder / "shard-000000.tar") as tar:
        names = tar.getnames()
        assert names == ["pair-000.png", "pair-000.json", "pair-001.jpg", "pair-001.json"]
        assert {(member.mtime, member.uid) for member in tar} == {(0, 0)}


# ── bad input ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ([], "no pairs to write, expected at least one"),
        ([Pair("a", b"", {}), Pair("a", b"", {})], "key 'a' appears twice, keys must be unique"),
        ([Pair("a.b", b"", {})], "key 'a.b': expected a name without dots and slashes"),
        ([Pair("a/b", b"", {})], "key 'a/b': expected a name without dots and slashes"),
        ([Pair("a\\b", b"", {})], "expected a name without dots and slashes"),
        ([Pair("", b"", {})], "key '': expected a name"),
        ([Pair("a", b"", {"zh": ["\ud83d"]})], "key 'a': text that UTF-8 cannot hold"),
    ],
)
def test_pairs_that_cannot_be_stored_are_refused_in_one_line(
    tmp_path: Path, pairs: list[Pair], words: str
) -> None:
    with pytest.raises(DataError) as caught:
        write_shards(pairs, tmp_path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_shard_size_below_one_is_the_callers_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pairs_per_shard must be at least 1, got 0"):
        write_shards(make_pairs(), tmp_path, pairs_per_shard=0)


def _truncate(folder: Path) -> None:
    path = folder / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:-1_000])


def _remove_shard(folder: Path) -> None:
    (folder / "shard-000001.tar").unlink()


def _remove_index(folder: Path) -> None:
    (folder / INDEX_NAME).unlink()


def _write_index(text: str | bytes) -> Callable[[Path], None]:
    content = text if isinstance(text, bytes) else text.encode()

    def write(folder: Path) -> None:
        (folder / INDEX_NAME).write_bytes(content)

    return write


def _drop_pairs(folder: Path) -> None:
    raw = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
    raw["shards"][0]["pairs"].pop()
    (folder / INDEX_NAME).write_text(json.dumps(raw), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_truncate, "shard-000001.tar: truncated or changed shard, 9,240 bytes found, 10,240"),
        (_remove_shard, "shard-000001.tar: missing shard, the index lists it"),
        (_remove_index, "index.json: missing index; write it with: m2enc data index "),
        (_write_index('{"format": 1, "cou'), "index.json: damaged index (JSONDecodeError"),
        (_write_index(b"\xff\xfe"), "index.json: damaged index (UnicodeDecodeError"),
        (_write_index("[]"), "index.json: damaged index (TypeError"),
        (_write_index('{"count": 1}'), "index.json: damaged index (KeyError: 'format')"),
        (_write_index('{"format": 1, "shards": []}'), "index.json: damaged index (TypeError"),
        (_write_index('{"format": 99}'), "index.json: index format 99, this version reads 1"),
        (_drop_pairs, "index.json: damaged index (ValueError: lists 4 keys, says 5)"),
    ],
)
def test_damage_is_found_on_opening_and_named_in_one_line(
    folder: Path, damage: Callable[[Path], None], words: str
) -> None:
    damage(folder)
    with pytest.raises(DataError) as caught:
        ShardReader(folder)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def _flip_byte(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0xFF
    path.write_bytes(content)


def test_a_changed_byte_is_found_by_verify(folder: Path) -> None:
    reader = ShardReader(folder)
    extension, offset, size = reader.index.shards[1].pairs[0]["image"]
    assert (extension, size) == ("png", 1_000)
    _flip_byte(folder / "shard-000001.tar", offset + 7)
    with pytest.raises(DataError, match=r"shard-000001\.tar: sha256 \w{12}… differs from the ind"):
        ShardReader(folder).verify()


def test_a_damaged_record_is_named_when_its_pair_is_read(folder: Path) -> None:
    offset, _ = ShardReader(folder).index.shards[1].pairs[0]["json"]
    _flip_byte(folder / "shard-000001.tar", offset)
    reader = ShardReader(folder)
    assert reader[3] == make_pairs()[3]
    with pytest.raises(DataError, match=r"shard-000001\.tar: pair 'pair-002' is damaged"):
        reader[2]


def test_a_shard_that_vanishes_after_opening_is_named(folder: Path) -> None:
    reader = ShardReader(folder)
    _remove_shard(folder)
    for read in (reader.verify, lambda: reader[2]):
        with pytest.raises(DataError, match=r"shard-000001\.tar: missing shard, the index lists"):
            read()


def test_reading_past_the_end_is_an_index_error(folder: Path) -> None:
    with pytest.raises(IndexError):
        ShardReader(folder)[5]


def test_an_index_can_be_saved_and_loaded_again(folder: Path, tmp_path: Path) -> None:
    index = ShardIndex.load(folder)
    index.save(tmp_path)
    assert ShardIndex.load(tmp_path) == index
