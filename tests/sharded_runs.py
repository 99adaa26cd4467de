"""A small training run under any sharding, and the same by hand in one process.

For test_sharding.py and test_checkpoint_resharding.py; not for the loop itself (test_train.py).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_batches import BILINGUAL, bilingual_texts, dense_total, make_batch, make_model, shares_of
from torch import Tensor, nn

from m2encoder.batch import Batch
from m2encoder.checkpoint import Checkpoints, Progress, TrainState
from m2encoder.distributed import World
from m2encoder.ema import Ema
from m2encoder.loss import make_loss
from m2encoder.sharding import clip_grad_norm, full_state, shard, sync_plain_gradients
from m2encoder.training_step import StepSettings, Towers, backward_step

BATCH_SIZE, LR, DECAY = 8, 1e-3, 0.9
MAX_NORM = 0.5  # below what these batches give, so that every step is clipped
# Where a gradient is zero but for rounding (a key's bias), AdamW would move at full rate in a
# direction that rounding decides; a larger epsilon than usual lets such parameters stand still.
EPS = 1e-5


def global_batch(step: int) -> Batch:
    """The batch of optimizer step `step`: captions missing and repeated, Chinese and English."""
    first = step * BATCH_SIZE
    return make_batch(bilingual_texts(BATCH_SIZE, seed=step), first=first, seed=step)


class Run:
    """One rank of a run, from the start or from a checkpoint."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        sharding: Any,
        *,
        accumulate: int = 1,
        bfloat16: bool = False,
        **changes: Any,
    ) -> None:
        self.world = World(rank, world_size)
        self.model = make_model(**changes)
        towers = Towers(self.model)
        ranks = world_size // 2 if sharding == "iii" else None
        self.towers = shard(
            towers, self.world, sharding=sharding, shard_ranks=ranks, bfloat16=bfloat16
        )
        self.optimizer = adamw(self.model)
        self.ema = Ema(self.model, DECAY)
        self.state = TrainState(self.model, self.optimizer, self.ema)
        kind: Any = "sigmoid" if changes.get("has_logit_bias") else "infonce"
        loss = make_loss(rank=rank, world_size=world_size, kind=kind)
        self.settings = StepSettings(BILINGUAL, loss, accumulate=accumulate)

    def train(self, first_step: int, last_step: int) -> list[tuple[float, float]]:
        """Loss and gradient norm of each step."""
        found = []
        for step in range(first_step, last_step):
            sizes = [BATCH_SIZE // self.world.size] * self.world.size
            batch = shares_of(global_batch(step), sizes)[self.world.rank]
            self.optimizer.zero_grad()
            losses = backward_step(self.towers, batch, self.settings)
            sync_plain_gradients(self.towers, self.world)
            norm = clip_grad_norm(self.model.parameters(), MAX_NORM)
            self.optimizer.step()
            self.ema.update()
            found.append((losses.total.item(), norm.item()))
        return found

    def whole(self) -> dict[str, Tensor]:
        """Every tensor of the state by its name in a checkpoint, whole."""
        return full_state(self.model, self.state.tensors())


def by_hand(steps: int, **changes: Any) -> Iterator[tuple[float, float, dict[str, Tensor]]]:
    """The same run, plainly: dense losses, torch's AdamW and clipping, an average by its formula.

    Gives loss, norm and the whole state after each step.
    """
    model = make_model(**changes)
    optimizer, average = adamw(model), {k: v.clone() for k, v in model.state_dict().items()}
    for step in range(steps):
        optimizer.zero_grad()
        total = dense_total(model, global_batch(step), BILINGUAL)
        total.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        for name, tensor in model.state_dict().items():
            average[name] = DECAY * average[name] + (1 - DECAY) * tensor
        state = {f"model/{name}": tensor.clone() for name, tensor in model.state_dict().items()}
        state |= {f"ema/{name}": tensor.clone() for name, tensor in average.items()}
        yield total.item(), norm.item(), state


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=LR, eps=EPS, weight_decay=0.1, fused=True)


def progress(step: int) -> Progress:
    return Progress(step, step * BATCH_SIZE, dropped=0, seconds=1.5, steps_per_epoch=10)


def save_here(run: Run, folder: Path, step: int) -> None:
    """Save and wait; the group that Checkpoints makes is ended, for pools live long."""
    checkpoints = Checkpoints(folder, run.world)
    checkpoints.save(run.state, progress(step), wait=True)
    end(checkpoints)


def load_here(run: Run, folder: Path) -> Progress:
    """Load the newest."""
    checkpoints = Checkpoints(folder, run.world)
    path = checkpoints.latest()
    assert path is not None
    found = checkpoints.load(path, run.state)
    end(checkpoints)
    return found


def end(checkpoints: Checkpoints) -> None:
    if checkpoints._group is not None:
        dist.destroy_process_group(checkpoints._group)
