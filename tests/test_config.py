"""Configurations: what ships loads, what a run writes reruns it, what is out of range is refused.

Not how the command line says so: test_cli.py.
"""

from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import yaml

from m2encoder.cli.configuration import compose_config, shipped_configs, to_yaml
from m2encoder.cli.options import call_with_options
from m2encoder.config import (
    Augment,
    Data,
    Evaluate,
    Guard,
    Locked,
    Log,
    Objective,
    Optim,
    PretrainConfig,
    Save,
    Source,
    TokenizerConfig,
)
from m2encoder.errors import ConfigError
from m2encoder.eval.suites import suite_from
from m2encoder.model.architecture import Architecture
from m2encoder.presets import list_presets, preset

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
YAML_FILES = sorted(CONFIGS.rglob("*.yaml"))
OPTIONS = """
    model.width model.num_heads model.image_layers model.text_layers model.shared_layers
    model.projection_dim model.image_size model.patch_size model.patch_stem model.vocab_size
    model.max_text_length model.text_positions model.position_init_std
    towers.image towers.text init.image init.text
    data.train data.order data.cache data.cache_gb
    data.batch_size data.workers data.max_bad_fraction
    data.resize_mode
    data.augment.crop_scale_min data.augment.crop_ratio_max data.augment.flip
    data.augment.rotate_degrees data.augment.color_jitter
    tokenizer.path tokenizer.vocab_size tokenizer.truncation_side
    objectives loss.kind loss.grid loss.group_ranks loss.wire_dtype loss.duplicates
    accumulate patch_dropout unmasked_tail
    optim.lr optim.warmup_steps optim.schedule optim.cooldown optim.layer_decay optim.image_lr
    optim.text_lr optim.weight_decay optim.beta1 optim.beta2 optim.eps
    optim.clip_grad_norm
    locked ema_decay interpolate
    sharding shard_ranks precision compile checkpoint_activations
    out epochs steps seed
    evaluate.data evaluate.candidates evaluate.retrieval_every_epochs
    evaluate.zero_shot_every_epochs
    log.every_steps log.writers log.samples
    save.every_steps save.every_minutes save.keep_last save.keep_every_steps
    save.export_every_steps
    guard.max_bad_steps guard.hang_timeout_s
    resume
"""


def parse(*words):
    """The configuration that `m2enc pretrain WORDS` would run."""

    def given(cfg):
        return cfg

    given.options_class = PretrainConfig
    return call_with_options(given, "pretrain", words)


def option_names(kind, prefix=""):
    for field in fields(kind):
        if isinstance(field.type, type) and is_dataclass(field.type):
            yield from option_names(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def test_options_are_frozen():
    """A new one needs a default that keeps today's behaviour, a docstring and a use in configs/."""
    assert list(option_names(PretrainConfig)) == OPTIONS.split()


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda p: p.relative_to(CONFIGS).as_posix())
def test_every_shipped_configuration_loads(path):
    if path.parent.name == "model":
        assert preset(path.stem) == Architecture(**yaml.safe_load(path.read_text("utf-8")))
    elif path.parent.name == "eval":
        assert suite_from(yaml.safe_load(path.read_text("utf-8")), str(path)).tasks
    else:
        assert path.parent.name == "pretrain", "say here how this kind is loaded"
        cfg = parse("--config", str(path))
        assert cfg == parse("--config", f"pretrain/{path.stem}")
        known = [preset(name) for name in list_presets()]
        assert cfg.model in known or cfg.towers.text is not None


def test_shipped_configurations_are_those_of_the_folder():
    names = {path.relative_to(CONFIGS).with_suffix("").as_posix() for path in YAML_FILES}
    assert set(shipped_configs()) == names
    assert {"model/m2-encoder-1b", "pretrain/demo"} <= names


def test_without_a_file_the_defaults_are_those_of_the_dataclass():
    assert parse() == PretrainConfig()


