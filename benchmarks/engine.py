"""What the training engine costs beside the towers' own work; tables in Markdown.

    python benchmarks/engine.py                the loop above forward and backward; saving
    python benchmarks/engine.py --mfu          speed of ViT-B/16 and ViT-L/16 sized models, compiled
                                               or not, beside open_clip's model of the same size in
                                               the same loop; on a GPU their share of its best (MFU)

One process. The loop's batches lie in memory, so no time goes by reading (engine_stream.py measures
that). Medians and ranges of turns that go round all ways.
"""

import argparse
import itertools
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from m2encoder.compat import mend_torchvision

mend_torchvision()  # before transformers looks at it

# ruff: noqa: E402
from m2encoder.batch import Batch, Captions
from m2encoder.blocks import prepare_blocks
from m2encoder.checkpoint import Checkpoints, Progress, TrainState
from m2encoder.config import Data, Log, Objective, Optim, PretrainConfig, Save
from m2encoder.encoder import Encoder
from m2encoder.errors import MissingExtraError
from m2encoder.flops import peak_flops_per_s
from m2encoder.loss import make_loss
from m2encoder.model.architecture import Architecture
from m2encoder.model.configuration_m2encoder import M2EncoderConfig
from m2encoder.model.image_processing_m2encoder import M2EncoderImageProcessor
from m2encoder.model.modeling_m2encoder import M2Encoder
from m2encoder.optim import make_optimizer
from m2encoder.presets import preset
from m2encoder.sharding import clip_grad_norm
from m2encoder.train import pretrain
from m2encoder.training_step import StepSettings, Towers, backward_step

OBJECTIVES = (Objective("image-zh"), Objective("image-en"))
SIZES = {
    "ViT-B/16": Architecture(
        width=768, num_heads=12, image_layers=12, text_layers=12, shared_layers=0,
        projection_dim=512, image_size=224, vocab_size=32_000,
    ),
    "ViT-L/16": Architecture(
        width=1024, num_heads=16, image_layers=24, text_layers=12, shared_layers=0,
        projection_dim=768, image_size=224, vocab_size=32_000,
    ),
}  # fmt: skip


class InMemory:
    """A stream that gives the same batch again and again."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.pairs = self.steps_per_epoch = 10**6

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """Yield it."""
        return itertools.repeat(self.batch, last_step - first_step)


def random_batch(shape: Architecture, count: int, languages: tuple[str, ...]) -> Batch:
    """Return pictures of noise with random captions of 8 to 24 tokens."""
    generator = torch.Generator().manual_seed(0)
    size = shape.image_size
    pixels = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    captions = {}
    for language in languages:
        lengths = torch.randint(8, 25, (count, 1), generator=generator)
        mask = (torch.arange(24) < lengths).long()
        ids = torch.randint(5, shape.vocab_size, (count, 24), generator=generator) * mask
        captions[language] = Captions(ids, mask, torch.arange(count), torch.arange(count))
    return Batch(pixels, captions, [str(i) for i in range(count)], torch.arange(count))


def rounds(ways: dict[str, Callable[[], float]], turns: int) -> dict[str, list[float]]:
    """Run all ways in turn; returns the seconds of each turn after a first one to warm up."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        for name, way in ways.items():
            seconds = way()
            if turn:
                found[name].append(seconds)
    return found


