"""An index for tars that others wrote: what counts as a pair, in which language, and training.

Not for our own shards (tests/test_shards.py).
"""

import io
import json
import tarfile

import pytest
from PIL import Image

from m2encoder.cli import main
from m2encoder.config import Data
from m2encoder.data_pipeline.foreign_index import index_tars
from m2encoder.data_pipeline.stream import TrainingStream
from m2encoder.errors import ConfigError, DataError
from m2encoder.pair_record import language_of
from m2encoder.released_tokenizer import load_tokenizer
from m2encoder.shards import ShardReader


def picture(colour=(10, 90, 200), kind="JPEG"):
    encoded = io.BytesIO()
    Image.new("RGB", (12, 9), colour).save(encoded, kind)
    return encoded.getvalue()


def record(**fields):
    return json.dumps(fields, ensure_ascii=False).encode()


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


CASES = {
    "txt": ({"txt": "一只猫".encode()}, {"zh": ["一只猫"]}),
    "english": ({"txt": b"a cat\n"}, {"en": ["a cat"]}),
    "bom": ({"txt": "\ufeff猫 cat 🐱".encode()}, {"zh": ["猫 cat 🐱"]}),
    "traditional": ({"txt": "貓，ＡＢＣ".encode()}, {"zh": ["貓，ＡＢＣ"]}),
    "ours": (
        {"json": record(captions={"zh": ["狗"], "en": ["dog", "a dog"]}, meta={"n": 1})},
        {"zh": ["狗"], "en": ["dog", "a dog"]},
    ),
    "tagged": (
        {"json": record(caption_zh="房子", caption_en="a house", width=3)},
        {"zh": ["房子"], "en": ["a house"]},
    ),
    "img2dataset": (
        {"json": record(caption="a tree", url="http://x", status="success"), "txt": b"a tree"},
        {"en": ["a tree"]},
    ),
    "list": ({"json": record(captions=["树", "a tree"])}, {"zh": ["树"], "en": ["a tree"]}),
    "text": ({"json": record(text="x" * 20_000)}, {"en": ["x" * 20_000]}),
}
BAD = {
    "without a picture": {"txt": b"alone"},
    "with several pictures": {"jpg": picture(), "png": picture(kind="PNG"), "txt": b"two"},
    "without a caption": {"jpg": picture(), "txt": " \u3000\n".encode()},
    "with text that is not UTF-8": {"jpg": picture(), "txt": "一只猫在睡觉".encode("gb18030")},
    "with JSON that cannot be read": {"jpg": picture(), "json": b"{", "txt": b"a cat"},
}


@pytest.fixture
def foreign(tmp_path):
    """Two tars; the second repeats a key, has a folder, odd extensions and what is no pair."""
    folder = tmp_path / "外来"
    members = []
    for key, (others, _) in CASES.items():
        members.append((f"{key}.jpg", picture()))
        members += [(f"{key}.{kind}", data) for kind, data in others.items()]
    write_tar(folder / "a.tar", members)
    members = [("txt.JPG", picture()), ("txt.txt", b"the same key"), ("README", b"no sample")]
    members += [("sub/图片.webp", picture(kind="WEBP")), ("sub/图片.txt", "图".encode())]
    for i, kinds in enumerate(BAD.values()):
        members += [(f"bad{i}.{kind}", data) for kind, data in kinds.items()]
    write_tar(folder / "b.tar", members)
    return folder


def test_every_sample_is_kept_or_counted_by_reason(foreign):
    found = index_tars([foreign])
    assert found.folder == foreign
    assert found.dropped == dict.fromkeys(BAD, 1) | {"without a picture": 2}  # README too
    assert found.samples == found.index.count + found.dropped.total() == 17
    assert found.index.captions == {"zh": 7, "en": 8}


