"""Text towers of transformers in M2Encoder: equal to the library's own, saved, trained, refused.

Not for timm's (tests/peers/test_timm_tower.py), nor for whole foreign models (test_foreign.py).
"""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from tiny_models import TEXTS, pictures, wordpiece
from tokenizers import processors
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2Model,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5Model,
)

from m2encoder.batch import Batch, Captions
from m2encoder.config import Objective
from m2encoder.encoder import Encoder
from m2encoder.errors import CheckpointError, ConfigError
from m2encoder.load import load_model
from m2encoder.loss import make_loss
from m2encoder.model.architecture import Architecture
from m2encoder.model.configuration_m2encoder import M2EncoderConfig
from m2encoder.model.layers import Stack
from m2encoder.model.modeling_m2encoder import M2Encoder
from m2encoder.model_folder import save_model_folder
from m2encoder.towers import Pooling, build_encoder
from m2encoder.training_step import StepSettings, Towers, backward_step

OWN_IMAGE = Architecture(
    width=24, num_heads=3, image_layers=1, text_layers=1, shared_layers=0, image_size=32
)
SIZES: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2}
BERT = BertConfig(
    vocab_size=80, hidden_size=32, intermediate_size=64, max_position_embeddings=40,
    hidden_dropout_prob=0, attention_probs_dropout_prob=0, **SIZES,
)  # fmt: skip


def bert(folder: Path) -> Path:
    return tiny_models.save(folder, BertModel(BERT), wordpiece())


def roberta(folder: Path) -> Path:
    """Positions are counted from behind the padding id 1, so 40 rows hold 38 tokens."""
    config = RobertaConfig(
        vocab_size=80, hidden_size=32, intermediate_size=64, max_position_embeddings=40,
        pad_token_id=1, **SIZES,
    )  # fmt: skip
    return tiny_models.save(folder, RobertaModel(config), wordpiece(pad_id=1))


def gpt2(folder: Path) -> Path:
    """A decoder, whose tokenizer has no padding token."""
    config = GPT2Config(vocab_size=80, n_embd=32, n_layer=2, n_head=2, n_positions=40)
    tokenizer = wordpiece()
    tokenizer.pad_token = None
    return tiny_models.save(folder, GPT2Model(config), tokenizer)


def distilbert(folder: Path) -> Path:
    config = DistilBertConfig(
        vocab_size=80, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=40
    )
    return tiny_models.save(folder, DistilBertModel(config), wordpiece())


FAMILIES: dict[str, tuple[Callable[[Path], Path], Pooling]] = {
    "bert, first token": (bert, "cls"),
    "bert, mean": (bert, "mean"),
    "roberta": (roberta, "cls"),
    "gpt2, last token": (gpt2, "last"),
    "distilbert, mean": (distilbert, "mean"),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Pooling, Encoder]:
    """A text model's folder, and an encoder with it as text tower."""
    write, pooling = FAMILIES[request.param]
    folder = write(tmp_path / "text")
    return folder, pooling, build_encoder(image=OWN_IMAGE, text=folder, text_pooling=pooling)


