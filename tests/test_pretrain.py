"""`m2enc pretrain` as a whole: what it exports, what it refuses, and that it survives kill -9.

Not the training loop by itself: test_train.py.
"""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from released_model import small_model
from saved_runs import tensors_of, weights_of

from m2encoder.cli import main
from m2encoder.cli.configuration import to_yaml
from m2encoder.cli.pretrain import run, the_only_run_in
from m2encoder.config import Evaluate, Log, Save, TokenizerConfig
from m2encoder.load import load_model
from m2encoder.log import read_metrics
from m2encoder.released_tokenizer import ReleasedTokenizer


@pytest.fixture
def write_config(tiny_config, tiny_model_folder, tmp_path):
    """Write a configuration file; returns the words that run it, and its `out`."""

    def write(name="run", **changes):
        out = tmp_path / name
        own = TokenizerConfig(path=str(tiny_model_folder / "sp.model"))
        cfg = replace(tiny_config, **{"tokenizer": own, "out": str(out)} | changes)
        path = tmp_path / f"{name}.yaml"
        path.write_text(to_yaml(cfg), encoding="utf-8")
        return ["pretrain", "--config", str(path)], out

    return write


@pytest.fixture(scope="module")
def exported(tiny_config, tiny_shards, tmp_path_factory):
    """The folder of a whole run with evaluation, and the words that made it."""
    folder = tmp_path_factory.mktemp("whole")
    measured = Evaluate(data=str(tiny_shards / "val"), candidates=20)
    out = folder / "我的模型"
    cfg = replace(tiny_config, evaluate=measured, epochs=2, out=str(out))
    (folder / "c.yaml").write_text(to_yaml(cfg), encoding="utf-8")
    words = ["pretrain", "--config", str(folder / "c.yaml")]
    assert main(words) == 0
    return out, words


def test_a_run_exports_a_folder_that_load_model_opens(exported):
    out, _ = exported
    encoder = load_model(out / "model", device="cpu")
    vectors = encoder.encode_text(["一只猫", "a cat", "ＡＢＣ 貓🐱"])
    assert vectors.shape == (3, 16)
    weights = weights_of(max((out / "checkpoints").iterdir()))
    assert all(torch.equal(v, weights[k]) for k, v in encoder.model.state_dict().items())


def test_a_run_trains_with_a_released_tokenizer(write_config, tmp_path):
    (tmp_path / "released.model").write_bytes(small_model())
    released = TokenizerConfig(path=str(tmp_path / "released.model"))
    words, out = write_config(tokenizer=released)
    assert main(words) == 0
    encoder = load_model(out / "model", device="cpu")
    own = ReleasedTokenizer(small_model())
    text = "  一只红色的猫  and a cat"
    assert encoder.tokenizer(text)["input_ids"] == own.encode(text)
    assert encoder.model.config.eos_token_id == own.end_id
    np.testing.assert_allclose(np.linalg.norm(encoder.encode_text(text)), 1, atol=1e-6)


def test_the_exported_folder_has_a_card_a_tokenizer_and_its_figures(exported):
    out, _ = exported
    card = (out / "model/README.md").read_text("utf-8")
    assert yaml.safe_load(card.split("---")[1])["language"] == ["zh", "en"]
    assert (out / "model/sp.model").read_bytes() == (out / "sp.model").read_bytes()
    figures = json.loads((out / "model/results.json").read_text("utf-8"))
    assert {"eval/val/zh/i2t_r1", "eval/val/en/t2i_r10", "eval/val/zh/mean_recall"} <= set(figures)
    assert all(0 <= value <= 1 for value in figures.values())
    evaluated = [row for row in read_metrics(out / "metrics.jsonl") if "loss" not in row]
    assert [row.pop("step") for row in evaluated] == [10, 20]
    assert evaluated[-1] == figures
    assert f"| eval/val/zh/i2t_r1 | {figures['eval/val/zh/i2t_r1']:.4f} |" in card


