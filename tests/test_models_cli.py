"""`m2enc models ls` and `m2enc models info`, called as the functions behind them.

Not for fetching (test_sources.py) nor `models verify`.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from m2encoder.cli.models import describe_folder, info, ls, read_header
from m2encoder.convert import EXTRAS
from m2encoder.errors import CheckpointError
from m2encoder.golden import GOLDEN
from m2encoder.load import load_model
from m2encoder.sources import cache_folder, sha256_of

CARD = """---
language: [zh, en]
license: cc-by-4.0
---
# 猫
"""


@pytest.fixture
def folder(tiny_model_folder, tmp_path):
    """A copy of the tiny model folder under a Chinese name, with a card."""
    copy = Path(shutil.copytree(tiny_model_folder, tmp_path / "小模型"))
    (copy / "README.md").write_text(CARD, encoding="utf-8")
    return copy


@pytest.fixture
def home(monkeypatch, tmp_path):
    """An empty cache of Hugging Face's library."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "缓存"))


def printed(capsys, *arguments, command=info, **options):
    assert command(*arguments, **options) == 0
    return capsys.readouterr().out


# --- ls ----------------------------------------------------------------------------------------


def test_ls_names_each_released_model_with_its_size(capsys, home):
    lines = [line.split() for line in printed(capsys, command=ls).splitlines()]
    assert lines[0][:2] == ["model", "parameters"]
    assert {line[0]: line[1] for line in lines[1:]} == {
        "m2-encoder-0.4b": "240,225,793",
        "m2-encoder-1b": "689,440,769",
        "m2-encoder-10b": "9,552,535,553",
    }
    assert {line[-1] for line in lines[1:]} == {"no"}


def test_ls_says_what_has_been_fetched(capsys, home, folder):
    shutil.copytree(folder, cache_folder("m2-encoder-1b"))
    models = json.loads(printed(capsys, command=ls, json=True))
    assert {m["name"]: m["cached"] for m in models} == {
        "m2-encoder-0.4b": False,
        "m2-encoder-1b": True,
        "m2-encoder-10b": False,
    }
    assert models[1]["folder"] == str(cache_folder("m2-encoder-1b"))
    assert models[1]["languages"] == ["zh", "en"]
    assert models[1]["sources"][0]["repository"] == "M_Square/M2_Encoder_Large"


def test_ls_loads_no_torch():
    code = "import sys; from m2encoder.cli.models import ls; ls(); print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "False"


# --- info of a name ----------------------------------------------------------------------------


def test_info_of_a_released_model_names_its_sources_and_what_is_unclear(capsys, home):
    shown = printed(capsys, "m2-encoder-1b")
    assert "parameters    689,440,769; 40,975,361 more never used" in shown
    assert "source        modelscope:M_Square/M2_Encoder_Large/m2_encoder_1B.ckpt (release" in shown
    assert "source        hf:acai66/M2_Encoder_Large/m2_encoder_1B.ckpt (third-party copy" in shown
    assert "licence       unclear" in shown
    assert "fetched       no" in shown
    assert json.loads(printed(capsys, "m2-encoder-1b", json=True))["dim"] == 1024


@pytest.mark.parametrize("name", ["m2-encoder-tiny", "m2-encoder-2b", "没有", "", "x" * 300])
def test_info_of_nothing_is_one_line(name, home):
    with pytest.raises(CheckpointError, match="neither a model folder nor a released") as caught:
        info(name)
    assert "\n" not in str(caught.value)


# --- info of a folder --------------------------------------------------------------------------


