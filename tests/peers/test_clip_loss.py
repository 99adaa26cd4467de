"""Our training loop against a plain loop around open_clip's ClipLoss, and our loss against it.

The plain loop shares only the model, its initial weights and the batches; optimizer, schedule,
clipping and text encoding are written here once more. Runs in the environment that holds the peers.
"""

import math
from copy import deepcopy
from dataclasses import dataclass, replace

import pytest
import torch
from dense_loss import info_nce_by_leads, unit_rows
from torch import nn

from m2encoder.batch import Batch
from m2encoder.cli.training import make_stream, new_encoder, prepare_tokenizer
from m2encoder.compat import import_open_clip
from m2encoder.config import Loss, Objective, Optim, TokenizerConfig
from m2encoder.log import read_metrics
from m2encoder.loss import make_loss
from m2encoder.train import pretrain

STEPS, PEAK_LR, WARMUP, DECAY, CLIP = 50, 5e-4, 10, 0.2, 3.0
WEIGHTS = {"zh": 0.7, "en": 0.4}
our_loss = make_loss(rank=0, world_size=1)


@pytest.fixture(scope="module")
def clip_loss():
    return import_open_clip().ClipLoss()


@dataclass
class Fixed:
    """A stream of batches that were read before."""

    given: list[Batch]
    steps_per_epoch: int
    pairs: int

    def batches(self, first_step, last_step):
        yield from self.given[first_step:last_step]


@pytest.fixture(scope="module")
def started(tiny_config, tiny_model_folder, tmp_path_factory):
    """A configuration of 50 steps, a fresh encoder and the batches."""
    cfg = replace(
        tiny_config,
        out=str(tmp_path_factory.mktemp("run")),
        tokenizer=TokenizerConfig(path=str(tiny_model_folder / "sp.model")),
        epochs=5,  # of 10 steps
        objectives=tuple(Objective(f"image-{lang}", weight=w) for lang, w in WEIGHTS.items()),
        loss=Loss(duplicates="keep"),  # ClipLoss knows of none
        optim=Optim(
            lr=PEAK_LR,
            warmup_steps=WARMUP,
            weight_decay=DECAY,
            beta1=0.9,
            beta2=0.95,
            eps=1e-6,
            clip_grad_norm=CLIP,
        ),
    )
    tokenizer = prepare_tokenizer(cfg)
    cfg = replace(cfg, model=replace(cfg.model, vocab_size=tokenizer.vocab_size))
    return cfg, new_encoder(cfg, tokenizer), list(make_stream(cfg, tokenizer).batches(0, STEPS))


def plain_loop(model, batches, clip_loss):
    """Train with ClipLoss; returns per step the losses, and what clipping and clamping did."""
    matrices = [
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding)
    ]
    rest = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-6,
        foreach=False,
        fused=False,
    )
    rows, clipped = [], 0
    for step, batch in enumerate(batches):
        done = (step - WARMUP) / (STEPS - WARMUP)
        cosine = PEAK_LR * 0.5 * (1.0 + math.cos(done * math.pi))
        lr = PEAK_LR * (step + 1) / WARMUP if step < WARMUP else cosine
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = lr

        losses = {}
        for language in WEIGHTS:
            ids, mask, rows_of_captions, _ = batch.captions[language]
            assert rows_of_captions.tolist() == list(range(len(batch.keys)))
            image = model.encode_image(batch.pixels.to(torch.float32) / 255.0)
            text = model.encode_text(ids, mask)
            losses[language] = clip_loss(image, text, torch.exp(model.logit_scale))
        loss = sum(WEIGHTS[language] * value for language, value in losses.items())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = math.sqrt(sum(p.grad.double().pow(2).sum().item() for p in model.parameters()))
        if norm > CLIP:
            clipped += 1
            for parameter in model.parameters():
                parameter.grad.mul_(CLIP / (norm + 1e-6))  # torch's clipping has this constant
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.copy_(model.logit_scale.clamp(0.0, math.log(100.0)))
        rows.append(
            {"loss": loss.item(), "grad_norm": norm, "lr": lr}
            | {f"loss/image-{language}": value.item() for language, value in losses.items()}
            | {"logit_scale": math.exp(model.logit_scale.item())}
        )
    return rows, clipped


def train_both(started, clip_loss, out, log_scale):
    """Our rows and theirs, our final weights and theirs, and how often gradients were clipped."""
    cfg, encoder, batches = started
    cfg, encoder = replace(cfg, out=str(out)), deepcopy(encoder)
    encoder.model.logit_scale.data.fill_(log_scale)
    model = deepcopy(encoder.model).train()
    expected, clipped = plain_loop(model, batches, clip_loss)
    pretrain(
        cfg,
        encoder,
        Fixed(batches, steps_per_epoch=10, pairs=10 * cfg.data.batch_size),
        {},
        show_progress=False,
    )
    found = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    return found, expected, encoder.model.state_dict(), model.state_dict(), clipped


def assert_same_losses(found, expected, *, abs):
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("loss", "loss/image-zh", "loss/image-en"):
            assert ours[name] == pytest.approx(theirs[name], abs=abs), (ours["step"], name)


