"""The emoji source, with tiny archives of the real layout; the real ones where they are at hand."""

import io
import json
import os
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m2encoder.cli.data import demo, verify
from m2encoder.data_pipeline.emoji import (
    Style,
    attribution_text,
    clean_name,
    make_emoji,
    name_concepts,
)
from m2encoder.errors import DataError, MissingExtraError
from m2encoder.images import open_image
from m2encoder.shards import ShardReader

COLOURS: dict[Style, tuple[int, int, int]] = {"google": (200, 0, 0), "twitter": (0, 0, 200)}
UNIFIED = ["2764-FE0F", "1F600", "1F468-200D-1F680", "1F3FB", "1F1E8-1F1F3", "0031-FE0F-20E3"]
"""Red heart, grin, man astronaut, a bare skin tone, a flag, keycap 1."""


def picture(style: Style) -> bytes:
    """Return a square of the style's colour in the middle; around it, invisible black."""
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image.paste((*COLOURS[style], 255), (16, 16, 48, 48))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def write_archive(
    path: Path, style: Style, unified: list[str] = UNIFIED, *, table_json: bytes | None = None
) -> Path:
    """Write what matters of emoji-datasource-STYLE; `table_json` stands in for its table."""
    table: list[dict[str, Any]] = [
        {"unified": code, "image": f"{code.lower()}.png", "name": code} for code in unified
    ]
    files = {f"package/img/{style}/64/{row['image']}": picture(style) for row in table}
    files["package/README.md"] = b"# not needed"
    files[f"package/img/{style}/sheets/64.png"] = b"not needed either"
    files["package/emoji.json"] = table_json or json.dumps(table).encode()
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def archives(tmp_path: Path) -> list[Path]:
    pytest.importorskip("emoji")
    return [
        write_archive(tmp_path / "twitter.tgz", "twitter"),
        write_archive(tmp_path / "google.tgz", "google"),
    ]


def test_both_splits_show_the_same_concepts_in_their_own_style(
    archives: list[Path], tmp_path: Path
) -> None:
    indexes = make_emoji(tmp_path / "out", archives=archives)
    assert {split: index.count for split, index in indexes.items()} == {"train": 5, "test": 5}
    train, test = ShardReader(tmp_path / "out/train"), ShardReader(tmp_path / "out/test")
    assert train.keys == test.keys
    styles: dict[Style, ShardReader] = {"google": train, "twitter": test}
    for style, reader in styles.items():
        assert {pair.meta["style"] for pair in reader} == {style}
        assert open_image(reader[0].image).getpixel((32, 32)) == COLOURS[style]


def test_captions_are_the_human_names_in_both_languages(
    archives: list[Path], tmp_path: Path
) -> None:
    make_emoji(tmp_path / "out", archives=archives)
    captions = {pair.meta["emoji"]: pair.captions for pair in ShardReader(tmp_path / "out/train")}
    assert captions["❤️"] == {"zh": ["红心"], "en": ["red heart"]}
    assert captions["🇨🇳"] == {"zh": ["中国"], "en": ["China"]}
    assert captions["1️⃣"] == {"zh": ["按键 1"], "en": ["keycap 1"]}


def test_bare_skin_tones_are_left_out(archives: list[Path], tmp_path: Path) -> None:
    make_emoji(tmp_path / "out", archives=archives)
    assert "1f3fb" not in ShardReader(tmp_path / "out/train").keys


def test_transparent_pixels_become_white(archives: list[Path], tmp_path: Path) -> None:
    make_emoji(tmp_path / "out", archives=archives, size_px=32)
    pixels = np.asarray(open_image(ShardReader(tmp_path / "out/train")[0].image))
    assert pixels.shape == (32, 32, 3)
    assert pixels[0, 0].tolist() == [255, 255, 255]


def test_styles_can_be_exchanged(archives: list[Path], tmp_path: Path) -> None:
    make_emoji(tmp_path, archives=archives, train_style="twitter", test_style="google")
    assert {pair.meta["style"] for pair in ShardReader(tmp_path / "train")} == {"twitter"}


def test_attribution_lies_in_both_indexes_and_beside_them(
    archives: list[Path], tmp_path: Path
) -> None:
    make_emoji(tmp_path / "out", archives=archives)
    text = attribution_text(["google", "twitter"])
    assert "CC-BY 4.0" in text
    assert "Apache License 2.0" in text
    assert (tmp_path / "out/ATTRIBUTION.txt").read_text(encoding="utf-8") == text + "\n"
    for split in ("train", "test"):
        assert ShardReader(tmp_path / "out" / split).index.attribution == text


def test_an_emoji_that_one_style_lacks_is_left_out(archives: list[Path], tmp_path: Path) -> None:
    write_archive(archives[0], "twitter", UNIFIED[:2])
    write_archive(archives[1], "google", UNIFIED)
    assert make_emoji(tmp_path / "out", archives=archives)["train"].count == 2


