"""The training loop on real tiny data: resuming to the bit, what it logs, what stops it.

Not the loss against other toolkits (peers/test_clip_loss.py), nor the command (test_pretrain.py).
"""

import io
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from saved_runs import TIMES, StopsAt, tensors_of, weights_of

from m2encoder.cli.training import make_stream, new_encoder, prepare_tokenizer
from m2encoder.config import Data, Log, Objective, Optim, Save, TokenizerConfig
from m2encoder.errors import CheckpointError, DataError, M2EncoderError
from m2encoder.log import read_metrics
from m2encoder.shards import Pair, write_shards
from m2encoder.train import pretrain
from m2encoder.train_parts import MAX_LOG_SCALE, Evaluator


@pytest.fixture
def configure(tiny_config, tiny_model_folder, tmp_path):
    """A run in its own folder; keyword arguments change the tiny configuration."""

    def change(name="run", **changes):
        own = TokenizerConfig(path=str(tiny_model_folder / "sp.model"))
        return replace(tiny_config, **{"tokenizer": own, "out": str(tmp_path / name)} | changes)

    return change


def start(cfg, *, stop_at=10**9, evaluators=None, init_seed=None, log_scale=None, **options):
    """Train as configured with a fresh encoder; `init_seed` gives other initial weights."""
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    tokenizer = prepare_tokenizer(cfg)
    cfg = replace(cfg, model=replace(cfg.model, vocab_size=tokenizer.vocab_size))
    seeded = cfg if init_seed is None else replace(cfg, seed=init_seed)
    encoder = new_encoder(seeded, tokenizer)
    if log_scale is not None:
        encoder.model.logit_scale.data.fill_(log_scale)
    stream = StopsAt(make_stream(cfg, tokenizer), stop_at)
    return encoder, pretrain(cfg, encoder, stream, evaluators or {}, **options)


def rows_of(cfg):
    """Rows of metrics.jsonl without the times, which differ from run to run."""
    rows = read_metrics(Path(cfg.out) / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]


def newest(cfg):
    return max((Path(cfg.out) / "checkpoints").iterdir())


def assert_same_run(ours, theirs):
    """The same rows, and weights and optimizer state equal to the bit."""
    assert rows_of(ours) == rows_of(theirs)
    assert newest(ours).name == newest(theirs).name
    found, expected = (tensors_of(newest(cfg)) for cfg in (ours, theirs))
    assert found.keys() == expected.keys()
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []


# 10 steps per epoch: stopped in mid-epoch, at the border, past it, between and on checkpoints
@pytest.mark.parametrize("stop_at", [2, 5, 10, 11, 14, 19])
def test_resuming_equals_never_having_stopped(configure, stop_at):
    changes = {"epochs": 2, "save": Save(every_steps=5)}
    whole, stopped = configure("whole", **changes), configure("stopped", **changes)
    start(whole)
    with pytest.raises(KeyboardInterrupt):
        start(stopped, stop_at=stop_at)
    is_saved = stop_at >= 5  # then nothing may come from the initial weights
    start(stopped, init_seed=99 if is_saved else None)
    assert_same_run(stopped, whole)


def test_stopping_three_times_equals_never_having_stopped(configure):
    changes = {"epochs": 2, "save": Save(every_steps=3), "log": Log(every_steps=4, writers=())}
    whole, stopped = configure("whole", **changes), configure("stopped", **changes)
    start(whole)
    for stop_at in (4, 11, 17):
        with pytest.raises(KeyboardInterrupt):
            start(stopped, stop_at=stop_at)
    start(stopped)
    assert_same_run(stopped, whole)


def test_no_step_is_logged_twice(configure):
    cfg = configure(save=Save(every_steps=3))
    for stop_at in (5, 8):
        with pytest.raises(KeyboardInterrupt):
            start(cfg, stop_at=stop_at)
    start(cfg)
    assert [row["step"] for row in rows_of(cfg)] == list(range(1, 11))


def test_an_evaluation_is_logged_once_and_the_same_after_a_stop(configure):
    changes = {"epochs": 3, "save": Save(every_steps=5)}
    whole, stopped = configure("whole", **changes), configure("stopped", **changes)
    sizes = Evaluator(lambda encoder: {"size": encoder.model.image.positions.norm().item()})
    evaluators = {"val": sizes}
    start(whole, evaluators=evaluators)
    for stop_at in (10, 12, 21):
        with pytest.raises(KeyboardInterrupt):
            start(stopped, stop_at=stop_at, evaluators=evaluators)
    start(stopped, evaluators=evaluators)
    assert [row["step"] for row in rows_of(whole) if "loss" not in row] == [10, 20, 30]
    assert_same_run(stopped, whole)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(configure):
    runs = [configure("a"), configure("b"), configure("c", seed=1)]
    for cfg in runs:
        start(cfg)
    assert_same_run(runs[0], runs[1])
    assert rows_of(runs[0])[0]["loss"] != rows_of(runs[2])[0]["loss"]


