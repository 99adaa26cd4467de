"""Towers that start from another model: what is copied, resized, moved to other rows, left random.

Not timm's and transformers' towers with their libraries' weights: test_towers.py.
"""

from dataclasses import replace

import pytest
import tiny_duals
import torch
from released_model import small_model

from m2encoder.cli.training import new_encoder
from m2encoder.errors import CheckpointError
from m2encoder.init_towers import init_towers, same_pieces
from m2encoder.load import load_model
from m2encoder.model.layers import resize_positions
from m2encoder.model_folder import save_model_folder
from m2encoder.released_tokenizer import ReleasedTokenizer
from m2encoder.tokenizer import TextTokenizer, train_tokenizer

OTHER_TEXTS = [
    "一只红色的猫坐在房子旁边", "繁體中文：貓與狗", "a red cat beside a house", "two dogs 🐶",
    "ＦＵＬＬ width", "猫" * 200, "the small blue circle",
]  # fmt: skip


@pytest.fixture
def make_encoder(tiny_config, tiny_model_folder):
    """Return a fresh encoder of the tiny shape with changes, and by default its tokenizer."""

    def make(tokenizer=None, seed=11, **changes):
        own = TextTokenizer((tiny_model_folder / "sp.model").read_bytes(), max_length=52)
        tokenizer = tokenizer or own
        shape = replace(tiny_config.model, vocab_size=tokenizer.vocab_size, **changes)
        return new_encoder(replace(tiny_config, model=shape, seed=seed), tokenizer)

    return make


def weights(encoder):
    return {name: value.clone() for name, value in encoder.model.state_dict().items()}


def test_the_same_model_for_both_towers_copies_everything(make_encoder, tiny_model_folder):
    encoder = make_encoder()
    report = init_towers(encoder, image=str(tiny_model_folder), text=str(tiny_model_folder))
    source = load_model(tiny_model_folder, device="cpu")
    for name, value in source.model.state_dict().items():
        assert torch.equal(encoder.model.state_dict()[name], value), name
    count = len(source.model.state_dict())
    assert report.lines() == [f"start: both from {tiny_model_folder}; {count} tensors taken"]
    assert (report.random, report.changed, report.unused) == ({}, {}, [])
    texts = ["一只猫", "ＡＢＣ 貓🐱"]
    assert (encoder.encode_text(texts) == source.encode_text(texts)).all()


@pytest.mark.parametrize("tower", ["image", "text"])
def test_one_tower_leaves_the_other_and_what_both_share_random(
    make_encoder, tiny_model_folder, tower
):
    encoder = make_encoder()
    before = weights(encoder)
    given = {"image": None, "text": None, tower: str(tiny_model_folder)}
    report = init_towers(encoder, **given)
    source = load_model(tiny_model_folder, device="cpu").model.state_dict()
    for name, value in encoder.model.state_dict().items():
        expected = source if name.startswith(f"{tower}.") else before
        assert torch.equal(value, expected[name]), name
    assert {name for name in before if name.startswith(f"{tower}.")} == set(report.taken)
    assert set(report.taken) | set(report.random) == set(before)
    text = "\n".join(report.lines())
    assert f"start: {tower} from {tiny_model_folder}" in text
    assert "towers start from different models" in text
    assert "no source given" in text


def test_two_models_give_a_tower_each(make_encoder, tiny_model_folder, tmp_path):
    other = make_encoder(seed=5)
    save_model_folder(other, tmp_path / "另一个", golden=False)
    encoder = make_encoder()
    init_towers(encoder, image=str(tmp_path / "另一个"), text=str(tiny_model_folder))
    source = load_model(tiny_model_folder, device="cpu").model.state_dict()
    for name, value in encoder.model.state_dict().items():
        if name.startswith("image."):
            assert torch.equal(value, other.model.state_dict()[name])
        if name.startswith("text."):
            assert torch.equal(value, source[name])


def test_positions_are_resized_and_named(make_encoder, tiny_model_folder):
    encoder = make_encoder(image_size=64, text_positions=30, max_text_length=30)
    report = init_towers(encoder, image=str(tiny_model_folder), text=str(tiny_model_folder))
    source = load_model(tiny_model_folder, device="cpu").model.state_dict()
    found = encoder.model.state_dict()
    assert torch.equal(found["image.positions"], resize_positions(source["image.positions"], 4))
    assert torch.equal(found["text.positions"], source["text.positions"][:30])
    assert report.changed == {
        "image.positions": "resized from 2x2 to 4x4 patches",
        "text.positions": "the first 30 of 1,022 rows",
    }


def test_more_text_positions_keep_theirs_at_random(make_encoder, tiny_model_folder):
    encoder = make_encoder(text_positions=1100)
    before = weights(encoder)["text.positions"]
    report = init_towers(encoder, image=None, text=str(tiny_model_folder))
    source = load_model(tiny_model_folder, device="cpu").model.state_dict()["text.positions"]
    found = encoder.model.state_dict()["text.positions"]
    assert torch.equal(found, torch.cat([source, before[1022:]]))
    assert "78 start at random" in report.changed["text.positions"]