def median_and_range(values: list[float], digits: int = 1) -> str:
    """Return `12.3 (11.9-13.0)`."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


# --- the loop ------------------------------------------------------------------------------------


def bare_loop_ms(shape: Architecture, batch: Batch, steps: int, *, with_optimizer: bool) -> float:
    """Return the milliseconds per step of forward and backward, with clipping and AdamW or not."""
    settings = StepSettings(OBJECTIVES, make_loss(rank=0, world_size=1))
    model = M2Encoder(M2EncoderConfig(**vars(shape))).train()
    towers, optimizer = Towers(model), make_optimizer(model, Optim())
    backward_step(towers, batch, settings)
    optimizer.step()
    started = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        backward_step(towers, batch, settings)
        if with_optimizer:
            clip_grad_norm(model.parameters(), 1.0)
            optimizer.step()
    return (time.perf_counter() - started) / steps * 1000


def whole_loop_ms(shape: Architecture, batch: Batch, steps: int) -> float:
    """Return the milliseconds per step of pretrain(), logs and all."""
    encoder = Encoder(
        M2Encoder(M2EncoderConfig(**vars(shape))), M2EncoderImageProcessor(shape.image_size), None
    )
    times: list[float] = []

    class Timed(InMemory):
        def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
            for batch in super().batches(first_step, last_step):
                times.append(time.perf_counter())
                yield batch

    with tempfile.TemporaryDirectory() as folder:
        cfg = PretrainConfig(
            model=shape,
            data=Data(batch_size=len(batch.keys)),
            objectives=OBJECTIVES,
            out=folder,
            steps=steps + 1,
            log=Log(every_steps=10),
            save=Save(every_steps=10**9),
        )
        pretrain(cfg, encoder, Timed(batch), {}, show_progress=False)
    return (times[-1] - times[1]) / (len(times) - 2) * 1000


def loop_overhead(model_name: str, batch_size: int, steps: int, turns: int) -> str:
    """Return the table of what pretrain() takes above a bare loop of forward and backward."""
    shape = preset(model_name)
    batch = random_batch(shape, batch_size, ("zh", "en"))
    ways = {
        "forward and backward": partial(bare_loop_ms, shape, batch, steps, with_optimizer=False),
        "the same, clipping, AdamW": partial(
            bare_loop_ms, shape, batch, steps, with_optimizer=True
        ),
        "pretrain()": partial(whole_loop_ms, shape, batch, steps),
    }
    found = rounds(ways, turns)
    base = statistics.median(found["the same, clipping, AdamW"])
    lines = [
        f"{model_name}, batches of {batch_size}, {steps} steps a turn",
        "",
        "| way | ms per step | of the bare loop |",
        "|---|--:|--:|",
    ]
    for name, values in found.items():
        ratio = statistics.median(values) / base
        lines.append(f"| {name} | {median_and_range(values)} | {ratio:.3f} |")
    return "\n".join(lines)


# --- saving --------------------------------------------------------------------------------------


def saving(shape: Architecture, turns: int) -> str:
    """Return the table of how long a save keeps the training, beside it or before it goes on."""
    model = M2Encoder(M2EncoderConfig(**vars(shape)))
    optimizer = make_optimizer(model, Optim())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = TrainState(model, optimizer)
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.tensors().values())
    steps = itertools.count(1)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), keep_last=1)

        def save(wait: bool) -> float:
            checkpoints.save(state, Progress(next(steps), 0, 0, 0.0, 1), wait=wait)
            stall_s = checkpoints.stall_s
            checkpoints.finish()
            return stall_s

        found = rounds(
            {"in the background": lambda: save(False), "waited for": lambda: save(True)}, turns
        )
    background, waited = (statistics.median(values) for values in found.values())
    count = sum(p.numel() for p in model.parameters())
    lines = [
        f"{count / 1e6:.0f} M parameters, {size / 2**30:.2f} GiB",
        "",
        "| save | s that training stands still |",
        "|---|--:|",
        *(f"| {name} | {median_and_range(values, 2)} |" for name, values in found.items()),
        "",
        f"{waited / background:.1f} times shorter in the background",
    ]
    return "\n".join(lines)


# --- speed of whole steps ------------------------------------------------------------------------


class OpenClipTowers(nn.Module):
    """open_clip's model of a shape, called as our Towers are."""

    def __init__(self, shape: Architecture) -> None:
        super().__init__()
        from m2encoder.compat import import_open_clip

        import_open_clip()
        from open_clip.model import CLIP  # pyright: ignore[reportMissingImports]

        vision = {"image_size": shape.image_size, "layers": shape.image_layers}
        vision |= {"width": shape.width, "patch_size": shape.patch_size}
        vision |= {"head_width": shape.width // shape.num_heads}
        text = {"context_length": 24, "vocab_size": shape.vocab_size, "width": shape.width}
        text |= {"heads": shape.num_heads, "layers": shape.text_layers}
        self.model: Any = CLIP(shape.projection_dim, vision, text)


def open_clip_step(towers: OpenClipTowers, batch: Batch, loss: Any) -> None:
    """Do what backward_step does, with open_clip's own methods."""
    captions = next(iter(batch.captions.values()))
    image = towers.model.encode_image(batch.pixels.float() / 127.5 - 1, normalize=True)
    text = towers.model.encode_text(captions.ids, normalize=True)
    loss(image.float(), text.float(), towers.model.logit_scale.exp()).backward()


def step_speed(
    shape: Architecture, peer: bool, compiled: bool, batch_size: int, steps: int, device: str
) -> tuple[float, float]:
    """Return pairs per second of whole steps, and FLOPs per pair, forward and backward."""
    torch.manual_seed(0)
    on_gpu = device == "cuda"
    batch = random_batch(shape, batch_size, ("en",))
    loss = make_loss(rank=0, world_size=1)
    batch.pixels = batch.pixels.to(device)
    batch.captions = {k: Captions(*(t.to(device) for t in c)) for k, c in batch.captions.items()}
    if peer:
        towers: Any = OpenClipTowers(shape).to(device).train()
        if compiled:
            towers.model.compile()
    else:
        model = M2Encoder(M2EncoderConfig(**vars(shape))).to(device).train()  # pyright: ignore[reportArgumentType]
        prepare_blocks(model, compile=compiled, checkpoint_activations="none")
        towers = Towers(model, bfloat16=on_gpu)
    optimizer = torch.optim.AdamW(towers.parameters(), fused=True)
    settings = StepSettings((Objective("image-en"),), loss)

    def step() -> None:
        optimizer.zero_grad()
        if peer:
            with torch.autocast(device, torch.bfloat16, enabled=on_gpu):
                open_clip_step(towers, batch, loss)
        else:
            backward_step(towers, batch, settings)
        optimizer.step()

    for _ in range(3):
        step()
    with FlopCounterMode(display=False) as counter:
        step() if not compiled else None
    flops = counter.get_total_flops() / batch_size
    if on_gpu:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    if on_gpu:
        torch.cuda.synchronize()
    return steps * batch_size / (time.perf_counter() - started), flops


def speeds(names: list[str], batches: list[int], steps: int, device: str) -> str:
    """Return the table of whole steps, at the fastest of some batch sizes."""
    peak = peak_flops_per_s(torch.cuda.get_device_name()) if device == "cuda" else None
    lines = ["| model | of | compiled | batch | pairs/s | MFU | of open_clip's best |"]
    lines += ["|---|---|---|--:|--:|--:|--:|"]
    for name in names:
        rows: list[tuple[str, bool, int, float]] = []
        flops = 0.0
        for peer, compiled in itertools.product((True, False), (False, True)):
            best: tuple[int, float] = (0, 0.0)
            for batch_size in batches:
                try:
                    found, counted = step_speed(
                        SIZES[name], peer, compiled, batch_size, steps, device
                    )
                except torch.OutOfMemoryError:
                    break
                flops = counted if counted and not peer else flops
                best = max(best, (batch_size, found), key=lambda each: each[1])
            rows.append(("open_clip" if peer else "m2encoder", compiled, best[0], best[1]))
        theirs = max(speed for who, *_, speed in rows if who == "open_clip")
        for who, compiled, batch_size, speed in rows:
            share = f"{speed * flops / peak:.1%}" if peak else "-"
            lines.append(
                f"| {name} | {who} | {'yes' if compiled else 'no'} | {batch_size} | {speed:.1f} "
                f"| {share} | {speed / theirs:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Print the tables that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mfu", action="store_true")
    parser.add_argument("--models", nargs="+", default=list(SIZES))
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--turns", type=int, default=5)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} cores"
    print(f"{where}, torch {torch.__version__}, Python {platform.python_version()}\n")
    if given.mfu:
        batches = given.batches or ([128, 256, 512, 1024] if device == "cuda" else [8])
        try:
            print(speeds(given.models, batches, given.steps, device))
        except MissingExtraError as error:
            print(error)
        return
    print(loop_overhead("m2-encoder-tiny", 128, given.steps, given.turns), end="\n\n")
    print(saving(SIZES["ViT-B/16"], given.turns))


if __name__ == "__main__":
    main()
