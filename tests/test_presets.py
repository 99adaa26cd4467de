"""Presets and shipped runs: sizes that names promise, plans that fit, without allocating a weight.

Not the plan itself: test_plan.py.
"""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml

from m2encoder.cli import main
from m2encoder.cli.configuration import shipped_configs
from m2encoder.errors import ConfigError
from m2encoder.model.configuration_m2encoder import M2EncoderConfig
from m2encoder.model.modeling_m2encoder import M2Encoder
from m2encoder.presets import list_presets, preset, preset_values

# Parameters of the released models: all, those that a picture passes, those that a text passes and
# those of the shared ("vl A") layers, as counted on the official code.
RELEASED = {
    "m2-encoder-0.4b": (263_289_602, 87_074_304, 175_623_168, 21_288_192),
    "m2-encoder-1b": (730_416_130, 305_649_664, 423_714_816, 37_821_440),
    "m2-encoder-10b": (10_182_004_738, 4_846_477_312, 5_318_737_920, 604_270_592),
}
UNUSED_ROWS = 2  # each released position table begins with two rows that nothing reads


def count(module: torch.nn.Module | None) -> int:
    assert module is not None
    return sum(parameter.numel() for parameter in module.parameters())


def on_meta(name: str) -> M2Encoder:
    with torch.device("meta"):
        return M2Encoder(M2EncoderConfig(**asdict(preset(name))))


@pytest.mark.parametrize("name", sorted(RELEASED))
def test_a_released_preset_has_the_released_sizes_but_for_what_inference_never_reads(
    name: str,
) -> None:
    all_of_it, image_path, text_path, shared = RELEASED[name]
    model, shape = on_meta(name), preset(name)
    width, head = shape.width, shape.width * shape.projection_dim
    assert count(model.shared) == shared
    # The released paths also count a second projection, taken before the shared layers, and, for
    # pictures, the mask token of masked modelling.
    ours = count(model.image) + count(model.image_projection) + count(model.shared)
    assert ours == image_path - head - width - UNUSED_ROWS * width
    ours = count(model.text) + count(model.text_projection) + count(model.shared)
    assert ours == text_path - head - UNUSED_ROWS * width
    never_read = (
        shared  # the B set of the vl layers: only joint image and text input would use it
        + 2 * width  # the top-level norm
        + width * width + width  # the pooler
        + width  # the mask token
        + 2 * head  # the projections before the shared layers
        + 1  # the second logit scale
        + 2 * UNUSED_ROWS * width
    )  # fmt: skip
    assert count(model) == all_of_it - never_read


def test_our_own_counts_of_the_released_presets_are_known() -> None:
    counts = {name: count(on_meta(name)) for name in RELEASED}
    assert counts == {
        "m2-encoder-0.4b": 240_225_793,
        "m2-encoder-1b": 689_440_769,
        "m2-encoder-10b": 9_552_535_553,
    }


@pytest.mark.parametrize("name", sorted(RELEASED))
def test_a_released_preset_sees_197_image_tokens_and_the_official_vocabulary(name: str) -> None:
    shape = preset(name)
    assert 1 + shape.grid**2 == 197
    assert (shape.vocab_size, shape.max_text_length, shape.text_positions) == (115_244, 52, 1022)
    assert shape.width // shape.num_heads == (128 if name.endswith("10b") else 64)
    assert shape.ffn_width == 4 * shape.width
    assert (shape.patch_stem, shape.position_init_std) == ("linear", 1.0)


def test_tiny_is_a_whole_model_that_two_cores_can_train() -> None:
    shape = preset("m2-encoder-tiny")
    assert min(shape.image_layers, shape.text_layers, shape.shared_layers) >= 2
    assert count(on_meta("m2-encoder-tiny")) < 10_000_000


def test_every_preset_is_listed_and_opens() -> None:
    assert set(list_presets()) == {*RELEASED, "m2-encoder-tiny"}
    for name in list_presets():
        values = preset_values(name)
        assert {key: asdict(preset(name))[key] for key in values} == values


@pytest.mark.parametrize("name", ["m2-encoder-2b", "", "../pretrain/demo", "一号"])
def test_an_unknown_preset_is_one_line_that_names_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        preset(name)
    assert "\n" not in str(caught.value)
    assert repr(name) in str(caught.value)
    assert "m2-encoder-0.4b, m2-encoder-10b, m2-encoder-1b, m2-encoder-tiny" in str(caught.value)


# ── shipped runs ────────────────────────────────────────────────────────────────────────────────

RUNS = sorted(name for name in shipped_configs() if name.startswith("pretrain/"))
GPUS = {"m2-0.4b": (8, 8), "m2-1b": (32, 8), "m2-10b": (256, 8)}
"""Processes that a shipped configuration names, and those of one machine."""


def test_the_shipped_runs_are_known() -> None:
    assert RUNS == [
        "pretrain/demo",
        "pretrain/demo-emoji",
        "pretrain/finetune-small",
        "pretrain/lit-pretrained-towers",
        "pretrain/m2-0.4b",
        "pretrain/m2-10b",
        "pretrain/m2-1b",
    ]


@pytest.mark.parametrize("name", RUNS)
def test_every_shipped_run_loads_and_plans(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # none of its data is here
    assert main(["pretrain", "--config", name, "--dry-run"]) == 0
    out = capsys.readouterr().out
    config, _, found = out.partition("\n---\n")
    assert yaml.safe_load(config)["out"].startswith("runs/")
    assert "parameters" in found
    assert "steps: " in found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", sorted(GPUS))
def test_a_large_run_fits_the_gpus_that_it_names(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    world_size, local = GPUS[name]
    for variable, value in (
        ("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", world_size), ("LOCAL_WORLD_SIZE", local),
    ):  # fmt: skip
        monkeypatch.setenv(variable, str(value))
    assert main(["pretrain", "--config", name, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("memory per process")]
    gibibytes = float(line.split(": ")[1].split(" GiB")[0])
    assert 10 < gibibytes < 60  # of 80; the rest is for what the estimate leaves out
    (line,) = [line for line in lines if line.startswith("processes")]
    assert line.startswith(f"processes: {world_size} on {world_size // local} machine")