def test_a_reader_finds_pictures_and_captions(foreign):
    index_tars([foreign])
    reader = ShardReader(foreign)
    reader.verify()
    pairs = {pair.key: pair for pair in reader}
    assert set(pairs) == {*CASES, "b/txt", "sub/图片"}
    for key, (_, captions) in CASES.items():
        assert pairs[key].captions == captions
        assert pairs[key].image == picture()
    assert pairs["b/txt"].captions == {"en": ["the same key"]}
    assert pairs["sub/图片"].image == picture(kind="WEBP")
    assert pairs["ours"].meta == {"n": 1}
    assert pairs["tagged"].meta == {"width": 3}


def test_a_stated_language_holds_for_captions_that_name_none(foreign):
    index_tars([foreign], text_language="zh")
    pairs = {pair.key: pair for pair in ShardReader(foreign)}
    assert pairs["english"].captions == {"zh": ["a cat"]}
    assert pairs["tagged"].captions == {"zh": ["房子"], "en": ["a house"]}


def test_foreign_tars_can_be_trained_on(foreign, tiny_model_folder):
    index_tars([foreign / "b.tar", foreign / "a.tar"])
    tokenizer = load_tokenizer(tiny_model_folder / "sp.model", max_length=24)
    stream = TrainingStream(
        Data(train=str(foreign), batch_size=11), image_size=32, tokenizer=tokenizer, seed=0
    )
    (batch,) = stream.batches(0, 1)
    assert batch.dropped == []
    assert sorted(batch.keys) == sorted([*CASES, "b/txt", "sub/图片"])
    assert set(batch.texts["zh"]) >= {"一只猫", "貓，ＡＢＣ", "猫 cat 🐱", "图"}
    assert "the same key" in batch.texts["en"]


def test_the_command_prints_what_became_of_each_sample(foreign, capsys):
    assert main(["data", "index", str(foreign)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{foreign}: 11 pairs, captions 8 en, 7 zh, 2 shards"
    assert second == (
        "17 samples = 11 pairs + 1 with JSON that cannot be read + 1 with several pictures + 1 "
        "with text that is not UTF-8 + 1 without a caption + 2 without a picture"
    )
    assert main(["data", "verify", str(foreign)]) == 0
    assert main(["data", "index", str(foreign)]) == 2
    assert "there is an index already; remove it" in capsys.readouterr().err


def test_an_unindexed_folder_is_refused_with_the_command_that_helps(foreign, tiny_model_folder):
    tokenizer = load_tokenizer(tiny_model_folder / "sp.model", max_length=24)
    with pytest.raises(DataError, match=r"missing index; write it with: m2enc data"):
        TrainingStream(Data(train=str(foreign)), image_size=32, tokenizer=tokenizer, seed=0)


def test_damaged_tars_leave_no_index(foreign):
    tar = foreign / "a.tar"
    tar.write_bytes(tar.read_bytes()[:-9000])
    with pytest.raises(DataError, match=r"a\.tar"):
        index_tars([foreign])
    assert not (foreign / "index.json").exists()


def test_what_cannot_be_indexed_is_refused(foreign, tmp_path):
    write_tar(tmp_path / "elsewhere/c.tar", [("x.txt", b"only text")])
    with pytest.raises(ConfigError, match=r"c\.tar: expected a tar of .*, as the first is"):
        index_tars([foreign / "a.tar", tmp_path / "elsewhere/c.tar"])
    with pytest.raises(DataError, match=r"no pair in 1 samples \(1 without a picture\)"):
        index_tars([tmp_path / "elsewhere"])
    with pytest.raises(DataError, match=r"nothing\.tar: no such file"):
        index_tars([tmp_path / "nothing.tar"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no \.tar files"):
        index_tars([tmp_path / "empty"])


@pytest.mark.parametrize(
    ("text", "language"),
    [("猫", "zh"), ("貓", "zh"), ("a 猫", "zh"), ("cat", "en"), ("", "en"), ("🐱", "en"),
     ("ＡＢＣ", "en"), ("𠮷野家", "zh"), ("〇", "zh")],
)  # fmt: skip
def test_a_chinese_character_makes_a_caption_chinese(text, language):
    assert language_of(text) == language