@pytest.mark.parametrize(
    "cfg",
    [
        PretrainConfig(),
        PretrainConfig(
            model=preset("m2-encoder-1b"),
            data=Data(
                train=(Source("数据/训练 集", languages=("zh",)), Source("a: b # c", weight=0.5)),
                augment=Augment(flip=True),
            ),
            tokenizer=TokenizerConfig(path="sp.model", truncation_side="right"),
            objectives=(Objective("image-en", weight=1 / 3),),
            optim=Optim(lr=1e-7, eps=1e-12, warmup_steps=0),
            locked=(Locked("image.*", until=0.5),),
            evaluate=Evaluate("a: b # c", candidates=100),
            resume="never",
        ),
        *(PretrainConfig(out=name) for name in ("null", "123", "1e-3", "on", "~", "{x}", "- a")),
    ],
)
def test_what_a_run_writes_reruns_it(tmp_path, cfg):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(cfg), encoding="utf-8")
    assert parse("--config", str(path)) == cfg


def test_resolved_file_names_every_option():
    values = yaml.safe_load(to_yaml(PretrainConfig()))
    assert values.keys() == {field.name for field in fields(PretrainConfig)}
    assert values["data"].keys() == {field.name for field in fields(Data)}


def test_options_override_the_file_and_leave_the_rest(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("optim: {lr: 1e-3, beta2: 0.95}\nepochs: 3\n")
    cfg = parse("--config", str(path), "--optim.lr", "3e-4", "--data.train", "x")
    assert cfg == PretrainConfig(optim=Optim(lr=3e-4, beta2=0.95), epochs=3, data=Data(train="x"))


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", ".001"])
def test_a_number_in_yaml_may_be_written_as_people_write_it(tmp_path, text):
    (tmp_path / "c.yaml").write_text(f"optim: {{lr: {text}}}\n")
    assert parse("--config", str(tmp_path / "c.yaml")).optim.lr == 1e-3


def test_a_date_is_as_good_a_name_as_any(tmp_path):
    (tmp_path / "c.yaml").write_text("out: 2024-01-31\n")
    assert parse("--config", str(tmp_path / "c.yaml")).out == "2024-01-31"


def test_dashes_and_underscores_are_alike():
    expected = PretrainConfig(save=Save(keep_last=7), data=Data(batch_size=9))
    assert parse("--save.keep-last=7", "--data.batch-size=9") == expected
    assert parse("--save.keep_last", "7", "--data.batch_size", "9") == expected


def test_null_evaluates_nothing(tmp_path):
    (tmp_path / "c.yaml").write_text("evaluate: {data: x}\n")
    words = ("--config", str(tmp_path / "c.yaml"))
    assert parse(*words).evaluate.data == "x"
    assert parse(*words, "--evaluate.data", "null").evaluate.data is None


def test_objectives_can_be_given_on_the_command_line():
    words = ("--objectives", '[{"name": "image-en", "weight": 2}]')
    assert parse(*words).objectives == (Objective("image-en", weight=2.0),)


@pytest.mark.parametrize(
    "text",
    ["model: m2-encoder-1b", "model: {preset: m2-encoder-1b}", "model:\n  preset: m2-encoder-1b"],
)
def test_a_file_may_name_a_preset(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    assert parse("--config", str(tmp_path / "c.yaml")).model == preset("m2-encoder-1b")


def test_a_preset_can_be_changed_in_part(tmp_path):
    (tmp_path / "c.yaml").write_text("model: {preset: m2-encoder-0.4b, image_size: 448}\n")
    cfg = parse("--config", str(tmp_path / "c.yaml"), "--model.max-text-length", "77")
    assert cfg.model == replace(preset("m2-encoder-0.4b"), image_size=448, max_text_length=77)


@pytest.mark.parametrize("words", [(), ("--config", "demo")])
def test_the_command_line_may_name_a_preset_which_replaces_the_whole_model(words):
    assert parse(*words, "--model", "m2-encoder-1b").model == preset("m2-encoder-1b")


def test_composing_keeps_what_it_does_not_know(tmp_path):
    (tmp_path / "c.yaml").write_text("model: {preset: m2-encoder-tiny}\n未知: 1\n")
    assert yaml.safe_load(compose_config(str(tmp_path / "c.yaml")))["未知"] == 1


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Augment(crop_scale_min=0), "crop_scale_min must lie in (0, 1], got 0"),
        (lambda: Augment(crop_ratio_max=0.9), "crop_ratio_max must be at least 1, got 0.9"),
        (lambda: Augment(color_jitter=1.0), "color_jitter must lie in [0, 1), got 1.0"),
        (lambda: Data(batch_size=1), "data.batch_size must be at least 2, got 1"),
        (lambda: Data(workers=-1), "data.workers must not be negative, got -1"),
        (lambda: Data(max_bad_fraction=1.5), "data.max_bad_fraction must lie in [0, 1], got 1.5"),
        (lambda: Objective("image-zh", weight=0), "objective image-zh: weight must be > 0, got 0"),
        (lambda: Optim(lr=0), "optim.lr must be positive, got 0"),
        (lambda: Optim(lr=float("nan")), "optim.lr must be positive, got nan"),
        (lambda: Optim(warmup_steps=-1), "optim.warmup_steps must not be negative, got -1"),
        (lambda: Optim(weight_decay=-0.1), "optim.weight_decay must not be negative, got -0.1"),
        (lambda: Optim(beta2=1.0), "optim.beta2 must lie in [0, 1), got 1.0"),
        (lambda: Optim(clip_grad_norm=0), "optim.clip_grad_norm must be > 0, got 0"),
        (lambda: PretrainConfig(objectives=()), "objectives is empty, expected at least one"),
        (
            lambda: PretrainConfig(objectives=(Objective("image-zh"), Objective("image-zh"))),
            "objectives repeat a name: image-zh, image-zh",
        ),
        (lambda: PretrainConfig(epochs=0), "epochs must be > 0, got 0"),
        (lambda: PretrainConfig(steps=0), "steps must be at least 1, got 0"),
        (lambda: PretrainConfig(ema_decay=1.0), "ema_decay must lie in (0, 1), got 1.0"),
        (lambda: PretrainConfig(interpolate=0), "interpolate must lie in (0, 1), got 0"),
        (lambda: Optim(layer_decay=0), "optim.layer_decay must lie in (0, 1], got 0"),
        (lambda: Optim(cooldown=1), "optim.cooldown must lie in [0, 1), got 1"),
        (lambda: Data(train=()), "data.train is empty, expected a folder or a list of sources"),
        (lambda: Data(train='[{"pat": 1}]'), 'data.train: no list of sources: [{"pat": 1}]; each'),
        (lambda: Source("a", weight=0), "data.train: a: weight must be > 0, got 0"),
        (lambda: Locked("image.*", until=0), "locked image.*: until must lie in (0, 1], got 0"),
        (lambda: Save(keep_last=0), "save.keep_last must be at least 1, got 0"),
        (lambda: Save(every_minutes=0), "save.every_minutes must be > 0, got 0"),
        (lambda: Log(every_steps=0), "log.every_steps must be at least 1, got 0"),
        (lambda: Guard(hang_timeout_s=0), "guard.hang_timeout_s must be > 0, got 0"),
        (lambda: Evaluate(retrieval_every_epochs=0), "evaluate.retrieval_every_epochs must be > 0"),
        (lambda: PretrainConfig(seed=-1), "seed must not be negative, got -1"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_was_expected(make, said):
    with pytest.raises(ConfigError) as error:
        make()
    assert said in str(error.value)


@pytest.mark.parametrize("name", ["width", "num_heads", "projection_dim", "image_size"])
def test_a_model_needs_positive_sizes(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, found 0"):
        replace(Architecture(), **{name: 0})
