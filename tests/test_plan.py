"""The plan of a run: parameters, memory, bytes and steps against counting and measuring.

Not the command around it (test_pretrain.py) nor the shard plan (test_stream.py).
"""

import time
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny_batches import BILINGUAL, bilingual_texts, make_batch, make_model, shares_of

from m2encoder.blocks import prepare_blocks
from m2encoder.config import Locked, Loss, Optim, PretrainConfig, TokenizerConfig, TowersFrom
from m2encoder.distributed import World
from m2encoder.errors import ConfigError, PlacementError
from m2encoder.grid import place
from m2encoder.loss import make_loss
from m2encoder.measure import SentBytes, peak_allocated_bytes
from m2encoder.optim import make_optimizer
from m2encoder.plan import plan
from m2encoder.presets import preset
from m2encoder.sharding import shard
from m2encoder.step_costs import Sizes, Work, activation_bytes, memory, sent_bytes
from m2encoder.training_step import StepSettings, Towers, backward_step

WORK = Work(
    sharding="nnn", world_size=1, group_ranks=1, bfloat16=False, checkpoint_activations="none",
    pairs=32, accumulate=1, languages=2, image_tokens=17, text_tokens=30, ema=False,
)  # fmt: skip
LARGE = PretrainConfig(
    model=preset("m2-encoder-10b"), tokenizer=TokenizerConfig(path="sp.model"),
    precision="bfloat16",
)  # fmt: skip


def lines_of(cfg, **options):
    options = {"config_text": "seed: 0\n", "pairs": 1000, **options}
    return plan(cfg, **options).splitlines()


def line_of(start, lines):
    (found,) = [line for line in lines if line.startswith(start)]
    return found


# ── the text ────────────────────────────────────────────────────────────────────────────────────


def test_the_plan_begins_with_the_configuration_and_ends_with_the_data():
    lines = lines_of(PretrainConfig(), data_lines=["红.tar: 3 pairs", "3 pairs"])
    assert lines[:2] == ["seed: 0", "---"]
    assert lines[-2:] == ["data: 红.tar: 3 pairs", "data: 3 pairs"]


def test_parameters_are_counted_by_part():
    line = line_of("parameters", lines_of(LARGE))
    assert line.startswith("parameters: 9,552,535,553 (image tower 4,2")
    assert "shared layers 604,270,592, projections and scale 8,388,609)" in line


def test_the_largest_model_is_planned_in_seconds():
    started = time.perf_counter()
    lines_of(LARGE, world_size=1, pairs=None)
    assert time.perf_counter() - started < 10


def test_a_tokenizer_that_is_still_to_be_trained_counts_at_its_most():
    cfg = PretrainConfig(tokenizer=TokenizerConfig(vocab_size=1000))
    small, large = (
        int(line_of("parameters", lines_of(c)).split()[1].replace(",", ""))
        for c in (cfg, replace(cfg, tokenizer=TokenizerConfig(vocab_size=1001)))
    )
    assert large - small == cfg.model.width


@pytest.mark.parametrize(
    ("changes", "pairs", "expected"),
    [
        ({"epochs": 2.5}, 1000, "steps: 19 of 128 pairs, 2,432 samples, 2.43 epochs of 1,000"),
        ({"steps": 7}, 1000, "steps: 7 of 128 pairs, 896 samples, 0.90 epochs of 1,000 pairs"),
        ({"steps": 7}, None, "steps: 7 of 128 pairs, 896 samples"),
        ({"epochs": 0.5}, None, "steps: known once the data is there; 0.5 epochs of its pairs"),
        ({"epochs": 1.0}, 5, "steps: 1 of 128 pairs, 128 samples, 25.60 epochs of 5 pairs"),
    ],
)
def test_steps_and_samples(changes, pairs, expected):
    line = line_of("steps", lines_of(PretrainConfig(**changes), pairs=pairs))
    assert line.startswith(expected)


def test_towers_of_other_libraries_are_planned_as_far_as_they_are_known():
    towers = TowersFrom(image="timm:vit_base_patch16_224", text="hf:org/bert")
    lines = lines_of(PretrainConfig(towers=towers, locked=(Locked("image.*"),)))
    known = "known once timm:vit_base_patch16_224 and hf:org/bert are read, when the run starts"
    assert line_of("parameters, memory", lines).endswith(known)
    assert line_of("steps", lines)


def test_locked_parameters_are_named_and_need_no_gradient():
    whole = PretrainConfig()
    locked = replace(whole, locked=(Locked("image.*"), Locked("text.*", until=0.25)))
    line = line_of("locked", lines_of(locked))
    assert "image.* for 100% of the steps, text.* for 25% of the steps" in line
    weights = [line_of("memory", lines_of(c)).partition("AdamW ")[2] for c in (whole, locked)]
    assert float(weights[1].partition(",")[0]) < float(weights[0].partition(",")[0])


