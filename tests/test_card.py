"""The model card that an exported folder carries: true to the run, readable by the Hub.

Not the export itself: test_train.py.
"""

import json
import re
from dataclasses import replace
from shutil import copytree

import pytest
import yaml

from m2encoder.card import write_model_card
from m2encoder.config import Objective
from m2encoder.shards import Pair, ShardReader, write_shards

RESULTS = {"eval/val/zh/i2t_r1": 0.25, "eval/val/en/i2t_r1": 0.125}


def card_of(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


def test_metadata_names_both_languages_and_the_task(tmp_path, tiny_config, tiny_encoder):
    write_model_card(tmp_path, tiny_config, tiny_encoder, {})
    head = yaml.safe_load(card_of(tmp_path).split("---")[1])
    assert head["language"] == ["zh", "en"]
    assert head["library_name"] == "transformers"
    assert head["pipeline_tag"] == "zero-shot-image-classification"


def test_card_states_size_data_and_objectives_of_the_run(tmp_path, tiny_config, tiny_encoder):
    cfg = replace(tiny_config, epochs=7, seed=5, objectives=(Objective("image-zh", weight=0.75),))
    write_model_card(tmp_path, cfg, tiny_encoder, {})
    card = card_of(tmp_path)
    parameters = sum(p.numel() for p in tiny_encoder.model.parameters())
    captions = ShardReader(cfg.data.train).index.captions
    assert f"{parameters:,} parameters; width 32, 1 image, 1 text and 1 shared layers" in card
    assert f"160 pairs with {captions['en']} en, {captions['zh']} zh captions; 7 epochs" in card
    assert "batches of 16; seed 5. Objectives: image-zh (weight 0.75)." in card


def test_results_are_in_the_card_and_in_a_file(tmp_path, tiny_config, tiny_encoder):
    cfg = replace(tiny_config, data=replace(tiny_config.data, evaluate="data/验证"))
    write_model_card(tmp_path, cfg, tiny_encoder, RESULTS)
    card = card_of(tmp_path)
    assert "Measured on `data/验证` at the end of training." in card
    assert "| eval/val/en/i2t_r1 | 0.1250 |\n| eval/val/zh/i2t_r1 | 0.2500 |" in card
    assert json.loads((tmp_path / "results.json").read_text("utf-8")) == RESULTS


def test_without_an_evaluation_there_is_no_table(tmp_path, tiny_config, tiny_encoder):
    write_model_card(tmp_path, tiny_config, tiny_encoder, {})
    assert "## Results" not in card_of(tmp_path)
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("attribution", ["", "图片：某某，CC BY 4.0"])
def test_pictures_that_ask_for_attribution_get_it(tmp_path, tiny_config, tiny_encoder, attribution):
    write_shards([Pair("a", b"x", {"zh": ["猫"]})], tmp_path / "d", attribution=attribution)
    cfg = replace(tiny_config, data=replace(tiny_config.data, train=str(tmp_path / "d")))
    write_model_card(tmp_path, cfg, tiny_encoder, {})
    assert ("## Attribution" in card_of(tmp_path)) == bool(attribution)
    assert attribution in card_of(tmp_path)


def test_the_example_in_the_card_runs(tmp_path, tiny_config, tiny_encoder, tiny_model_folder):
    folder = copytree(tiny_model_folder, tmp_path / "模型")
    write_model_card(folder, tiny_config, tiny_encoder, {})
    (code,) = re.findall(r"```python\n(.*?)```", card_of(folder), re.DOTALL)
    names: dict[str, object] = {}
    exec(code.replace("path/to/this/folder", str(folder)), names)  # the card's own text
    assert getattr(names["vectors"], "shape", None) == (2, tiny_encoder.dim)
