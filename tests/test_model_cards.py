"""The cards in model_cards/: one per preset, true to the code where both state a figure.

Not the card that an exported folder carries (test_card.py).
"""

import re
from pathlib import Path

import pytest
import torch
import yaml

from m2encoder.anchor import LABELS, PUBLISHED
from m2encoder.model.configuration_m2encoder import M2EncoderConfig, Towers
from m2encoder.model.modeling_m2encoder import M2Encoder
from m2encoder.presets import list_presets, preset
from m2encoder.sources import read_table

CARDS = Path(__file__).resolve().parents[1] / "model_cards"
RELEASED = list(read_table())


def card(name: str) -> str:
    return (CARDS / f"{name}.md").read_text(encoding="utf-8")


def row(name: str, first: str) -> str:
    """The second cell of the table row that begins with `first`."""
    (found,) = re.findall(rf"^\| {re.escape(first)} \| (.*?) \|", card(name), re.MULTILINE)
    return found


def parameters(name: str, towers: Towers) -> int:
    with torch.device("meta"):
        model = M2Encoder(M2EncoderConfig(**vars(preset(name)), towers=towers))
    return sum(p.numel() for p in model.parameters())


def test_every_preset_has_a_card_that_the_index_names():
    index = (CARDS / "README.md").read_text(encoding="utf-8")
    assert {path.stem for path in CARDS.glob("m2-*.md")} == set(list_presets())
    assert {name for name in list_presets() if f"[{name}]({name}.md)" not in index} == set()


@pytest.mark.parametrize("name", [*list_presets(), "TEMPLATE"])
def test_the_head_of_a_card_says_what_the_hubs_ask_for(name):
    head = yaml.safe_load(card(name).split("---\n")[1])
    assert head["language"] == ["zh", "en"]
    assert head["pipeline_tag"] == "zero-shot-image-classification"
    assert head["library_name"] == "transformers"
    assert head["license"] in {"apache-2.0", "other"}
    assert (head["license"] == "other") == ({"license_name", "license_link"} <= head.keys())


@pytest.mark.parametrize("name", RELEASED)
def test_parameters_in_card_table_and_model_agree(name):
    release = read_table()[name]
    assert row(name, "parameters") == f"{release.parameters:,}"
    assert release.parameters == parameters(name, "both")
    total = release.parameters + release.extra_parameters
    assert row(name, "kept beside them").startswith(f"{release.extra_parameters:,} numbers")
    assert f"{total:,} in the released code's model" in row(name, "kept beside them")
    image, text = parameters(name, "image"), parameters(name, "text")
    assert row(name, "loaded as one tower") == f"{image:,} for pictures, {text:,} for texts"
    gigabytes = [float(n) for n in re.findall(r"[\d.]+(?= GB)", row(name, "weights in memory"))]
    assert gigabytes == pytest.approx([4e-9 * release.parameters, 2e-9 * release.parameters], 0.01)


def test_totals_are_those_counted_on_the_released_code():
    table = read_table().values()
    totals = [release.parameters + release.extra_parameters for release in table]
    assert totals == [263_289_602, 730_416_130, 10_182_004_738]


@pytest.mark.parametrize("name", RELEASED)
def test_shape_in_card_and_preset_agree(name):
    shape = preset(name)
    assert shape.image_layers == shape.text_layers
    assert row(name, "width, heads") == f"{shape.width}, {shape.num_heads}"
    own, shared = shape.image_layers, shape.shared_layers
    assert row(name, "layers") == f"{own} image, {own} text, {shared} shared by both"
    assert row(name, "embedding") == str(shape.projection_dim)
    size = f"{shape.image_size} x {shape.image_size} pixels, patches of {shape.patch_size}"
    assert row(name, "pictures").startswith(size)
    tokens = f"up to {shape.max_text_length} tokens of a vocabulary of {shape.vocab_size:,}"
    assert row(name, "texts").startswith(tokens)
    assert f"# (2, {shape.projection_dim}) float32" in card(name)


@pytest.mark.parametrize("name", RELEASED)
def test_card_names_every_source_and_the_tokenizer(name):
    release = read_table()[name]
    missing = {s.repository for s in release.checkpoint if f"`{s.repository}`" not in card(name)}
    assert missing == set()
    assert all(f"`{source.path}`" in card(name) for source in release.checkpoint)
    (sp_model,) = {(s.size_bytes, s.sha256) for s in release.tokenizer}
    assert f"{sp_model[0]:,} bytes" in card(name)
    assert f"`{sp_model[1]}`" in card(name)


@pytest.mark.parametrize("name", RELEASED)
def test_mean_recalls_in_a_card_are_means_of_its_recalls(name):
    """The authors round both; six recalls rounded to 0.1 move their mean by 0.05 at most."""
    rows = re.findall(r"^\| .*? \| ([\d.]+/[\d./]+) \| ([\d./]+) \| ([\d.]+) \|$", card(name), re.M)
    assert len(rows) == 4
    for to_image, to_text, mean in rows:
        recalls = [float(n) for n in f"{to_image}/{to_text}".split("/")]
        assert len(recalls) == 6
        assert float(mean) == pytest.approx(sum(recalls) / 6, abs=0.11)


@pytest.mark.parametrize("name", RELEASED)
def test_overall_in_the_fine_grained_table_is_the_mean_of_its_columns(name):
    (cells,) = re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", card(name), re.MULTILINE)
    for language in (0, 1):
        *columns, overall = [float(cell.split("/")[language]) for cell in cells.split(" | ")]
        assert len(columns) == 7
        assert overall == pytest.approx(sum(columns) / 7, abs=0.01)


@pytest.mark.parametrize("name", RELEASED)
def test_published_probabilities_in_the_card_are_those_that_verify_holds_a_model_to(name):
    head = f"| {' | '.join(LABELS)} |"
    cells = card(name).split(head + "\n")[1].splitlines()[1].strip("| ").split(" | ")
    assert tuple(map(float, cells)) == PUBLISHED[name]
