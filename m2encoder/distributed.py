"""The processes that train together: who this one is, and what they tell each other outside a step.

Started by torchrun or by m2encoder/cli/launch.py, which set the same variables. Not for the loss's
own exchanges (collectives.py).
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from m2encoder.errors import PlacementError

T = TypeVar("T")
TIMEOUT = timedelta(hours=1)
"""How long a rank waits for another, which exports or evaluates meanwhile."""


@dataclass(frozen=True)
class World:
    """This process among those that train together."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return the module with its gradients averaged over all processes."""
        if self.size == 1:
            return module
        return nn.parallel.DistributedDataParallel(
            module,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )

    def share(self, value: T, *, source: int = 0) -> T:
        """Return `value` of rank `source` on every rank; small things only (pickled)."""
        if self.size == 1:
            return value
        box: list[Any] = [value if self.rank == source else None]
        dist.broadcast_object_list(box, src=source, device=self._object_device)
        return box[0]

    def concatenated(self, items: Sequence[T]) -> list[T]:
        """Return every rank's items, in order of ranks; costs one number where nobody has any."""
        if self.size == 1:
            return list(items)
        count = torch.tensor(len(items), device=self.device)
        dist.all_reduce(count)
        if not int(count):
            return []
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, list(items))
        return [item for part in parts for item in part]

    def wait(self) -> None:
        """Return when every rank has come here."""
        if self.size > 1:
            here = torch.ones((), device=self.device)
            dist.all_reduce(here)
            assert int(here) == self.size  # on a GPU this is what waits

    @property
    def _object_device(self) -> torch.device | None:
        return self.device if self.device.type == "cuda" else None


def ranks_per_machine(world: World) -> int:
    """Return how many of the ranks run on this machine: torchrun says it; else all of them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world.size)) if world.size > 1 else 1


@contextmanager
def joined_world(device: Literal["cpu"] | None = None) -> Iterator[World]:
    """Join the processes that torchrun or `--nproc` started; alone, be a world of one.

    One GPU per process where there are GPUs (NCCL), else, or with device="cpu", CPUs (gloo). Raises
    PlacementError when a process has no GPU of its own.
    """
    has_gpu = device is None and torch.cuda.is_available()
    if "RANK" not in os.environ:
        yield World(device=torch.device("cuda" if has_gpu else "cpu"))
        return
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    own_device = torch.device("cpu")
    if has_gpu:
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise PlacementError(
                f"process {local_rank} of this machine has no GPU, {count} found; start as many "
                f"processes as GPUs"
            )
        own_device = torch.device("cuda", local_rank)
        torch.cuda.set_device(own_device)
    # gloo beside NCCL: what ranks agree on outside a step is on the CPU and waits for no GPU
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpu else "gloo", timeout=TIMEOUT)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), own_device)
    finally:
        dist.destroy_process_group()