def test_info_of_a_folder_agrees_with_the_model_in_it(folder):
    encoder, facts = load_model(folder, device="cpu"), describe_folder(folder)
    assert facts["parameters"] == sum(p.numel() for p in encoder.model.parameters())
    assert facts["name"] == "小模型"
    assert (facts["model_type"], facts["dtypes"]) == ("m2_encoder", ["F32"])
    assert facts["dim"] == encoder.dim
    assert facts["image_size"] == encoder.image_processor.size_px
    assert encoder.tokenizer is not None
    assert facts["max_text_length"] == encoder.tokenizer.model_max_length
    assert facts["truncation_side"] == encoder.tokenizer.truncation_side
    assert facts["text_normalization"] == "none"
    assert (facts["languages"], facts["licence"]) == (["zh", "en"], "cc-by-4.0")
    weights = folder / "model.safetensors"
    assert facts["weights"] == {
        "model.safetensors": {"bytes": weights.stat().st_size, "sha256": sha256_of(weights)}
    }
    assert {"sp.model", GOLDEN} <= set(facts["also"]) <= {path.name for path in folder.iterdir()}


def test_info_of_a_folder_prints_a_line_for_each_fact(capsys, folder):
    shown, facts = printed(capsys, str(folder)), describe_folder(folder)
    assert f"parameters    {facts['parameters']:,} (F32)\n" in shown
    assert "pictures      32 x 32 pixels\n" in shown
    assert "texts         up to 52 tokens, left truncation, normalisation none\n" in shown
    assert "languages     zh, en\n" in shown
    assert f"sha256 {facts['weights']['model.safetensors']['sha256']}" in shown
    assert json.loads(printed(capsys, str(folder), json=True)) == facts


def test_numbers_kept_apart_and_weights_in_several_files_are_counted(folder):
    before = describe_folder(folder)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    for part, chosen in enumerate((names[::2], names[1::2])):
        save_file({n: tensors[n] for n in chosen}, folder / f"model-{part}.safetensors")
    save_file({"norm.weight": tensors[names[0]]}, folder / EXTRAS)
    (folder / "model.safetensors").unlink()
    after = describe_folder(folder)
    assert after["parameters"] == before["parameters"]
    assert after["extra_parameters"] == tensors[names[0]].numel()
    assert list(after["weights"]) == [
        "model-0.safetensors", "model-1.safetensors", EXTRAS
    ]  # fmt: skip


def test_a_folder_without_card_and_tokenizer_says_what_it_can(capsys, folder):
    for name in ("README.md", "tokenizer.json", "sp.model"):
        (folder / name).unlink()
    facts = describe_folder(folder)
    assert [facts[n] for n in ("languages", "licence", "truncation_side")] == [None, None, None]
    assert "licence       not stated" in printed(capsys, str(folder))


@pytest.mark.parametrize("text", ["", "# no head", "---\nonly: one line", "---\n- a\n---\n"])
def test_a_card_without_metadata_states_nothing(folder, text):
    (folder / "README.md").write_text(text, encoding="utf-8")
    assert describe_folder(folder)["licence"] is None


DAMAGES = {
    "config.json": [(b"", "config.json: damaged"), (b"[]", "holds a list, expected an object")],
    "README.md": [(b"---\na: [\n---\n", "README.md: its head is not YAML")],
    "tokenizer.json": [(b"{}", "tokenizer.json: damaged, not a tokenizer")],
    "tokenizer_config.json": [("繁體".encode("gbk"), "tokenizer_config.json: damaged")],
    "model.safetensors": [
        (b"", "no safetensors header; is the file damaged?"),
        (b"\xff" * 8, "no safetensors header"),
        (b"\x02\0\0\0\0\0\0\0[]", "no safetensors header"),
        (b"\x04\0\0\0\0\0\0\0null", "no safetensors header"),
        (b"\x02\0\0\0\0\0\0\0{}\0", "has 11 bytes, expected 10; copy it again"),
    ],
}


@pytest.mark.parametrize(
    ("name", "content", "message"), [(n, *damage) for n, ds in DAMAGES.items() for damage in ds]
)
def test_a_damaged_file_is_one_line(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        describe_folder(folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_truncated_weights_file_says_how_much_is_missing(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    with pytest.raises(CheckpointError, match=f"expected {len(whole):,}; copy it again"):
        read_header(path)


def test_a_folder_that_is_no_model_folder_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json, expected a model folder"):
        info(str(tmp_path))