def test_a_finished_run_trains_no_more_and_is_evaluated_again(configure):
    cfg = configure()
    start(cfg)
    before, saved = rows_of(cfg), newest(cfg)
    halves = {"val": Evaluator(lambda _: {"r1": 0.5})}
    encoder, results = start(cfg, stop_at=0, evaluators=halves, init_seed=9)
    assert results == {"eval/val/r1": 0.5}
    assert (rows_of(cfg), newest(cfg)) == (before, saved)
    weights = weights_of(saved)
    assert all(torch.equal(v, weights[k]) for k, v in encoder.model.state_dict().items())


def test_training_gets_better_than_guessing(configure):
    cfg = configure(epochs=15, optim=Optim(lr=2e-3, warmup_steps=5))
    start(cfg)
    losses = [row["loss"] for row in rows_of(cfg)]
    assert sum(losses[-10:]) / 10 < 0.9 * math.log(16)  # guessing among 16 loses log(16)


def test_rows_say_what_happened(configure):
    cfg = configure(
        epochs=2, log=Log(every_steps=4, writers=()), optim=Optim(lr=1e-3, warmup_steps=10)
    )
    start(cfg)
    rows = read_metrics(Path(cfg.out) / "metrics.jsonl")
    assert [row["step"] for row in rows] == [4, 8, 12, 16, 20]
    first, last = rows[0], rows[-1]
    assert (first["epoch"], first["samples"], first["dropped"]) == (0.4, 64, 0)
    assert first["lr"] == pytest.approx(4e-4)
    assert first["loss"] == pytest.approx(
        (first["loss/image-zh"] + first["loss/image-en"]) / 2, rel=1e-6
    )
    assert 0 <= first["accuracy/image-zh"] <= 1
    assert min(first["grad_norm"], first["samples_per_s"], first["seconds"]) > 0
    assert (last["epoch"], last["samples"]) == (2.0, 320)


def test_checkpoints_are_written_on_time_and_the_newest_stay(configure):
    cfg = configure(save=Save(every_steps=4, keep_last=2))
    start(cfg)
    names = sorted(path.name for path in (Path(cfg.out) / "checkpoints").iterdir())
    assert names == ["step-00000008", "step-00000010"]


@pytest.mark.parametrize(("value", "expected"), [(9.0, MAX_LOG_SCALE), (-5.0, 0.0)])
def test_the_scale_is_held_between_1_and_100(configure, value, expected):
    cfg = configure()
    with pytest.raises(KeyboardInterrupt):
        start(cfg, stop_at=1, log_scale=value)
    assert rows_of(cfg)[0]["logit_scale"] == pytest.approx(math.exp(expected), rel=1e-5)


def test_evaluators_run_at_each_interval_and_at_the_end(configure):
    cfg = configure(epochs=5, log=Log(every_steps=50, writers=()))
    modes = []

    def measure(encoder):
        modes.append(encoder.model.training)
        return {"zh/r1": len(modes) / 10}

    _, results = start(cfg, evaluators={"val": Evaluator(measure, every_epochs=2)})
    evaluated = {row["step"]: row["eval/val/zh/r1"] for row in rows_of(cfg) if "loss" not in row}
    assert evaluated == {20: 0.1, 40: 0.2, 50: 0.3}
    assert results == {"eval/val/zh/r1": 0.3}
    assert modes == [False] * 3


def test_an_evaluator_sees_the_weights_of_the_moment(configure):
    prints = []
    seen = Evaluator(lambda encoder: prints.append(encoder.fingerprint) or {})
    evaluators = {"val": seen}
    start(configure(epochs=2), evaluators=evaluators)
    assert len(set(prints)) == 2


def test_one_bar_shows_loss_and_speed(configure, capsys):
    start(configure(), show_progress=True)
    shown = capsys.readouterr().err
    assert "training: 100%" in shown
    assert "samples/s" in shown
    assert "loss " in shown


def test_resume_never_refuses_a_folder_that_is_in_use(configure):
    start(configure(save=Save(every_steps=5)))
    with pytest.raises(CheckpointError, match="already holds step-00000010; choose another --out"):
        start(configure(resume="never"))


def test_resume_never_starts_in_a_new_folder(configure):
    cfg = configure(resume="never")
    start(cfg)
    assert newest(cfg).name == "step-00000010"


def test_a_half_written_checkpoint_is_ignored(configure):
    whole, stopped = (configure(name, save=Save(every_steps=5)) for name in ("whole", "stopped"))
    start(whole)
    with pytest.raises(KeyboardInterrupt):
        start(stopped, stop_at=8)
    half = Path(stopped.out) / "checkpoints" / ".step-00000010.tmp"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    start(stopped)
    assert_same_run(stopped, whole)


def test_a_damaged_newest_checkpoint_can_be_deleted_to_go_on_from_an_earlier_one(configure):
    whole, damaged = (configure(name, save=Save(every_steps=4)) for name in ("whole", "damaged"))
    start(whole)
    with pytest.raises(KeyboardInterrupt):
        start(damaged, stop_at=9)
    (file,) = newest(damaged).glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"step-00000008: damaged .* delete it to go on from"):
        start(damaged)
    shutil.rmtree(newest(damaged))
    start(damaged)
    assert_same_run(damaged, whole)