def test_the_resolved_configuration_reruns_the_finished_run(exported, capsys):
    out, _ = exported
    before = read_metrics(out / "metrics.jsonl")
    assert main(["pretrain", "--config", str(out / "config.yaml")]) == 0
    assert capsys.readouterr().out.strip() == str(out / "model")
    assert read_metrics(out / "metrics.jsonl") == before


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--data.batch-size", "8", "data.batch_size"),
        ("--optim.lr", "0.5", "optim"),
        ("--tokenizer.vocab-size", "900", "tokenizer"),
        ("--seed", "7", "seed"),
        ("--model.image-layers", "3", "model"),
    ],
)
def test_a_finished_run_refuses_other_settings(exported, capsys, option, value, said):
    out, words = exported
    before = (out / "config.yaml").read_bytes()
    assert main([*words, option, value]) == 2
    assert f"holds a run with another {said}; choose another --out" in capsys.readouterr().err
    assert (out / "config.yaml").read_bytes() == before


def test_settings_can_be_corrected_while_nothing_was_trained(write_config, capsys):
    words, out = write_config()
    assert main([*words, "--data.batch-size", "1000"]) == 3
    assert "160 pairs, a batch takes 1000" in capsys.readouterr().err
    assert main([*words, "--tokenizer.path", "null", "--tokenizer.vocab-size", "500"]) == 0
    assert load_model(out / "model", device="cpu").model.config.vocab_size <= 500


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--evaluate.data", "no/such/folder"], 3, "no/such/folder/index.json: missing index"),
        (["--evaluate.candidates", "1000000"], 2, "candidates is 1,000,000, expected 2 to"),
    ],
)
def test_an_evaluation_that_cannot_work_is_found_before_training(
    write_config, tiny_config, tiny_shards, capsys, options, code, said
):
    words, out = write_config(evaluate=Evaluate(data=str(tiny_shards / "val")))
    assert main([*words, *options]) == code
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1
    assert not (out / "metrics.jsonl").exists()


def test_a_folder_takes_one_run_at_a_time(write_config, capsys, monkeypatch):
    words, out = write_config()
    monkeypatch.setattr("m2encoder.cli.pretrain.LOCK_TIMEOUT_S", 0.1)
    with the_only_run_in(out):
        assert main(words) == 2
    assert f"{out}: another process trains into this folder" in capsys.readouterr().err
    assert not (out / "metrics.jsonl").exists()
    assert main(words) == 0


def wait_for(path, process):
    """Return once `path` exists; fails if the process ends before."""
    for _ in range(3000):
        if path.exists():
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    pytest.fail(f"{path} did not appear in 30 s")


def losses_of(out):
    """Step and every loss of each row; the times differ from run to run."""
    rows = read_metrics(out / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k == "step" or "loss" in k} for row in rows]


# A shell starts background jobs with SIGINT ignored, and children inherit that.
INTERRUPTIBLE = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from m2encoder.cli import main
sys.exit(main())
"""


def test_a_run_that_was_killed_and_interrupted_goes_on_to_the_bit(write_config):
    changes = {"epochs": 15, "save": Save(every_steps=10), "log": Log(every_steps=3, writers=())}
    words, out = write_config("stopped", **changes)
    command = [sys.executable, "-c", INTERRUPTIBLE, *words]
    for step, signal_sent, code in ((20, signal.SIGKILL, -9), (60, signal.SIGINT, 130)):
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            wait_for(out / "checkpoints" / f"step-{step:08d}", process)
            process.send_signal(signal_sent)
            _, shown = process.communicate(timeout=30)
        assert process.returncode == code
        assert "Traceback" not in shown
        assert not (out / "model").exists()
    assert shown.endswith("m2enc: interrupted\n")
    assert main(words) == 0

    whole_words, whole_out = write_config("whole", **changes)
    assert main(whole_words) == 0
    assert losses_of(out) == losses_of(whole_out)
    found, expected = (tensors_of(o / "checkpoints/step-00000150") for o in (out, whole_out))
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    exported = "model/model.safetensors"
    assert (out / exported).read_bytes() == (whole_out / exported).read_bytes()


def test_the_resize_mode_is_saved_with_the_model(tiny_config, tmp_path):
    shorter = replace(tiny_config.data, resize_mode="shortest")
    folder = run(replace(tiny_config, data=shorter, out=str(tmp_path / "run")), show_progress=False)
    assert load_model(folder, device="cpu").image_processor.resize_mode == "shortest"