@pytest.mark.parametrize(
    ("changes", "world_size", "error", "said"),
    [
        ({}, 3, ConfigError, "no multiple of the 3 processes"),
        ({"loss": Loss(grid="3x3")}, 8, PlacementError, "3x3"),
        ({"sharding": "iii", "shard_ranks": 3}, 8, PlacementError, "shard_ranks"),
        ({"locked": (Locked("imgae.*"),)}, 1, ConfigError, "matches no parameter"),
    ],
)
def test_what_cannot_run_is_one_line(changes, world_size, error, said):
    with pytest.raises(error) as caught:
        plan(PretrainConfig(**changes), config_text="", pairs=None, world_size=world_size)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sharding_and_recomputing_need_less_memory():
    found = []
    for changes in (
        {},
        {"sharding": "iii"},
        {"sharding": "ggg"},
        {"sharding": "ggg", "checkpoint_activations": "selective"},
        {"sharding": "ggg", "checkpoint_activations": "full"},
    ):
        cfg = replace(LARGE, data=replace(LARGE.data, batch_size=4096), **changes)
        line = line_of("memory", lines_of(cfg, world_size=64, local_world_size=8))
        found.append(float(line.partition(": ")[2].partition(" GiB")[0]))
    assert all(more > less for more, less in pairwise(found))


# ── against measuring ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["none", "selective", "full"])
def test_activations_are_estimated_to_a_quarter(kind):
    model = make_model(
        width=96, image_layers=4, text_layers=4, shared_layers=1, image_size=64, patch_size=16
    )
    prepare_blocks(model, compile=False, checkpoint_activations=kind)
    pixels, ids = torch.rand(32, 3, 64, 64), torch.randint(4, 300, (64, 30))

    def work():
        images = model.encode_image(pixels.clone())
        (images.sum() + model.encode_text(ids, torch.ones_like(ids)).sum()).backward()

    work()  # gradients are there
    found = peak_allocated_bytes(work)
    expected = activation_bytes(
        model.config.architecture, replace(WORK, checkpoint_activations=kind)
    )
    assert found == pytest.approx(expected, rel=0.25)


def test_weights_gradients_and_optimizer_are_what_they_take():
    model = make_model(has_logit_bias=True)
    shape, sizes = model.config.architecture, Sizes.of(model)
    found = memory(shape, sizes, replace(WORK, ema=True), place(0, 1))
    optimizer = make_optimizer(model, Optim())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = [t for values in optimizer.state.values() for k, t in values.items() if k != "step"]
    expected: dict[str, Any] = {
        "weights": model.parameters(), "gradients": [p.grad for p in model.parameters()],
        "AdamW": state, "running mean": model.parameters(),
    }  # fmt: skip
    for name, tensors in expected.items():
        assert found[name] == sum(t.numel() * t.element_size() for t in tensors), name


def sent_in_a_step(rank, world_size, sharding, shard_ranks, accumulate):
    model = make_model(image_layers=2, text_layers=2, vocab_size=400)
    world = World(rank, world_size, torch.device("cpu"))
    towers = shard(Towers(model), world, sharding=sharding, shard_ranks=shard_ranks)
    loss = make_loss(rank=rank, world_size=world_size, grid="2x2")
    settings = StepSettings(BILINGUAL, loss, accumulate=accumulate)
    batch = shares_of(make_batch(bilingual_texts(256)), [64] * 4)[rank]
    backward_step(towers, batch, settings)  # the first step also sets up
    with SentBytes() as sent:
        backward_step(towers, batch, settings)
    return sent.total


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("sharding", "shard_ranks"), [("ggg", None), ("iii", 2)])
def test_bytes_sent_by_shards_are_those_planned(gloo, sharding, shard_ranks, accumulate):
    model = make_model(image_layers=2, text_layers=2, vocab_size=400)
    work = replace(
        WORK, sharding=sharding, world_size=4, group_ranks=shard_ranks or 4, pairs=64,
        accumulate=accumulate,
    )  # fmt: skip
    placement = place(0, 4, grid="2x2")
    planned = sent_bytes(Sizes.of(model), work, placement, dim=12, wire_bytes=4)
    for found in gloo(4).run(sent_in_a_step, sharding, shard_ranks, accumulate):
        # shards are padded to the same length, and tags and sums of the loss travel too
        assert found == pytest.approx(sum(planned.values()), rel=0.05), planned


def test_bytes_of_plain_data_parallelism_by_hand():
    sizes = Sizes.of(make_model())
    work = replace(WORK, world_size=4)
    found = sent_bytes(sizes, work, place(0, 4, grid="2x2"), dim=10, wire_bytes=2)
    assert found["gradients"] == 2 * 3 / 4 * 4 * sizes.total
    assert found["loss"] == (1 + 2) * 32 * 10 * (2 + 4)