def test_a_checkpoint_of_another_model_is_refused(configure, tiny_config):
    start(configure())
    wider = replace(tiny_config.model, width=64)
    with pytest.raises(CheckpointError, match=r"the model expects .* another configuration"):
        start(configure(model=wider))


@pytest.mark.parametrize("other", ["batch size", "data"])
def test_a_checkpoint_of_another_batch_size_or_other_data_is_refused(
    configure, tiny_config, tiny_shards, other
):
    start(configure())
    train = tiny_config.data.train if other == "batch size" else str(tiny_shards / "val")
    data = replace(tiny_config.data, train=train, batch_size=20 if other == "batch size" else 16)
    with pytest.raises(CheckpointError, match="made with 10 steps per epoch and 160 samples"):
        start(configure(data=data))


def test_a_loss_that_is_not_finite_stops_at_its_step_and_saves_nothing(configure):
    cfg = configure(optim=Optim(lr=1e30, warmup_steps=0), save=Save(every_steps=1))
    with pytest.raises(M2EncoderError, match=r"step \d+: .* lower .* pair 'train-"):
        start(cfg)
    for path in (Path(cfg.out) / "checkpoints").iterdir():
        assert all(torch.isfinite(tensor).all() for tensor in tensors_of(path).values())


def with_bad_pairs(folder, *, good, bad):
    """Shards of small pictures, `bad` of them unreadable; returns the data settings."""
    encoded = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 10, 10)).save(encoded, "PNG")
    captions = {"zh": ["一只猫"], "en": ["a cat"]}
    pairs = [Pair(f"g{i}", encoded.getvalue(), captions) for i in range(good)]
    pairs += [Pair(f"b{i}", b"not a picture", captions) for i in range(bad)]
    write_shards(pairs, folder)
    return Data(train=str(folder), batch_size=16)


def test_bad_pairs_are_counted_named_and_left_out(configure, tmp_path, caplog):
    data = replace(with_bad_pairs(tmp_path / "d", good=156, bad=4), max_bad_fraction=0.5)
    cfg = configure(data=data, epochs=2)
    start(cfg)
    assert rows_of(cfg)[9]["dropped"] == 4
    assert rows_of(cfg)[-1]["dropped"] == 8
    told = [record.getMessage() for record in caplog.records if "dropped" in record.getMessage()]
    assert len(told) == 8
    assert {message.split("'")[1] for message in told} == {"b0", "b1", "b2", "b3"}


def test_the_count_of_bad_pairs_survives_a_stop(configure, tmp_path):
    data = replace(with_bad_pairs(tmp_path / "d", good=150, bad=10), max_bad_fraction=0.9)
    whole, stopped = (
        configure(n, data=data, save=Save(every_steps=4)) for n in ("whole", "stopped")
    )
    start(whole)
    with pytest.raises(KeyboardInterrupt):
        start(stopped, stop_at=6)
    start(stopped)
    assert rows_of(stopped)[-1]["dropped"] == 10
    assert_same_run(stopped, whole)


def test_too_many_bad_pairs_stop_the_run_in_one_line(configure, tmp_path):
    data = replace(with_bad_pairs(tmp_path / "d", good=120, bad=40), max_bad_fraction=0.05)
    with pytest.raises(DataError) as error:
        start(configure(data=data))
    message = str(error.value)
    assert "pairs could not be used, more than data.max_bad_fraction 0.05 allows" in message
    assert "the last: pair 'b" in message
    assert "\n" not in message


def test_one_bad_pair_is_forgiven_however_early_unless_none_is_allowed(configure, tmp_path):
    data = with_bad_pairs(tmp_path / "d", good=15, bad=1)  # 1 of 16, the default allows 1 %
    start(configure("forgiving", data=data))
    with pytest.raises(DataError, match="1 of the first 16 pairs"):
        start(configure("strict", data=replace(data, max_bad_fraction=0)))


def test_a_batch_of_bad_pairs_alone_changes_nothing_and_is_counted(configure, tmp_path):
    data = replace(with_bad_pairs(tmp_path / "d", good=0, bad=32), max_bad_fraction=1)
    cfg = configure(data=data)
    encoder, _ = start(cfg)
    assert [row["dropped"] for row in rows_of(cfg)] == [16, 32]
    fresh = new_encoder(
        replace(cfg, model=replace(cfg.model, vocab_size=encoder.model.config.vocab_size)),
        prepare_tokenizer(cfg),
    )
    for name, tensor in fresh.model.state_dict().items():
        assert torch.equal(encoder.model.state_dict()[name], tensor), name


def test_a_single_language_can_be_trained(configure):
    cfg = configure(objectives=(Objective("image-zh", weight=1.0),))
    start(cfg)
    row = rows_of(cfg)[-1]
    assert row["loss"] == row["loss/image-zh"]
    assert "loss/image-en" not in row
