"""What a piece of distributed work costs: bytes that this rank sends, and peak memory.

For the self-test, the tests and the benchmarks; training itself measures nothing of this. Not for
time.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SENDS_NOTHING = ("recv_", "recv_any_source_", "barrier", "monitored_barrier_")


class SentBytes(TorchDispatchMode):
    """Count the bytes of tensors that this rank sends while the mode is on, in `total`.

    Counts what the best algorithm of each collective sends: (n - 1) / n of the result for a gather
    or reduce-scatter among n ranks, twice that for an all-reduce. A backend may send more (gloo's
    reduce-scatter twice as much). Raises ValueError on a collective that it does not know.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            self.total += _sent(func._opname, args)
        return func(*args, **(kwargs or {}))


def _sent(name: str, args: tuple[Any, ...]) -> int:
    if name in SENDS_NOTHING:
        return 0
    group = next(a for a in args if isinstance(a, torch.ScriptObject) and _is_group(a))
    group = dist.ProcessGroup.unbox(group)
    n, rank = group.size(), group.rank()
    first = _bytes(args[0])
    if name == "send":
        return first
    if name in ("_allgather_base_", "allgather_", "allgather_into_tensor_coalesced_"):
        return first * (n - 1) // n
    if name in ("_reduce_scatter_base_", "reduce_scatter_", "reduce_scatter_tensor_coalesced_"):
        return _bytes(args[1]) * (n - 1) // n
    if name in ("allreduce_", "allreduce_coalesced_"):
        return 2 * first * (n - 1) // n
    if name == "alltoall_base_":
        leaving, splits = args[1], args[4]
        share = splits[rank] / max(1, len(leaving)) if splits else 1 / n
        return round(_bytes(leaving) * (1 - share))
    if name == "scatter_":  # only the root brings inputs
        return _bytes(args[1]) * (n - 1) // n
    if name == "broadcast_":
        return first  # along a chain
    raise ValueError(f"cannot count what c10d.{name} sends; expected a known collective")


def _is_group(value: torch.ScriptObject) -> bool:
    try:
        dist.ProcessGroup.unbox(value)
    except RuntimeError:
        return False
    return True


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(tensors) if isinstance(t, Tensor))


def peak_allocated_bytes(work: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Run `work` and return the most memory that tensors took at once, beside what there was."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with silent_stderr():  # the profiler writes there whenever it starts and stops
        profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        profiler.start()
    try:
        work()
    finally:
        with silent_stderr():
            profiler.stop()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        peak = max(peak, now)
    return peak


@contextmanager
def silent_stderr() -> Iterator[None]:
    """Throw away what native code writes to standard error meanwhile."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