def test_fifty_steps_equal_a_plain_loop_around_clip_loss(started, clip_loss, tmp_path):
    found, expected, ours, theirs, clipped = train_both(
        started, clip_loss, tmp_path, log_scale=math.log(1 / 0.07)
    )
    assert 0 < clipped < STEPS  # so that both sides of the clipping were seen
    assert expected[-1]["loss"] < expected[0]["loss"] - 1
    # float32. Sums in another order grow to about 1e-6 here; in float64 both loops agree to 1e-12.
    assert_same_losses(found, expected, abs=1e-5)
    for row, other in zip(found, expected, strict=True):
        assert row["lr"] == pytest.approx(other["lr"], rel=1e-12)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert row["logit_scale"] == pytest.approx(other["logit_scale"], rel=1e-5)
    # Adam divides by the size of a gradient, so rounding in the tiniest ones moves a weight by some
    # hundredth of a step, 5e-4.
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=2e-5, rtol=0, msg=name)


def test_a_scale_above_100_is_clamped_as_in_the_plain_loop(started, clip_loss, tmp_path):
    found, expected, *_ = train_both(started, clip_loss, tmp_path, log_scale=math.log(150))
    assert found[0]["logit_scale"] == pytest.approx(100, rel=1e-6)
    # logits reach 100 and losses 30, where float32 resolves 1e-5 and 2e-6
    assert_same_losses(found, expected, abs=5e-5)


# --- the loss by itself -------------------------------------------------------------------------


def with_gradients(loss_of, inputs):
    """The loss, and its gradient for image, text and scale."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    loss = loss_of(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def number(value, dtype=torch.float64):
    return torch.tensor(value, dtype=dtype)


@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_our_loss_and_its_gradients_equal_clip_loss(clip_loss, rows, scale):
    inputs = [unit_rows(rows, 24, seed=1), unit_rows(rows, 24, seed=2), number(scale)]
    results = [with_gradients(loss_of, inputs) for loss_of in (our_loss, clip_loss)]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


ROWS, HOT = 24, 100.0
HARD = ("random", "cosine 1", "nearly 1", "cosine -1", "all wrong", "duplicated", "collapsed")
# Of loss, gradients of images and texts, and gradient of the scale: less than this is rounding.
# A gradient is scale times a sum of probabilities, each right to some 2^-24 of its size.
FLOORS = [1e-7, HOT * 2**-23, HOT * 2**-23, 2**-22]


def hard_batch(name, dtype):
    """Pairs where exponentials overflow or cancel unless care is taken, and the scale."""
    image, other = unit_rows(ROWS, 16, seed=1), unit_rows(ROWS, 16, seed=2)
    some = {"duplicated": torch.arange(ROWS) // 3, "collapsed": torch.zeros(ROWS).long()}
    image = image[some.get(name, torch.arange(ROWS))]
    text = {
        "random": other,
        "nearly 1": nn.functional.normalize(image + 0.05 * other, dim=1),
        "cosine -1": -image,
        "all wrong": image.roll(1, dims=0),
    }.get(name, image)
    return [image.to(dtype), text.to(dtype), number(HOT, torch.float32)]


def errors(found, exact):
    return [(x.double() - y).norm().item() for x, y in zip(found, exact, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", HARD)
def test_hard_batches_stay_finite_and_as_right_as_clip_loss(clip_loss, name, dtype):
    inputs = hard_batch(name, dtype)
    exact = with_gradients(info_nce_by_leads, [x.double() for x in inputs])
    found = with_gradients(our_loss, inputs)
    assert all(x.isfinite().all() for x in found)
    ours, theirs = errors(found, exact), errors(with_gradients(clip_loss, inputs), exact)
    for our_error, their_error, floor in zip(ours, theirs, FLOORS, strict=True):
        assert our_error <= max(their_error, floor)


def test_losses_that_vanish_keep_the_digits_that_clip_loss_drops(clip_loss):
    inputs = hard_batch("cosine 1", torch.float32)
    exact = with_gradients(info_nce_by_leads, [x.double() for x in inputs])
    assert 0 < exact[0] < 1e-12
    for ours, size in zip(errors(with_gradients(our_loss, inputs), exact), exact, strict=True):
        assert ours < 1e-4 * size.norm()  # logits near 100, to 2^-17, and their exponentials
    assert clip_loss(*inputs) == 0


UNIT_ROUNDOFF = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.mark.parametrize("dtype", UNIT_ROUNDOFF)
@pytest.mark.parametrize("name", [name for name in HARD if name not in ("cosine 1", "nearly 1")])
def test_gradients_equal_clip_loss_where_there_is_something_to_learn(clip_loss, name, dtype):
    """ClipLoss in float64, on the rounded vectors; our gradients have the vectors' own dtype."""
    inputs = hard_batch(name, dtype)
    theirs = with_gradients(clip_loss, [x.double() for x in inputs])
    assert theirs[0] > 0.1
    ours = with_gradients(our_loss, inputs)
    assert [x.dtype for x in ours] == [torch.float32, dtype, dtype, torch.float32]
    for error, size, floor in zip(errors(ours, theirs), theirs, FLOORS, strict=True):
        assert error <= UNIT_ROUNDOFF[dtype] * size.norm() + floor
