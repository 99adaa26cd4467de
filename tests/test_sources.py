"""Released models by name: found in a table, downloaded from a hub on this machine, converted once.

With tiny files and tables of the tests' own. Not for what a hub can answer (test_hub.py), nor for
what conversion makes of a checkpoint.
"""

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import hub_server
from huggingface_hub import constants
from released_model import OFFICIAL, released, small_model
from test_hub import NEEDS_MODELSCOPE, settings

from m2encoder.errors import CheckpointError
from m2encoder.load import load_model
from m2encoder.presets import preset
from m2encoder.released_config import shape_from_config
from m2encoder.sources import cache_folder, fetch, list_models, read_table, sha256_of

NAME = "m2-encoder-0.4b"
PIECES = small_model()
CONFIG = {
    "beit_version": "base",
    "encoder_embed_dim": 64,
    "out_embed_dim": 64,
    "encoder_attention_heads": 4,
    "encoder_layers": 1,
    "beit3_vl_layers": 1,
    "image_size": 32,
    "vocab_size": released().vocab_size,
}
CODE = """
import json, logging, sys
from pathlib import Path
from m2encoder.errors import M2EncoderError
from m2encoder.sources import fetch, read_table
logging.basicConfig(level=logging.INFO, format="%(message)s")
try:
    print(json.dumps(["ok", str(fetch(sys.argv[1], table=read_table(Path(sys.argv[2]))))]))
except M2EncoderError as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""


def released_tensors(width: int = 64) -> dict[str, torch.Tensor]:
    """A released-style state dict of one own and one shared layer, 32 px, drawn at random."""
    rows = released().vocab_size
    shapes: dict[str, tuple[int, ...]] = {"logit_scale": (), "logit_vl_scale": ()}
    shapes |= {f"itc_{kind}_proj.fc.weight": (width, width)
               for kind in ("text", "image", "vl_text", "vl_image")}  # fmt: skip
    shapes |= {
        "backbone.text_embed.weight": (rows, width),
        "backbone.vision_embed.cls_token": (1, 1, width),
        "backbone.vision_embed.mask_token": (1, 1, width),
        "backbone.vision_embed.proj.weight": (width, 3, 16, 16),
        "backbone.vision_embed.proj.bias": (width,),
        "backbone.encoder.embed_positions.A.weight": (7, width),
        "backbone.encoder.embed_positions.B.weight": (1024, width),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "pooler.dense.weight": (width, width),
        "pooler.dense.bias": (width,),
    }
    for encoder in ("backbone.encoder", "backbone_vl"):
        for way in "AB":
            norms = {f"layer_norm.{way}": width}
            layer = "layers.0."
            for norm in ("self_attn.inner_attn_ln", "self_attn_layer_norm", "final_layer_norm"):
                norms[f"{layer}{norm}.{way}"] = width
            norms[f"{layer}ffn.{way}.ffn_layernorm"] = 4 * width
            linears = {f"{layer}self_attn.{p}_proj.{way}": (width, width) for p in "qkv"}
            linears[f"{layer}self_attn.out_proj.{way}"] = (width, width)
            linears[f"{layer}ffn.{way}.fc1"] = (4 * width, width)
            linears[f"{layer}ffn.{way}.fc2"] = (width, 4 * width)
            for name, size in norms.items():
                shapes |= {f"{encoder}.{name}.{part}": (size,) for part in ("weight", "bias")}
            for name, shape in linears.items():
                shapes |= {f"{encoder}.{name}.weight": shape, f"{encoder}.{name}.bias": shape[:1]}
    return {name: torch.randn(shape) * 0.1 for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A released-style checkpoint of a tiny model."""
    path = tmp_path_factory.mktemp("released") / "m2.ckpt"
    torch.save({"state_dict": released_tensors()}, path)
    return path.read_bytes()


@pytest.fixture
def server(checkpoint: bytes):
    with hub_server({"org/model": {"m2.ckpt": checkpoint, "词/sp.model": PIECES}}) as running:
        yield running


