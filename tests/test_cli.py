"""The command line through its front door: help, mistakes in one line, exit codes.

Not what configurations mean (test_config.py), nor whole runs (test_pretrain.py).
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from m2encoder.cli import COMMANDS, main


def m2enc(*words):
    """The exit code of `m2enc WORDS`, run in this process."""
    try:
        return main([str(word) for word in words])
    except SystemExit as stop:  # --help
        return stop.code


def in_its_own_process(*words, **options):
    command = [sys.executable, "-m", "m2encoder", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, **options)


@pytest.fixture
def one_line(capsys):
    """A function that gives the one line on stderr, checked to be one and no traceback."""

    def read():
        shown = capsys.readouterr()
        assert shown.err.startswith("m2enc: ")
        assert shown.err.count("\n") == 1, shown.err
        assert "Traceback" not in shown.err
        return shown.err.removeprefix("m2enc: ").strip()

    return read


# --- help --------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_help_lists_every_command_and_the_exit_codes(capsys, words):
    assert m2enc(*words) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)
    assert "2 usage, 3 bad data" in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_with_dashed_options(capsys, name):
    assert m2enc(*name.split(), "--help") == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: m2enc {name}")
    assert re.findall(r"--[\w.-]*_[\w.-]*", shown) == []
    assert "PATH1" not in shown
    assert "{true,false}" not in shown


def test_every_option_of_pretrain_has_an_explanation(capsys):
    m2enc("pretrain", "--help")
    shown = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "--optim.warmup-steps WARMUP_STEPS Optimizer steps of linear warmup. (type: int" in shown
    about_batch = "Pairs per optimizer step, of all processes together. (type: int"
    assert f"--data.batch-size BATCH_SIZE {about_batch}" in shown
    assert "--model.patch-stem {linear,conv} linear: one convolution of patch size" in shown


def test_a_group_lists_its_own_commands(capsys):
    assert m2enc("data", "--help") == 0
    shown = capsys.readouterr().out
    assert "data verify" in shown
    assert "pretrain" not in shown


def test_help_imports_nothing_heavy():
    words = [sys.executable, "-X", "importtime", "-m", "m2encoder", "--help"]
    ran = subprocess.run(words, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in ran.stderr.splitlines()}
    assert "m2encoder" in imported
    assert imported & {"torch", "transformers", "numpy", "faiss", "PIL", "jsonargparse"} == set()


def test_help_of_pretrain_and_mistakes_in_it_import_no_torch():
    code = (
        "import sys; from m2encoder.cli import main\n"
        "assert main(['pretrain', '--epochs', 'x']) == 2\n"
        "try: main(['pretrain', '--help'])\n"
        "except SystemExit: print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"


# --- mistakes: one line, exit code 2 -----------------------------------------------------------

MISTAKES = {
    "pretrain --optim.lrr 3": "unknown option --optim.lrr; did you mean --optim.lr?",
    "pretrain --optim.warmup_stepps=3": "did you mean --optim.warmup-steps?",
    "pretrain --lr 3e-4": "unknown option --lr; did you mean --optim.lr?",
    "pretrain --batch-size 3": "did you mean --data.batch-size?",
    "pretrain --zzzzzz": "unknown option --zzzzzz; --help names those that exist",
    "eval retrieval m d --on-eror skip": "did you mean --on-error?",
    "config list --verbose": "unknown option --verbose",
    "pretrain --optim.lr abc": "pretrain: optim.lr: expected float, got abc",
    "pretrain --accumulate 1.5": "pretrain: accumulate: expected int, got 1.5",
    "pretrain --data.augment.flip=perhaps": "data.augment.flip: expected bool, got perhaps",
    "pretrain --resume maybe": "resume: expected one of 'auto', 'never', got maybe",
    "pretrain --objectives [{name:image-fr}]": "pretrain: objectives: ",
    "pretrain --objectives []": "objectives is empty, expected at least one",
    "pretrain --optim.lr -1": "optim.lr must be positive, got -1.0",
    "pretrain --model.width 33": "num_heads 6 does not divide width 33",
    "pretrain --model.num-heads 0": "num_heads must be at least 1, found 0",
    "pretrain --epochs 0": "epochs must be > 0, got 0",
    "pretrain --epochs": "argument --epochs: expected one argument",
    "pretrain --epochs --seed 3": "argument --epochs: expected one argument",
    "pretrain surplus": "unrecognized arguments: surplus",
    "pretrain --config nope": "no configuration 'nope': neither a file nor a shipped one",
    "pretrain --config": "argument --config: expected one argument",
    "pretrain --model m2-encoder-2b": "no model preset 'm2-encoder-2b'; expected one of m2-",
    "data verify": "data verify: the following arguments are required: folder",
    "pretrain --model m2-encoder-2b --config demo": "no model preset 'm2-encoder-2b'",
    "pretrain --optim 3": "pretrain: optim: expected a mapping of settings",
    "config cp nope": "no configuration 'nope'",
    "serach x": "no command 'serach x'; expected one of: demo, pretrain",
    "data foo": "no command 'data foo'",
    "--foo": "no command '--foo'",
    "eval retrieval m d --on-error no": "on_error: expected one of 'raise', 'skip', got no",
    "eval retrieval m d --batch-size x": "batch_size: expected int, got x",
    "tokenizer train --out x": "the following arguments are required: sources",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(one_line, words):
    assert m2enc(*words.split(" ")) == 2
    assert MISTAKES[words] in one_line()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optim: {lrr: 3}", "unknown setting optim.lrr; did you mean optim.lr?"),
        ("epoch: 3", "unknown setting epoch; did you mean epochs?"),
        ("训练: 3", "unknown setting 训练"),
        ("model: {preset: m2-encoder-tiny, widht: 3}", "unknown setting model.widht; did you mean"),
        ("optim: {lr: fast}", "optim.lr: expected float, got fast"),
        ("optim: 3", "optim: expected a mapping of settings, got 3"),
        ("data: {augment: strong}", "data.augment: expected a mapping of settings or"),
        ("data:", "data: expected a mapping of settings, got None"),
        ("model: 5", "model: expected a mapping of settings, got 5"),
        ("steps: 2.5", "steps: expected int or null, got 2.5"),
        ("objectives: [{name: image-zh, wight: 3}]", "'wight' is not accepted"),
        ("model: m2-encoder-2b", "no model preset 'm2-encoder-2b'"),
        ("- a\n- b", "holds a list, expected a mapping of settings"),
        ("", "expected a mapping of settings"),
        ("just words", "holds a str, expected a mapping"),
        ("a: [1,\nb: }", "not valid YAML"),
        ("data: {batch_size: 1}", "data.batch_size must be at least 2, got 1"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_and_exit_code_2(one_line, tmp_path, text, said):
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    assert m2enc("pretrain", "--config", path, "--dry-run") == 2
    assert said in one_line()


def test_a_file_that_is_not_utf8_is_one_line(one_line, tmp_path):
    (tmp_path / "c.yaml").write_bytes("out: 运行".encode("gbk"))
    assert m2enc("pretrain", "--config", tmp_path / "c.yaml") == 2
    assert "c.yaml: not valid YAML" in one_line()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("data verify FOLDER/none", 3),
        ("tokenizer train FOLDER/none.txt --out FOLDER/x", 3),
        ("tokenizer train FOLDER/empty.txt --out FOLDER/x", 3),
        ("eval retrieval FOLDER/none FOLDER", 3),
        ("eval retrieval m2-encoder-1b FOLDER", 3),
        ("pretrain --data.train FOLDER/none --out FOLDER/run", 3),
        ("pretrain --data.train FOLDER --out FOLDER/run", 3),
    ],
)
def test_missing_data_is_one_line_and_exit_code_3(one_line, tmp_path, words, code):
    (tmp_path / "empty.txt").touch()
    assert m2enc(*words.replace("FOLDER", str(tmp_path)).split()) == code
    assert len(one_line()) > 20


def test_a_truncated_shard_is_one_line_and_exit_code_3(one_line, tiny_shards, tmp_path):
    folder = shutil.copytree(tiny_shards / "train", tmp_path / "d")
    shard = folder / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    assert m2enc("pretrain", "--data.train", folder, "--out", tmp_path / "run") == 3
    assert "truncated or changed shard" in one_line()


def test_debug_shows_the_traceback_and_the_line():
    plain, debug = (
        in_its_own_process(*words)
        for words in (("config", "cp", "nope"), ("config", "cp", "nope", "--debug"))
    )
    assert (plain.returncode, debug.returncode) == (2, 2)
    assert plain.stderr.count("\n") == 1
    assert "Traceback (most recent call last)" in debug.stderr
    assert debug.stderr.splitlines()[-1] == plain.stderr.strip()


# --- words to arguments ------------------------------------------------------------------------


def test_several_words_after_a_list_and_before_an_option_belong_to_the_list(capsys, tmp_path):
    for name, text in (("中文.txt", "一只猫\n三条鱼\n"), ("b.txt", "a cat\nthree fish\n")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    sources = [tmp_path / "中文.txt", tmp_path / "b.txt"]
    for words in ([*sources, "--out", tmp_path / "1"], ["--out", tmp_path / "2", *sources]):
        assert m2enc("tokenizer", "train", *words) == 0
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert m2enc("tokenizer", "train", sources[0], "--out", tmp_path / "3") == 0
    assert "pieces" in capsys.readouterr().out


@pytest.mark.parametrize("flag", [["--json"], ["--json=true"], ["--json", "true"]])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_flag_needs_no_value(capsys, tiny_model_folder, tiny_shards, flag, is_first):
    places = [tiny_model_folder, tiny_shards / "test"]
    words = [*flag, *places] if is_first else [*places, *flag]
    assert m2enc("eval", "retrieval", "--candidates", "10", *words) == 0
    found = json.loads(capsys.readouterr().out)
    assert [result["language"] for result in found] == ["zh", "en"]


def test_a_shipped_configuration_can_be_copied_once_and_used(capsys, one_line, tmp_path):
    assert m2enc("config", "cp", "demo", "--out", tmp_path / "配置" / "my.yaml") == 0
    path = Path(capsys.readouterr().out.strip())
    assert m2enc("pretrain", "--config", path, "--dry-run") == 0
    capsys.readouterr()
    assert m2enc("config", "cp", "demo", "--out", path) == 2
    assert "exists already" in one_line()


def test_config_list_names_what_config_accepts(capsys):
    assert m2enc("config", "list") == 0
    names = capsys.readouterr().out.split()
    assert "pretrain/demo" in names
    assert m2enc("pretrain", "--config", "pretrain/demo", "--dry-run") == 0


def test_dry_run_prints_parameters_and_works_outside_the_tree(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert m2enc("pretrain", "--config", "demo", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert int(re.findall(r"parameters: ([\d,]+)", shown)[0].replace(",", "")) > 100_000
    assert "data: runs/demo/data/train/index.json: missing index" in shown
    assert list(tmp_path.iterdir()) == []


def test_dry_run_counts_steps_where_the_data_is_there(capsys, tiny_shards):
    words = ("--data.train", tiny_shards / "train", "--data.batch-size", 50, "--epochs", 4)
    assert m2enc("pretrain", *words, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "steps: 12 of 50 pairs, 600 samples, 3.75 epochs of 160 pairs" in shown
    assert "160 pairs (zh en) in 1 shards of" in shown


def test_print_config_gives_a_file_that_runs_the_same(capsys, tmp_path):
    words = ["pretrain", "--config", "demo", "--epochs", "3", "--out", "运行"]
    assert m2enc(*words, "--print-config") == 0
    first = capsys.readouterr().out
    (tmp_path / "c.yaml").write_text(first, encoding="utf-8")
    assert m2enc("pretrain", "--config", tmp_path / "c.yaml", "--print-config") == 0
    assert capsys.readouterr().out == first
    assert yaml.safe_load(first)["out"] == "运行"