def expected(folder: Path, pooling: Pooling, encoder: Encoder) -> np.ndarray:
    """The library's own hidden states, one text at a time: no padding, no mask."""
    model, tokenizer = (
        AutoModel.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    limit = encoder.tokenizer.model_max_length
    vectors = []
    for text in TEXTS:
        ids = tokenizer(text, truncation=True, max_length=limit, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            hidden = model(input_ids=ids).last_hidden_state[0]
            pooled = {"cls": hidden[0], "mean": hidden.mean(dim=0), "last": hidden[-1]}[pooling]
            projected = encoder.model.text_projection(pooled)
        vectors.append((projected / projected.norm()).numpy())
    return np.stack(vectors)


# ── equal to the library ────────────────────────────────────────────────────────────────────────


def test_text_vectors_are_the_librarys_own_pooled_states_projected(
    family: tuple[Path, Pooling, Encoder],
) -> None:
    folder, pooling, encoder = family
    want = expected(folder, pooling, encoder)
    found = encoder.encode_text(TEXTS)
    np.testing.assert_allclose(found, want, atol=1e-6)
    np.testing.assert_allclose(encoder.encode_text(TEXTS, batch_size=1), want, atol=1e-6)
    assert np.linalg.norm(want - want[0], axis=1)[1:].min() > 1e-3  # the texts do differ


def test_padding_and_a_mask_that_is_not_given_change_nothing(
    family: tuple[Path, Pooling, Encoder],
) -> None:
    _, _, encoder = family
    model, pad = encoder.model, encoder.tokenizer.pad_token_id
    batch = encoder.tokenizer(TEXTS[:4], padding=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert encoder.tokenizer.padding_side == "right"
    with torch.no_grad():
        want = model.encode_text(ids, mask)
        filled = ids.masked_fill(mask == 0, 9)
        torch.testing.assert_close(model.encode_text(filled, mask), want, atol=1e-6, rtol=0)
        longer = torch.nn.functional.pad(ids, (0, 3), value=pad)
        torch.testing.assert_close(model.encode_text(longer), want, atol=1e-6, rtol=0)


def test_a_tokenizer_that_ends_no_text_still_tells_padding(tmp_path: Path) -> None:
    folder = bert(tmp_path / "text")
    tokenizer = wordpiece()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", tokenizer.cls_token_id)]
    )  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.save_pretrained(folder)
    encoder = build_encoder(image=OWN_IMAGE, text=folder, text_pooling="mean")
    ids = encoder.tokenizer(TEXTS[:4], padding=True, return_tensors="pt")["input_ids"]
    assert encoder.model.config.eos_token_id is None
    with torch.no_grad():
        found = encoder.model.encode_text(ids).numpy()
    np.testing.assert_allclose(found, encoder.encode_text(TEXTS[:4]), atol=1e-6)


def test_a_text_as_long_as_the_position_table_fits(family: tuple[Path, Pooling, Encoder]) -> None:
    folder, _, encoder = family
    limit = 38 if "roberta" in str(encoder.model.config.text_tower) else 40
    assert encoder.tokenizer.model_max_length == encoder.model.config.text_positions == limit
    ids = encoder.tokenizer("猫" * 1000, truncation=True, return_tensors="pt")["input_ids"]
    assert ids.shape == (1, limit)
    with torch.no_grad():
        assert encoder.model.encode_text(ids).isfinite().all()
    with pytest.raises(ValueError, match=f"expected \\(M, L\\) with L at most {limit}"):
        encoder.model.encode_text(torch.zeros(1, limit + 1, dtype=torch.long))
    assert folder.is_dir()


# ── saved and opened ────────────────────────────────────────────────────────────────────────────


def test_a_saved_encoder_opens_without_its_source_and_gives_equal_vectors(
    family: tuple[Path, Pooling, Encoder], tmp_path: Path
) -> None:
    folder, _, encoder = family
    save_model_folder(encoder, tmp_path / "model")
    folder.rename(tmp_path / "elsewhere")
    again = load_model(tmp_path / "model", device="cpu")
    assert np.array_equal(again.encode_text(TEXTS), encoder.encode_text(TEXTS))
    assert np.array_equal(again.encode_image(pictures()), encoder.encode_image(pictures()))
    assert again.fingerprint == encoder.fingerprint
    assert again.tokenizer.model_max_length == encoder.tokenizer.model_max_length
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, encoder.model.state_dict()[name]), name


FRESH_PROCESS = """
import sys
import numpy as np
folder, out, *texts = sys.argv[1:]
sys.modules["m2encoder"] = None  # as where it is not installed
from transformers import AutoModel, AutoTokenizer
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
given = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
np.save(out, model(**given).text_embeds.detach().numpy())
"""


def test_transformers_opens_it_where_m2encoder_and_timm_are_not_installed(tmp_path: Path) -> None:
    encoder = build_encoder(image=OWN_IMAGE, text=roberta(tmp_path / "text"))
    save_model_folder(encoder, tmp_path / "model")
    assert (tmp_path / "model/towers.py").is_file()
    subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, tmp_path / "model", tmp_path / "out.npy", *TEXTS],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        check=True,
        capture_output=True,
    )
    found = np.load(tmp_path / "out.npy")
    np.testing.assert_allclose(found, encoder.encode_text(TEXTS), atol=1e-6)


def test_one_tower_opens_alone(tmp_path: Path) -> None:
    encoder = build_encoder(image=OWN_IMAGE, text=bert(tmp_path / "text"))
    save_model_folder(encoder, tmp_path / "model")
    text = load_model(tmp_path / "model", device="cpu", towers="text")
    image = load_model(tmp_path / "model", device="cpu", towers="image")
    assert np.array_equal(text.encode_text(TEXTS), encoder.encode_text(TEXTS))
    assert np.array_equal(image.encode_image(pictures()), encoder.encode_image(pictures()))
    assert not [name for name, _ in image.model.named_parameters() if name.startswith("text")]
    with pytest.raises(ValueError, match="loaded with towers='image'"):
        image.encode_text("猫")


def test_the_folder_holds_plain_values_and_no_path_of_this_machine(tmp_path: Path) -> None:
    encoder = build_encoder(image=OWN_IMAGE, text=bert(tmp_path / "text"))
    save_model_folder(encoder, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text(encoding="utf-8"))
    assert config["text_tower"]["config"]["model_type"] == "bert"
    assert config["text_tower"]["pooling"] == "cls"
    assert config["image_tower"] is None
    for path in (tmp_path / "model").glob("*.json"):
        assert str(tmp_path) not in path.read_text(encoding="utf-8"), path.name


# ── training ────────────────────────────────────────────────────────────────────────────────────