Source = dict[str, Any]


def source(path: str, *, hub: str = "huggingface", repository: str = "org/model", **known: Any):
    return {"hub": hub, "repository": repository, "path": path, **known}


def table(folder: Path, *checkpoints: Source, tokenizer: Source | None = None) -> Path:
    """Write a table with one model, NAME."""
    model = {"parameters": 1, "extra_parameters": 0, "config": CONFIG, "checkpoint": checkpoints}
    content = {
        "licence": "ours",
        "tokenizer": [tokenizer or source("词/sp.model")],
        "models": {NAME: model},
    }
    path = folder / f"table{len(list(folder.glob('table*')))}.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def start(environment: dict[str, str], sources: Path, name: str = NAME) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", CODE, name, str(sources)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, text=True, stdout=pipe, stderr=pipe)


def result(process: "subprocess.Popen[str]") -> tuple[str, str]:
    """What `fetch` returned or raised; an error must be one line."""
    out, messages = process.communicate(timeout=100)
    assert process.returncode == 0, messages
    kind, text = json.loads(out)
    assert "\n" not in text
    return kind, text


def fetched(environment: dict[str, str], sources: Path, name: str = NAME) -> tuple[str, str]:
    return result(start(environment, sources, name))


def cached(home: Path) -> set[str]:
    """Names in our own part of the cache, the lock apart."""
    ours = home / "脸" / "m2encoder"
    return {path.name for path in ours.iterdir()} - {f"{NAME}.lock"} if ours.exists() else set()


# --- fetched once ------------------------------------------------------------------------------


def test_a_model_is_fetched_and_converted_once_and_then_needs_no_network(server, tmp_path):
    sources = table(tmp_path, source("m2.ckpt"))
    kind, folder = fetched(settings(server, tmp_path), sources)
    assert (kind, folder) == ("ok", str(tmp_path / "脸" / "m2encoder" / NAME))
    assert cached(tmp_path) == {NAME}
    asked = len(server.requests)
    assert fetched(settings(server, tmp_path), sources) == ("ok", folder)
    assert len(server.requests) == asked
    assert fetched(settings(None, tmp_path, HF_HUB_OFFLINE="1"), sources) == ("ok", folder)
    encoder = load_model(folder, device="cpu")
    assert encoder.encode_text(["一只猫", "繁體", "ＦＵＬＬ", "🐱", "a " * 999]).shape == (5, 64)
    assert encoder.tokenizer is not None
    assert encoder.tokenizer.truncation_side == "left"


def test_two_processes_at_once_download_and_convert_once(server, tmp_path):
    sources = table(tmp_path, source("m2.ckpt"))
    started = [start(settings(server, tmp_path), sources) for _ in range(2)]
    first, second = map(result, started)
    assert first == second
    assert first[0] == "ok"
    assert len(server.ranges("m2.ckpt")) == 1
    assert cached(tmp_path) == {NAME}


def test_a_table_that_knows_size_and_sha256_holds_the_files_to_them(server, tmp_path, checkpoint):
    (tmp_path / "m2.ckpt").write_bytes(checkpoint)
    known = {"size_bytes": len(checkpoint), "sha256": sha256_of(tmp_path / "m2.ckpt")}
    right = table(tmp_path, source("m2.ckpt", **known))
    wrong: dict[str, Any]
    for wrong, message in (
        ({"size_bytes": 7}, f"has {len(checkpoint):,} bytes, expected 7; deleted"),
        ({"sha256": "0" * 64}, f"has sha256 {known['sha256']}, expected {'0' * 64}; deleted"),
    ):
        sources = table(tmp_path, source("m2.ckpt", **wrong))
        kind, text = fetched(settings(server, tmp_path), sources)
        assert kind == "CheckpointError"
        assert f"hf:org/model/m2.ckpt {message}, the next try downloads it anew" in text
        assert cached(tmp_path) == set()
    assert len(server.ranges("m2.ckpt")) == 2
    assert fetched(settings(server, tmp_path), right)[0] == "ok"
    assert len(server.ranges("m2.ckpt")) == 3


