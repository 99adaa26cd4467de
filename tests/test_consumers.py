"""One folder, every consumer: equal vectors where m2encoder is not installed.

Needs the environments that `make test-consumers` makes; without them, only what does not need one
runs. Not for opening folders with load_model (test_load.py).
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from consumers.environments import ENVIRONMENTS, ROOT, python_of
from PIL import Image
from transformers import BertConfig, BertModel

from m2encoder.encoder import Encoder
from m2encoder.load import load_model
from m2encoder.model.configuration_m2encoder import M2EncoderConfig
from m2encoder.model.image_processing_m2encoder import M2EncoderImageProcessor
from m2encoder.model.modeling_m2encoder import M2Encoder
from m2encoder.model_folder import save_model_folder
from m2encoder.towers import build_encoder

RELEASED = ROOT.parent / "shared/data/official/sp.model"
CHECK = ROOT / "tests/consumers/check_folder.py"
TEXTS = [
    "一只红色的猫",
    "繁體中文：貓與狗",
    "Ｆｕｌｌ　ｗｉｄｔｈ，１２３！",
    "a red cat",
    "👨‍👩‍👧‍👦 家 family",
    "two  blanks,   three",
    "猫",
    "a red cat sits on a blue sofa and looks at two dogs, 一只红猫" * 100,
]


def pictures() -> list[Image.Image]:
    """Return colour, grey and alpha in three sizes."""
    rng = np.random.default_rng(0)
    sizes = [(30, 40, 3), (97, 21), (32, 32, 4)]
    return [Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)) for size in sizes]


# ── folders ─────────────────────────────────────────────────────────────────────────────────────


def ours(encoder: Encoder, folder: Path) -> None:
    save_model_folder(encoder, folder)


def in_shards(encoder: Encoder, folder: Path) -> None:
    save_model_folder(encoder, folder, max_shard_size="300KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def in_float16(encoder: Encoder, folder: Path) -> None:
    assert encoder.folder is not None
    half = load_model(encoder.folder, device="cpu", dtype="float16")
    save_model_folder(half, folder)


def truncating_right(encoder: Encoder, folder: Path) -> None:
    assert encoder.folder is not None
    right = load_model(encoder.folder, device="cpu")
    assert right.tokenizer is not None
    right.tokenizer.truncation_side = "right"
    save_model_folder(right, folder)


def with_released_tokenizer(encoder: Encoder, folder: Path) -> None:
    from m2encoder.released_tokenizer import ReleasedTokenizer

    tokenizer = ReleasedTokenizer(RELEASED.read_bytes())
    shape = replace(encoder.model.config.architecture, vocab_size=tokenizer.vocab_size)
    end = tokenizer.end_id
    model = M2Encoder(M2EncoderConfig(**asdict(shape), pad_token_id=end, eos_token_id=end))
    processor = M2EncoderImageProcessor(shape.image_size)
    save_model_folder(Encoder(model, processor, tokenizer.to_fast()), folder)


def with_a_bert_for_texts(encoder: Encoder, folder: Path) -> None:
    config = BertConfig(
        vocab_size=80, hidden_size=32, intermediate_size=64, max_position_embeddings=40,
        num_hidden_layers=2, num_attention_heads=2,
    )  # fmt: skip
    bert = tiny_models.save(folder.parent / "bert", BertModel(config), tiny_models.wordpiece())
    image = replace(encoder.model.config.architecture, shared_layers=0)
    save_model_folder(build_encoder(image=image, text=bert, projection_dim=16), folder)


Write = Callable[[Encoder, Path], None]
needs_released = pytest.mark.skipif(not RELEASED.is_file(), reason="no released tokenizer here")
FOLDERS = [
    pytest.param(ours, id="ours"),
    pytest.param(in_shards, id="in_shards"),
    pytest.param(in_float16, id="in_float16"),
    pytest.param(truncating_right, id="truncating_right"),
    pytest.param(with_a_bert_for_texts, id="bert_text_tower"),
    pytest.param(with_released_tokenizer, id="released_tokenizer", marks=needs_released),
]


# ── where m2encoder is not installed ────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.parametrize("write", FOLDERS)
@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=lambda path: path.name)
def test_every_consumer_gives_the_vectors_of_load_model(
    environment: Path, write: Write, tiny_encoder: Encoder, tmp_path: Path
) -> None:
    python = python_of(environment)
    folder = tmp_path / "模型"
    write(tiny_encoder, folder)
    write_expected(folder, tmp_path / "expected.npz")
    ran = subprocess.run(
        [str(python), str(CHECK), str(folder), str(tmp_path / "expected.npz")],
        cwd=tmp_path,
        env={"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf"), "PATH": os.defpath},
        capture_output=True,
        text=True,
    )
    sys.stdout.write(ran.stdout)  # the figures, for pytest -rP
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = ran.stdout.splitlines()
    assert len([line for line in lines if line.endswith(": ok")]) == 4


def write_expected(folder: Path, path: Path) -> None:
    encoder = load_model(folder, device="cpu")
    given = {f"picture_{i}": np.asarray(picture) for i, picture in enumerate(pictures())}
    np.savez(
        path,
        allow_pickle=False,
        texts=np.array(json.dumps(TEXTS)),
        text=encoder.encode_text(TEXTS),
        image=encoder.encode_image(pictures()),
        scale=np.array(encoder.logit_scale),
        **given,
    )


def test_the_check_refuses_where_m2encoder_can_be_imported(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    words = [sys.executable, str(CHECK), str(tiny_model_folder), str(tmp_path / "none.npz")]
    ran = subprocess.run(words, capture_output=True, text=True)
    assert ran.returncode == 1
    assert ran.stdout == "m2encoder can be imported here, so this would prove nothing\n"