def test_missing_surplus_and_misfitting_tensors_are_named(make_encoder, tiny_model_folder):
    encoder = make_encoder(text_layers=2, image_layers=0, projection_dim=24)
    report = init_towers(encoder, image=str(tiny_model_folder), text=str(tiny_model_folder))
    assert report.random["text.stack.blocks.1.ffn.fc1.weight"] == "not in it"
    assert report.random["image_projection.weight"] == "16x32 there, 24x32 here"
    assert "image.stack.blocks.0.ffn.fc1.weight" in report.unused
    text = "\n".join(report.lines())
    assert "text.stack.blocks.1." in text
    assert "start: not used: image.stack.blocks.0." in text


def test_a_new_logit_bias_is_named_and_stays(make_encoder, tiny_model_folder, tiny_config):
    encoder = make_encoder()
    config = encoder.model.config
    config.has_logit_bias = True
    encoder.model = type(encoder.model)(config)
    report = init_towers(encoder, image=str(tiny_model_folder), text=str(tiny_model_folder))
    assert report.random == {"logit_bias": "not in it"}
    assert encoder.model.logit_bias.item() == -10


def test_another_width_is_one_line(make_encoder, tiny_model_folder):
    encoder = make_encoder(width=48, patch_stem="linear")
    with pytest.raises(CheckpointError) as caught:
        init_towers(encoder, image=str(tiny_model_folder), text=None)
    assert "nothing of it fits" in str(caught.value)
    assert "choose a model of the same width" in str(caught.value)
    assert "\n" not in str(caught.value)


# ── vocabulary ──────────────────────────────────────────────────────────────────────────────────


def tokenizers():
    other = train_tokenizer(OTHER_TEXTS, vocab_size=450)
    return {
        "ours": TextTokenizer(other, max_length=52),
        "released": ReleasedTokenizer(small_model(), max_length=52),
    }


@pytest.mark.parametrize("kind", ["ours", "released"])
def test_rows_of_the_same_pieces_move_to_their_new_places(make_encoder, tiny_model_folder, kind):
    encoder = make_encoder(tokenizers()[kind])
    before = weights(encoder)["text.token_embed.weight"]
    report = init_towers(encoder, image=None, text=str(tiny_model_folder))
    source = load_model(tiny_model_folder, device="cpu")
    theirs = source.tokenizer.get_vocab()
    table = source.model.state_dict()["text.token_embed.weight"]
    found = encoder.model.state_dict()["text.token_embed.weight"]
    specials = set(encoder.tokenizer.all_special_ids) | set(source.tokenizer.all_special_ids)
    moved = 0
    for piece, row in encoder.tokenizer.get_vocab().items():
        if row in specials or theirs.get(piece) in specials:
            continue
        if piece in theirs:
            moved += 1
            assert torch.equal(found[row], table[theirs[piece]]), piece
        else:
            assert torch.equal(found[row], before[row]), piece
    assert moved > 50
    for role in ("cls", "eos"):  # padding may share the row of another
        ours, old = (getattr(e.tokenizer, f"{role}_token_id") for e in (encoder, source))
        assert torch.equal(found[ours], table[old]), role
    line = report.changed["text.token_embed.weight"]
    assert line.startswith("another vocabulary; ")
    assert f"of {len(found):,} pieces found in it" in line


def test_an_equal_vocabulary_needs_no_mapping(make_encoder):
    encoder = make_encoder()
    rows = encoder.model.config.vocab_size
    assert same_pieces(encoder.tokenizer, make_encoder().tokenizer, rows, rows) is None
    assert same_pieces(None, encoder.tokenizer, rows, rows) is None


# ── what cannot be started from ─────────────────────────────────────────────────────────────────


def test_a_model_of_another_family_is_refused_with_what_to_do(make_encoder, tmp_path):
    folder = tiny_duals.clip(tmp_path / "clip")
    for where in (str(folder), "open-clip:ViT-B-32"):
        with pytest.raises(CheckpointError) as caught:
            init_towers(make_encoder(), image=where, text=None)
        assert "another family" in str(caught.value)
        assert "towers.image" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_missing_model_is_named(make_encoder, tmp_path):
    with pytest.raises(CheckpointError, match="没有"):
        init_towers(make_encoder(), image=str(tmp_path / "没有"), text=None)


def test_the_picture_statistics_come_with_the_image_tower(
    make_encoder, tiny_model_folder, tmp_path
):
    other = make_encoder(seed=5)
    other.model.config.image_mean = [0.1, 0.2, 0.3]
    save_model_folder(other, tmp_path / "other", golden=False)
    encoder = make_encoder()
    init_towers(encoder, image=None, text=str(tmp_path / "other"))
    assert encoder.model.config.image_mean == [0.5, 0.5, 0.5]
    init_towers(encoder, image=str(tmp_path / "other"), text=None)
    assert encoder.model.config.image_mean == [0.1, 0.2, 0.3]