@NEEDS_MODELSCOPE
def test_modelscope_gives_the_same_folder(server, tmp_path):
    wanted = [source("m2.ckpt", hub="modelscope"), source("词/sp.model", hub="modelscope")]
    _, ours = fetched(
        settings(server, tmp_path / "a"), table(tmp_path, wanted[0], tokenizer=wanted[1])
    )
    _, theirs = fetched(settings(server, tmp_path / "b"), table(tmp_path, source("m2.ckpt")))
    names = {path.name for path in Path(ours).iterdir()}
    assert names == {path.name for path in Path(theirs).iterdir()}
    assert "model.safetensors" in names
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert sha256_of(Path(ours) / name) == sha256_of(Path(theirs) / name)


# --- sources that fail -------------------------------------------------------------------------


def test_the_next_source_is_taken_where_one_fails(server, tmp_path):
    gone, missing = source("m2.ckpt", repository="org/gone"), source("other.ckpt")
    sources = table(tmp_path, gone, missing, source("m2.ckpt"))
    assert fetched(settings(server, tmp_path), sources)[0] == "ok"


def test_when_all_sources_fail_each_is_named_with_what_to_do(server, tmp_path):
    gone, missing = source("m2.ckpt", repository="org/gone"), source("other.ckpt")
    kind, text = fetched(settings(server, tmp_path), table(tmp_path, gone, missing))
    assert kind == "CheckpointError"
    assert text.startswith(f"{NAME}: no source gives m2.ckpt: hf:org/gone: no such repository or")
    assert " | hf:org/model: has no file other.ckpt | " in text
    by_hand = (
        f"m2enc convert CHECKPOINT {tmp_path / '脸' / 'm2encoder' / NAME} --tokenizer sp.model"
    )
    assert text.endswith(f" | or download it by hand and run: {by_hand}")
    assert cached(tmp_path) == set()


def test_a_missing_tokenizer_leaves_nothing_in_the_cache(server, tmp_path):
    sources = table(tmp_path, source("m2.ckpt"), tokenizer=source("none.model"))
    kind, text = fetched(settings(server, tmp_path), sources)
    assert kind == "CheckpointError"
    assert text.startswith(f"{NAME}: no source gives none.model: hf:org/model: has no file none")
    assert cached(tmp_path) == set()


