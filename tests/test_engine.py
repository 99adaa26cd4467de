"""The engine on real processes: the same run whatever the world, the sharding and the workers.

Not for kills (test_engine_kill.py), nor for each part by itself (test_sharding.py, test_order.py).
"""

import hashlib
import json
import logging
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from time import sleep

import pytest
import torch
from saved_runs import StopsAt, tensors_of

from m2encoder.checkpoint import list_checkpoints
from m2encoder.cli.training import make_stream, new_encoder, prepare_tokenizer
from m2encoder.config import Data, Guard, Log, Save, TokenizerConfig
from m2encoder.distributed import World
from m2encoder.errors import M2EncoderError
from m2encoder.log import read_metrics
from m2encoder.patch_dropout import kept_patches
from m2encoder.shards import Pair, ShardReader, write_shards
from m2encoder.train import pretrain

STEPS = 21


class Watched(StopsAt):
    """Remembers a hash of every row besides."""

    def __init__(self, stream, stop_at):
        super().__init__(stream, stop_at)
        self.rows = {}

    def batches(self, first_step, last_step):
        for step, batch in enumerate(super().batches(first_step, last_step), first_step):
            self.rows[step] = row_hashes(batch)
            yield batch


def row_hashes(batch):
    """Per pair: its place, key, picture, tokens and the patches that it is seen by."""
    kept = kept_patches(batch.positions, num_patches=4, share=0.5, seed=0)
    assert kept is not None
    hashes = []
    for row, key in enumerate(batch.keys):
        digest = hashlib.sha256(batch.pixels[row].numpy().tobytes())
        for language, captions in batch.captions.items():
            for ids, mask, where in zip(*captions[:3], strict=True):
                if int(where) == row:
                    digest.update(repr((language, ids[mask.bool()].tolist())).encode())
        hashes.append((int(batch.positions[row]), key, kept[row].tolist(), digest.hexdigest()))
    return hashes


def train(cfg, rank=0, world_size=1, *, stop_at=10**9, change=None):
    """Train as the command does, but stop on request; returns the hashes of what was seen."""
    world = World(rank, world_size)
    tokenizer = prepare_tokenizer(cfg, world)
    cfg = replace(cfg, model=replace(cfg.model, vocab_size=tokenizer.vocab_size))
    encoder = new_encoder(cfg, tokenizer)
    if change is not None:
        change(encoder, tokenizer)
    stream = Watched(make_stream(cfg, tokenizer, world), stop_at)
    try:
        pretrain(cfg, encoder, stream, {}, world=world, show_progress=False)
    except KeyboardInterrupt:
        world.wait()
    return stream.rows


def train_rank(rank, world_size, cfg, stop_at):
    """The same as one of the processes of a pool."""
    return train(cfg, rank, world_size, stop_at=stop_at)


@pytest.fixture
def configure(tiny_config, tiny_model_folder, tmp_path):
    """A run of STEPS steps with everything on that the ranks share; keyword arguments change it."""

    def change(name, **changes):
        settings = {
            "tokenizer": TokenizerConfig(path=str(tiny_model_folder / "sp.model")),
            "out": str(tmp_path / name),
            "steps": STEPS,
            "save": Save(every_steps=1),
            "ema_decay": 0.9,
            "patch_dropout": 0.5,
            "accumulate": 2,
        }
        return replace(tiny_config, **settings | changes)

    return change


def merged(parts):
    """The global batches from what each rank saw."""
    return {step: [row for rows in parts for row in rows[step]] for step in parts[0]}


def assert_same_run(out, whole, *, steps=STEPS):
    """Losses and, at the end, weights, optimizer and average within 1e-5 of one process's."""
    ours, theirs = (read_metrics(Path(folder) / "metrics.jsonl") for folder in (out, whole))
    assert [row["step"] for row in ours] == list(range(1, steps + 1))
    for row, other in zip(ours, theirs, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert row["samples"] == other["samples"]
    found, expected = (
        tensors_of(list_checkpoints(Path(folder) / "checkpoints")[-1]) for folder in (out, whole)
    )
    assert found.keys() == expected.keys()
    assert any(name.startswith("ema/") for name in found)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5, msg=name)


def test_another_world_and_other_workers_see_the_same_global_batches(configure, gloo):
    """World 4, 2, 1, 1, 4 and workers 0, 0, 2, 1, 0: five starts of one run."""
    whole = configure("whole")
    expected = train(whole)
    cfg = configure("moved")
    seen = {}
    for ranks, workers, stop_at in ((4, 0, 4), (2, 0, 9), (1, 2, 13), (1, 1, 16), (4, 0, 10**9)):
        now = replace(cfg, data=replace(cfg.data, workers=workers))
        if ranks == 1:
            seen |= train(now, stop_at=stop_at)
        else:
            seen |= merged(gloo(ranks).run(train_rank, now, stop_at))
    assert seen == expected
    assert list(seen) == list(range(STEPS))
    assert_same_run(cfg.out, whole.out)


@pytest.mark.parametrize("sharding", ["nnn", "ggg", "iii"])
def test_every_sharding_trains_as_one_process(configure, gloo, sharding):
    whole, cfg = configure("whole"), configure("sharded", sharding=sharding)
    if sharding == "iii":
        cfg = replace(cfg, shard_ranks=2)
    train(whole)
    gloo(4).run(train_rank, cfg, 10**9)
    assert_same_run(cfg.out, whole.out)


