"""A profile of a few steps: a trace to look at, and the ten largest costs in words.

Not for how long the loop waits for data over a whole run (step_clock.py).
"""

import logging
from collections.abc import Generator, Iterable
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from m2encoder.measure import silent_stderr

T = TypeVar("T")
logger = logging.getLogger(__name__)

SKIPPED_STEPS, PROFILED_STEPS = 5, 5
LARGEST = 10


def profiled(batches: Iterable[T], out: Path) -> Generator[T, None, None]:
    """Yield the batches, and profile what the loop does with some of them.

    The first SKIPPED_STEPS are left out (compilation, caches), PROFILED_STEPS measured: waiting for
    the batch and all that the loop's body does. Then `out`/profile holds trace.json.gz (for
    chrome://tracing or Perfetto) and costs.txt, whose lines are logged too. A run that ends earlier
    is profiled as far as it came, if at all.
    """
    iterator = iter(batches)
    yield from islice(iterator, SKIPPED_STEPS)
    profiler, count = _started(), 0
    try:
        for batch in islice(iterator, PROFILED_STEPS):
            count += 1
            yield batch
    finally:  # also when the loop fails
        with silent_stderr():
            profiler.stop()
    if count:
        _write(profiler, out / "profile")
    else:
        logger.warning("no profile: the run ended within the first %d steps", SKIPPED_STEPS)
    yield from iterator


def _started() -> profile:
    gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    profiler = profile(activities=[ProfilerActivity.CPU, *gpu])
    with silent_stderr():  # the profiler writes there whenever it starts and stops
        profiler.start()
    return profiler


def _write(profiler: profile, folder: Path) -> None:
    lines = largest_costs(profiler.key_averages())
    for line in lines:
        logger.info("%s", line)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / "trace.json.gz"))
        (folder / "costs.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        logger.warning("%s: cannot be written (%s)", folder, error.strerror)
    else:
        logger.info("profile: %s", folder / "trace.json.gz")


def largest_costs(averages: Iterable[Any]) -> list[str]:
    """Return a heading and the LARGEST costs as aligned lines: name, own time, share, calls.

    averages: what `torch.profiler.profile.key_averages` gives. Where a GPU did anything its kernels
    are listed, whose sum is the time that it was busy; else operations by CPU time. Own time leaves
    out what an operation called.
    """
    kernels, operations = {}, {}
    for each in averages:
        if each.device_type == DeviceType.CPU:
            operations[each.key] = (each.self_cpu_time_total, each.count)
        elif not each.is_user_annotation:  # those span kernels that are listed already
            kernels[each.key] = (each.self_device_time_total, each.count)
    times, device = (kernels, "GPU") if kernels else (operations, "CPU")
    whole = sum(own for own, _ in times.values()) or 1
    largest = sorted(times, key=lambda name: -times[name][0])[:LARGEST]
    width = max([len(_short(name)) for name in largest], default=0)
    lines = [f"the {len(largest)} largest costs, {device} time without what each calls:"]
    for name in largest:
        own_us, calls = times[name]
        lines.append(
            f"  {_short(name).ljust(width)}  {own_us / 1000:9.2f} ms  {100 * own_us / whole:5.1f} %"
            f"  {calls:6,} calls"
        )
    return lines


def _short(name: str) -> str:
    return name if len(name) <= 60 else name[:57] + "..."