@pytest.mark.skipif(find_spec("modelscope") is not None, reason="modelscope is installed")
def test_without_modelscope_its_sources_say_what_to_install_once(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    with pytest.raises(CheckpointError) as caught:
        fetch("m2-encoder-10b")
    assert str(caught.value).count("pip install 'm2encoder[modelscope]'") == 1
    assert "modelscope:M_Square/M2_Encoder_Huge/m2_encoder_10B.ckpt: modelscope is not" in str(
        caught.value
    )


def test_offline_and_never_fetched_is_one_line(tmp_path):
    environment = settings(None, tmp_path, HF_HUB_OFFLINE="1")
    kind, text = fetched(environment, table(tmp_path, source("m2.ckpt")))
    assert kind == "CheckpointError"
    assert "hf:org/model: not downloaded yet, and HF_HUB_OFFLINE keeps it from being" in text


# --- downloads and conversions that fail halfway -----------------------------------------------


def test_a_download_that_breaks_leaves_nothing_and_the_next_one_works(server, tmp_path):
    sources = table(tmp_path, source("m2.ckpt"))
    server.cut["m2.ckpt"], server.down_after_cut = 1000, True
    kind, text = fetched(settings(server, tmp_path), sources)
    assert (kind, "hf:org/model: the server answered 503" in text) == ("CheckpointError", True)
    assert cached(tmp_path) == set()
    server.down.clear()
    assert fetched(settings(server, tmp_path), sources)[0] == "ok"


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04"], ids=repr)
def test_a_file_that_is_no_checkpoint_is_one_line_and_leaves_nothing(server, tmp_path, content):
    server.repositories["org/model"]["m2.ckpt"] = content
    kind, text = fetched(settings(server, tmp_path), table(tmp_path, source("m2.ckpt")))
    assert (kind, "m2.ckpt: " in text) == ("CheckpointError", True)
    assert cached(tmp_path) == set()


def test_another_model_under_the_name_is_one_line_and_leaves_nothing(server, tmp_path):
    torch.save(released_tensors(width=32), tmp_path / "other.ckpt")
    server.repositories["org/model"]["m2.ckpt"] = (tmp_path / "other.ckpt").read_bytes()
    kind, text = fetched(settings(server, tmp_path), table(tmp_path, source("m2.ckpt")))
    assert kind == "CheckpointError"
    assert "is (1, 1, 32), the configuration asks for (1, 1, 64)" in text
    assert cached(tmp_path) == set()


def test_what_an_interrupted_conversion_left_is_no_model(server, tmp_path):
    half = tmp_path / "脸" / "m2encoder" / f"{NAME}.tmp"
    half.mkdir(parents=True)
    (half / "config.json").write_text("{}")
    assert fetched(settings(server, tmp_path), table(tmp_path, source("m2.ckpt")))[0] == "ok"
    assert cached(tmp_path) == {NAME}


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "脸").write_text("a file where the cache should be")
    kind, text = fetched(settings(None, tmp_path), table(tmp_path, source("m2.ckpt")))
    assert kind == "CheckpointError"
    assert "m2encoder: cannot be written (" in text
    assert text.endswith("set HF_HOME to a folder that can")


@pytest.mark.parametrize("name", ["m2-encoder-2b", "", "模型", "../x", "m2-encoder-tiny"])
def test_an_unknown_name_is_one_line(name):
    with pytest.raises(CheckpointError, match="no released model of this name; expected") as caught:
        fetch(name)
    assert "\n" not in str(caught.value)


# --- the table that ships ----------------------------------------------------------------------


def test_the_shipped_table_is_in_order():
    releases = read_table()
    assert list(releases) == ["m2-encoder-0.4b", "m2-encoder-1b", "m2-encoder-10b"]
    files = {f for r in releases.values() for f in (*r.checkpoint, *r.tokenizer)}
    for file in files:
        assert file.hub in ("huggingface", "modelscope")
        assert re.fullmatch(r"[\w-]+/[\w.-]+", file.repository)
        assert file.known_from
        assert file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256)
    assert {r.checkpoint[0].hub for r in releases.values()} == {"modelscope"}  # the authors' own


def test_configurations_in_the_shipped_table_are_the_presets(tmp_path):
    for name, release in read_table().items():
        path = tmp_path / name
        path.write_text(json.dumps(release.config), encoding="utf-8")
        assert shape_from_config(path, text_positions=1022) == preset(name)


@pytest.mark.skipif(not OFFICIAL.is_file(), reason="the released sp.model is not beside us")
def test_the_tokenizer_in_the_table_is_the_released_one():
    known = {(f.size_bytes, f.sha256) for r in read_table().values() for f in r.tokenizer}
    assert known == {(OFFICIAL.stat().st_size, sha256_of(OFFICIAL))}


def test_list_models_says_what_is_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    assert [model.cached for model in list_models()] == [False, False, False]
    folder = cache_folder("m2-encoder-10b")
    folder.mkdir(parents=True)
    assert not list_models()[2].cached
    (folder / "config.json").write_text("{}")
    model = list_models()[2]
    assert (model.cached, model.folder) == (True, tmp_path / "m2encoder" / "m2-encoder-10b")
    assert (model.dim, model.image_size, model.max_text_length) == (1024, 224, 52)
    assert fetch("m2-encoder-10b") == folder


def test_the_module_loads_neither_torch_nor_a_hub_library():
    code = "import sys, m2encoder.sources; print({'torch', 'huggingface_hub'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