def test_a_checkpoint_of_each_sharding_resumes_under_each_other(configure, gloo):
    """Seven starts of one run: every change from one to another happens once."""
    whole, cfg = configure("whole"), configure("changed")
    train(whole)
    for i, sharding in enumerate(("nnn", "ggg", "iii", "nnn", "iii", "ggg", "nnn"), 1):
        ranks = 2 if sharding == "iii" else None
        now = replace(cfg, sharding=sharding, shard_ranks=ranks)
        gloo(4).run(train_rank, now, 3 * i)
    assert_same_run(cfg.out, whole.out)


# --- what goes wrong is named --------------------------------------------------------------------


def poison(encoder, tokenizer):
    """Let the one caption with 鼋 have no finite feature."""
    *_, last, _ = tokenizer.encode("鼋")
    with torch.no_grad():
        encoder.model.text.token_embed.weight[last] = float("nan")


@pytest.fixture
def with_one_strange_pair(tiny_shards, tmp_path):
    """The training pairs, one of which has a caption with a character that no other has."""
    pairs = list(ShardReader(tiny_shards / "train"))
    strange = pairs[70]
    pairs[70] = Pair(strange.key, strange.image, {"zh": ["鼋"], "en": ["a turtle 🐢"]})
    write_shards(pairs, tmp_path / "strange")
    return Data(train=str(tmp_path / "strange"), batch_size=16), strange.key


def poisoned_rank(rank, world_size, cfg):
    return train(cfg, rank, world_size, change=poison)


@pytest.mark.parametrize("sharding", ["nnn", "ggg"])
def test_a_sample_without_a_finite_feature_is_named_and_skipped(
    configure, with_one_strange_pair, gloo, sharding
):
    data, key = with_one_strange_pair
    changes = {"ema_decay": None, "sharding": sharding}
    cfg = configure("run", data=data, tokenizer=TokenizerConfig(), **changes)
    parts = gloo(2).run(poisoned_rank, cfg)
    places = sorted(
        (step, rank, row)
        for rank, rows in enumerate(parts)
        for step, batch in rows.items()
        for row, seen in enumerate(batch)
        if seen[1] == key
    )
    assert places
    out = Path(cfg.out)
    events = [json.loads(line) for line in (out / "events.jsonl").read_text("utf-8").splitlines()]
    bad = [event for event in events if event["event"] == "bad step"]
    assert [(event["step"], event["rank"]) for event in bad] == [place[:2] for place in places]
    for event, (step, rank, row) in zip(bad, places, strict=True):
        assert f"pair '{key}'" in event["reason"]
        folder = out / f"bad-steps/step-{step:08d}"
        record = json.loads((folder / f"rank-{rank:05d}.json").read_text("utf-8"))
        (sample,) = record["samples"]
        assert (sample["key"], sample["row"], sample["texts"]["zh"]) == (key, row, "鼋")
        assert (folder / sample["picture"]).is_file()
    rows = read_metrics(out / "metrics.jsonl")
    skipped = {step + 1 for step, _, _ in places}
    assert {row["step"] for row in rows if "loss" not in row} == skipped
    assert rows[-1]["step"] == STEPS


def test_after_too_many_bad_steps_the_last_good_weights_go_on(
    configure, with_one_strange_pair, caplog
):
    data, key = with_one_strange_pair
    cfg = configure("run", data=data, tokenizer=TokenizerConfig(), guard=Guard(max_bad_steps=1))
    with caplog.at_level(logging.WARNING):
        rows = train(cfg, change=poison)
    step = next(step for step, batch in rows.items() if key in [row[1] for row in batch])
    assert f"step {step}: " in caplog.text
    assert f"steps in a row were not finite; weights of step {step} again" in caplog.text
    assert read_metrics(Path(cfg.out) / "metrics.jsonl")[-1]["step"] == STEPS


def test_numbers_that_stay_bad_end_the_run(configure, with_one_strange_pair):
    data, _ = with_one_strange_pair

    def all_bad(encoder, _):
        with torch.no_grad():
            encoder.model.image_projection.weight.fill_(float("nan"))

    cfg = configure("run", data=data, guard=Guard(max_bad_steps=2))
    with pytest.raises(M2EncoderError, match=r"2 steps in a row .* no checkpoint to go back to"):
        train(cfg, change=all_bad)


class Slow(SimpleHTTPRequestHandler):
    """A file server whose second shard takes 5 seconds to begin."""

    def do_GET(self):
        if self.path.endswith("000001.tar"):
            sleep(5)
        super().do_GET()

    def log_message(self, *_):
        pass


def test_a_storage_that_stalls_is_named(configure, tiny_shards, tmp_path, caplog):
    write_shards(ShardReader(tiny_shards / "train"), tmp_path / "far", pairs_per_shard=80)
    serve = type("Here", (Slow,), {"directory": None})
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *a: serve(*a, directory=str(tmp_path / "far"))
    )
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        data = Data(train=address, batch_size=16, cache=str(tmp_path / "cache"))
        cfg = configure("run", data=data, steps=10, log=Log(every_steps=5, writers=()))
        with caplog.at_level(logging.INFO):
            train(cfg)
    finally:
        server.shutdown()
        server.server_close()
    stalled = max(read_metrics(Path(cfg.out) / "metrics.jsonl"), key=lambda row: row["waiting"])
    assert stalled["waiting/read"] > 0.5
    assert stalled["waiting/read"] > 0.9 * stalled["waiting"]
    assert "% of the time, for read" in caplog.text