def test_the_training_loss_gives_gradients_to_both_towers_and_falls(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(image=OWN_IMAGE, text=bert(tmp_path / "text"), projection_dim=16)
    texts = ["一只红色的猫", "a red cat", "long", "繁體"]
    given = encoder.tokenizer(texts, padding=True, return_tensors="pt")
    pixels = torch.randint(0, 256, (4, 3, 1, 1), dtype=torch.uint8).expand(4, 3, 32, 32)
    rows = torch.arange(4)
    captions = Captions(given["input_ids"], given["attention_mask"], rows, keys=rows)
    batch = Batch(pixels, {"zh": captions}, ["a", "b", "c", "d"], positions=rows)
    model = encoder.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    settings = StepSettings([Objective("image-zh")], make_loss(rank=0, world_size=1))
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        losses.append(backward_step(Towers(model), batch, settings).total.item())
        optimizer.step()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == []  # a parameter without gradient stops distributed training
    assert losses[-1] < 0.5 * losses[0]


def test_gradient_checkpointing_reaches_the_text_model(tmp_path: Path) -> None:
    encoder = build_encoder(image=OWN_IMAGE, text=bert(tmp_path / "text"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers 5.23 prefers a name that 4.57 lacks
        encoder.model.gradient_checkpointing_enable()
    switched = [m for m in encoder.model.modules() if getattr(m, "gradient_checkpointing", False)]
    own = sum(isinstance(module, Stack) for module in switched)
    assert len(switched) > own > 0


# ── refusals, in one line ───────────────────────────────────────────────────────────────────────


def t5(folder: Path) -> Path:
    config = T5Config(vocab_size=80, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=2)
    return tiny_models.save(folder, T5Model(config), wordpiece())


def without_tokenizer(folder: Path) -> Path:
    for path in bert(folder).glob("tokenizer*"):
        path.unlink()
    return folder


def truncated(folder: Path) -> Path:
    weights = bert(folder) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return folder


def wide_tokenizer(folder: Path) -> Path:
    bert(folder)
    tokenizer = wordpiece()
    tokenizer.add_tokens([f"new{i}" for i in range(80)])
    tokenizer.save_pretrained(folder)
    return folder


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "encoder-decoder": (t5, "'t5' is no plain text encoder, expected one like bert or roberta"),
    "no folder": (
        lambda folder: folder / "无",
        "无: no such folder; a model of the hub is written",
    ),
    "no tokenizer": (without_tokenizer, "(no tokenizer, expected one of tokenizer.json, vocab.txt"),
    "truncated weights": (truncated, "no transformers text model with its tokenizer ("),
    "too many pieces": (wide_tokenizer, "pieces, the model 80"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_text_model_that_cannot_be_a_tower_is_one_line(what: str, tmp_path: Path) -> None:
    write, words = REFUSED[what]
    folder = write(tmp_path / "text")
    with pytest.raises(CheckpointError) as caught:
        build_encoder(image=OWN_IMAGE, text=folder)
    assert words in str(caught.value)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)


def test_options_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    folder = bert(tmp_path / "text")
    shared = Architecture(image_size=32)
    wrong: Any = "max"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"image": OWN_IMAGE, "text": OWN_IMAGE}, "both towers are our own"),
        ({"image": shared, "text": folder}, "text_tower needs shared_layers 0, found 2"),
        ({"image": "resnet50", "text": folder}, "'resnet50' is unknown, expected timm:NAME"),
        ({"image": OWN_IMAGE, "text": folder, "text_pooling": wrong}, "pooling is 'max', expected"),
        ({"image": "timm:x", "text": OWN_IMAGE}, "our own text tower needs its tokenizer"),
    ]
    for options, words in cases:
        with pytest.raises(ConfigError) as caught:
            build_encoder(**options)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_configuration_with_a_wrong_tower_is_refused() -> None:
    good = {"library": "transformers", "config": {"model_type": "bert"}, "pooling": "cls"}
    cases: list[tuple[dict[str, Any], str]] = [
        ({**good, "library": "keras"}, "text_tower is from 'keras' with config, library, pooling"),
        ({**good, "code": "x.py"}, "expected 'transformers' with config, library, pooling"),
        ({**good, "config": {"model_type": "nope"}}, "has no text model 'nope'"),
    ]
    for tower, words in cases:
        with pytest.raises(ValueError, match=words):
            M2Encoder(M2EncoderConfig(shared_layers=0, text_tower=tower))


def test_bert_reads_the_tokenizer_it_was_published_with(tmp_path: Path) -> None:
    """A folder with vocab.txt alone, as Chinese BERT models have it."""
    folder = bert(tmp_path / "text")
    pieces = sorted(wordpiece().get_vocab().items(), key=lambda item: item[1])
    for path in folder.glob("tokenizer*"):
        path.unlink()
    (folder / "vocab.txt").write_text("\n".join(piece for piece, _ in pieces), encoding="utf-8")
    encoder = build_encoder(image=OWN_IMAGE, text=folder)
    own = BertTokenizer.from_pretrained(folder)
    for text in TEXTS:
        want = own(text, truncation=True, max_length=40)["input_ids"]
        assert encoder.tokenizer(text, truncation=True)["input_ids"] == want
