"""The model card that every saved folder carries: true to the model and the run, its examples run.

Not the folder itself: test_save.py.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from shutil import copytree

import pytest
from consumers.environments import ENVIRONMENTS, python_of
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image

from m2encoder.card import write_card, write_model_card
from m2encoder.config import Objective
from m2encoder.load import load_model
from m2encoder.shards import Pair, ShardReader, write_shards

RESULTS = {"eval/val/zh/i2t_r1": 0.25, "eval/val/en/i2t_r1": 0.125}


def card_of(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


def metadata_of(folder):
    """Return the metadata as the Hub's own library reads it."""
    return ModelCardData(**ModelCard.load(folder / "README.md").data.to_dict())


def test_metadata_names_both_languages_and_the_task(tmp_path, tiny_config, tiny_encoder):
    write_model_card(tmp_path, tiny_config, tiny_encoder, {})
    data = metadata_of(tmp_path)
    assert data.language == ["zh", "en"]
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "zero-shot-image-classification"
    assert "image-text-retrieval" in (data.tags or [])


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
    cfg = replace(tiny_config, evaluate=replace(tiny_config.evaluate, data="data/验证"))
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


@pytest.mark.parametrize(
    ("license", "words"),
    [("apache-2.0", "apache-2.0."), (None, "None is stated for these weights; ask who made them.")],
)
def test_a_licence_is_stated_and_never_invented(tmp_path, tiny_encoder, license, words):
    write_card(tiny_encoder, tmp_path, license=license)
    assert metadata_of(tmp_path).license == (license or "unknown")
    assert f"## Licence\n\n{words}\n" in card_of(tmp_path)


def test_every_saved_folder_has_a_card_that_names_its_golden_vectors(tiny_model_folder):
    data = metadata_of(tiny_model_folder)
    assert (data.language, data.license) == (["zh", "en"], "unknown")
    assert "`golden.json` holds the vectors" in card_of(tiny_model_folder)
    assert "8 fixed texts and 4 pictures" in card_of(tiny_model_folder)
    assert "trust_remote_code=True" in card_of(tiny_model_folder)


@pytest.mark.parametrize(
    ("towers", "there", "absent"),
    [
        ("image", "model.encode_image(", ["encode_text", "AutoModel", "texts of up to"]),
        ("text", "model.encode_text(", ["cat.jpg", "PIL", "pipeline(", "pictures of"]),
    ],
)
def test_the_card_of_one_tower_shows_only_what_it_can(
    tmp_path, tiny_model_folder, towers, there, absent
):
    write_card(load_model(tiny_model_folder, towers=towers), tmp_path)
    assert there in card_of(tmp_path)
    assert [words for words in absent if words in card_of(tmp_path)] == []


# ── the examples ────────────────────────────────────────────────────────────────────────────────


def examples(folder, path="path/to/this/folder"):
    blocks = re.findall(r"```python\n(.*?)```", card_of(folder), re.DOTALL)
    return [block.replace(path, str(folder)) for block in blocks]


def run(python, code, folder):
    Image.new("RGB", (40, 30), (200, 30, 30)).save(folder / "cat.jpg")
    env = {**os.environ, "HF_MODULES_CACHE": str(folder.parent / "modules")}
    words = [str(python), "-c", code]
    ran = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


SHAPES = "\nimport json\nprint(json.dumps([list(v.shape) for v in (texts, pictures)]))"


def test_the_examples_in_the_card_run(tmp_path, tiny_config, tiny_encoder, tiny_model_folder):
    folder = copytree(tiny_model_folder, tmp_path / "模型")
    write_model_card(folder, tiny_config, tiny_encoder, {})
    ours, auto, pipe, _ = examples(folder)
    assert "load_model" in ours
    report = (
        "\nimport json\nprint(json.dumps([list(texts.shape), list(pictures.shape), "
        "list(outputs.text_embeds.shape), list(outputs.image_embeds.shape), len(odds)]))"
    )
    found = run(sys.executable, "\n".join([ours, auto, pipe, report]), folder)
    two, one = [2, tiny_encoder.dim], [1, tiny_encoder.dim]
    assert found == [two, one, two, one, 2]


@pytest.mark.slow
@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=lambda path: path.name)
def test_the_example_of_sentence_transformers_runs(tmp_path, tiny_model_folder, environment):
    python = python_of(environment)
    folder = copytree(tiny_model_folder, tmp_path / "模型")
    *_, sentences = examples(folder)
    assert "SentenceTransformer" in sentences
    found = run(python, sentences + SHAPES, folder)
    assert found == [[2, 16], [1, 16]]