def test_the_command_prints_counts_and_attribution(
    archives: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo(out=tmp_path / "out", source="emoji", archives=archives) == 0
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'out/test'}: 5 pairs, captions 5 en, 5 zh, 1 shard" in printed
    assert attribution_text(["google", "twitter"]) in printed


def test_the_scenes_command_writes_folders_that_verify(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo(out=tmp_path, train_pairs=10, test_pairs=4) == 0
    assert verify(tmp_path / "test") == 0
    assert capsys.readouterr().out.endswith(
        f"{tmp_path / 'test'}: 4 pairs, captions 8 en, 8 zh, 1 shard, undamaged\n"
    )


def test_verify_notices_captions_that_the_index_does_not_count(tmp_path: Path) -> None:
    demo(out=tmp_path, train_pairs=3, test_pairs=3)
    path = tmp_path / "test/index.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(raw | {"captions": {"en": 6, "zh": 7}}), encoding="utf-8")
    with pytest.raises(DataError, match=r"captions .* found, the index says"):
        verify(tmp_path / "test")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (":red_heart:", "red heart"),
        (":红心:", "红心"),
        (":按键_#:", "按键 #"),
        (":A_button_(blood_type):", "A button (blood type)"),
        (":one-thirty:", "one-thirty"),
    ],
)
def test_names_lose_their_colons_and_underscores(name: str, expected: str) -> None:
    assert clean_name(name) == expected


# ── bad input ───────────────────────────────────────────────────────────────────────────────────

ADVICE = "fetch them with: npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0"


def _refused(archives: list[Path], out_dir: Path) -> str:
    with pytest.raises(DataError) as caught:
        make_emoji(out_dir, archives=archives)
    message = str(caught.value)
    assert message.endswith(ADVICE)
    assert "\n" not in message
    assert not out_dir.exists()
    return message


def test_no_archives_at_all_are_refused(tmp_path: Path) -> None:
    assert _refused([], tmp_path / "out").startswith("no archives: no 64 px pictures in google")


def test_a_missing_archive_is_named(archives: list[Path], tmp_path: Path) -> None:
    missing = tmp_path / "nowhere.tgz"
    message = _refused([archives[0], missing], tmp_path / "out")
    assert message.startswith(f"{missing}: no such archive")


def test_one_style_alone_is_refused(archives: list[Path], tmp_path: Path) -> None:
    message = _refused(archives[:1], tmp_path / "out")
    assert "no 64 px pictures in google style with their emoji.json found" in message


def test_another_tar_is_refused(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.tgz"
    with tarfile.open(wrong, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("package/index.js"))
    assert "no 64 px pictures in google style" in _refused([wrong], tmp_path / "out")


@pytest.mark.parametrize("damage", ["text", "cut near the end", "cut in half", "table"])
def test_a_damaged_archive_is_named(archives: list[Path], tmp_path: Path, damage: str) -> None:
    if damage == "text":
        archives[0].write_text("不是压缩包", encoding="utf-8")
    elif damage.startswith("cut"):
        content = archives[0].read_bytes()
        archives[0].write_bytes(
            content[: -20 if damage == "cut near the end" else len(content) // 2]
        )
    else:
        write_archive(archives[0], "twitter", table_json=b"[{")
    message = _refused(archives, tmp_path / "out")
    assert message.startswith(f"{archives[0]}: damaged archive (")


def test_a_damaged_table_is_a_data_error(archives: list[Path], tmp_path: Path) -> None:
    for content in (b'{"a": 1}', b'[{"unified": "xyz", "image": "x.png"}]', b"[{}]", b"[1]"):
        write_archive(archives[0], "twitter", table_json=content)
        assert "damaged emoji.json" in _refused(archives, tmp_path / "out")


def test_a_missing_package_names_its_install_line(
    archives: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "emoji", None)  # what Python does when it is not installed
    with pytest.raises(MissingExtraError, match=r"emoji is not .*pip install 'm2encoder\[data\]'"):
        make_emoji(tmp_path / "out", archives=archives)


# ── the real archives ───────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_the_real_archives_hold_1906_concepts_with_distinct_names(tmp_path: Path) -> None:
    """Set M2ENC_EMOJI_ARCHIVES to the folder with both archives (make demo-emoji fetches them)."""
    folder = Path(os.environ.get("M2ENC_EMOJI_ARCHIVES", "data/emoji"))
    archives = [folder / f"emoji-datasource-{style}-16.0.0.tgz" for style in COLOURS]
    if not all(path.is_file() for path in archives):
        pytest.skip(f"no archives in {folder}")
    indexes = make_emoji(tmp_path, archives=archives)
    assert {index.count for index in indexes.values()} == {1_906}
    for language in ("zh", "en"):
        names = {pair.captions[language][0] for pair in ShardReader(tmp_path / "train")}
        assert len(names) == 1_906


def test_toned_variants_inside_a_base_emoji_are_not_looked_at() -> None:
    pytest.importorskip("emoji")
    row = {"unified": "1F44B", "image": "1f44b.png", "skin_variations": {"1F3FB": {"unified": "x"}}}
    assert [concept.char for concept in name_concepts([row])] == ["👋"]
