"""The contrastive loss beside its peers: bytes, memory, time, and whether gradients are right.

Run it in the environment that has open_clip, `.venv-peers`; a Markdown table per mode:

    python benchmarks/loss.py                            W gloo processes on this machine
    python benchmarks/loss.py --nodes 4 --rate 50mbit    the same as nodes on slow links
    python benchmarks/loss.py --gpu                      one process on a GPU, open_clip or not

Linux only. Root and iproute2 let the processes talk in a private network, whose device counts what
really travels, headers and acknowledgements included; --nodes needs them. Every process has one
thread. Times are from when all ranks are ready to when the slowest is done, forward and backward,
in float32: the median and the range of turns that go round all losses. Gradients are compared in
float64 with those of the whole matrix in one process: the error of the features' after the best
rescaling, their ratio to W times the reference's and the ratio of logit_scale's mean over ranks; 1
is right, because data-parallel training averages over ranks. A loss is exact if all three are
within 1e-6. Groups are compared with groups.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # gloo looks up names that nodes lack

import loss_nodes
import loss_peers
import torch
from loss_nodes import NoNetworkError, Pool
from loss_peers import BASELINE, CLIP, LOSSES, OURS, SIGLIP, Check, LossFn
from torch import Tensor

from m2encoder.compat import import_open_clip
from m2encoder.errors import MissingExtraError
from m2encoder.loss import make_loss
from m2encoder.measure import peak_allocated_bytes

CASES = {2: [256], 4: [64, 256, 1024], 8: [256]}
"""Ranks and their batches, unless asked otherwise."""
GPU_BATCHES = [8192, 16384, 32768, 65536]
EXACT = 1e-6
MIB = 2**20
ENOUGH_S = 8.0
"""A loss that has taken so long in three turns takes no more of them."""


class Row(NamedTuple):
    """What one loss gave in one world."""

    name: str
    check: Check
    counted_bytes: int
    """Of the rank that sends most."""
    device_bytes: int
    peak_bytes: int
    times_s: list[float]


def measure(pool: Pool, names: list[str], batch: int, dim: int, repeats: int) -> list[Row]:
    """Measure every loss in a world that runs."""
    pool.run(loss_peers.prepare, names)
    found: dict[str, tuple[Check, int, int, int]] = {}
    for name in names:
        args = name, batch, dim
        peak = max(pool.run(loss_peers.peak_bytes, *args))  # the first step, too: a warm-up
        counted, device = pool.leaving_bytes(loss_peers.sent_bytes, *args)
        check = pool.run(loss_peers.check_gradients, *args)[0]
        found[name] = check, max(counted), device, peak
    times = in_turn(
        names, lambda name: max(pool.run(loss_peers.seconds, name, batch, dim)), repeats
    )
    return [Row(name, *found[name], times[name]) for name in names]


def in_turn(
    names: Iterable[str], run: Callable[[str], float], repeats: int
) -> dict[str, list[float]]:
    """Take the time of each, round after round, so that a busy minute meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repeats):
        for name, taken in times.items():
            if len(taken) < 3 or sum(taken) < ENOUGH_S:
                taken.append(run(name))
    return times


def verdict(name: str, check: Check) -> str:
    """Say whether the gradients are those of the full batch."""
    worst = max(check.error, abs(check.ratio - 1), abs(check.scale_ratio - 1))
    if LOSSES[name].groups > 1 or not worst < EXACT:
        return "no"
    return "sigmoid" if LOSSES[name].kind == "sigmoid" else "yes"


def ms(times_s: list[float]) -> dict[str, str]:
    """Return the median and the range as cells."""
    low, middle, high = (1e3 * f(times_s) for f in (min, statistics.median, max))
    return {"ms": f"{middle:,.0f}", "range": f"{low:,.0f}-{high:,.0f}"}


def times_ours(times_s: list[float], ours_s: list[float]) -> str:
    """Return how many times ours it takes."""
    return f"{statistics.median(times_s) / statistics.median(ours_s):.2f}"


def gradient_cells(check: Check) -> dict[str, str]:
    """Return the last columns."""
    return {
        "gradient error": f"{check.error:.0e}",
        "gradient ratio": f"{check.ratio:.4f}",
        "logit_scale ratio": f"{check.scale_ratio:.4f}",
    }


def print_rows(rows: list[dict[str, str]], *, header: bool = True) -> None:
    """Print rows of the same columns as Markdown, numbers to the right."""
    if header:
        print("| " + " | ".join(rows[0]) + " |")
        words = ("loss", "exact", "features")
        print("|" + "|".join("---" if name in words else "--:" for name in rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(row.values()) + " |", flush=True)


def compare(cases: dict[int, list[int]], names: list[str], dim: int, repeats: int) -> None:
    """Print the table of worlds on this machine."""
    try:
        networks = [loss_nodes.private_network()]
    except NoNetworkError as error:
        networks = []
        print(f"Nothing counts what is on the wire: {error}.\n")
    header = True
    for world_size, batches in cases.items():
        with Pool(world_size, networks) as pool:
            for batch in batches:
                rows = []
                for row in measure(pool, names, batch, dim, repeats):
                    wire = f"{row.device_bytes / world_size / MIB:.2f}" if networks else "-"
                    rows.append(
                        {"W": str(world_size), "b": str(batch), "loss": row.name}
                        | {"exact": verdict(row.name, row.check)}
                        | {"MiB sent per rank": f"{row.counted_bytes / MIB:.2f}"}
                        | {"MiB on the wire per rank": wire}
                        | {"MiB peak": f"{row.peak_bytes / MIB:.1f}"}
                        | ms(row.times_s)
                        | gradient_cells(row.check)
                    )
                print_rows(rows, header=header)
                header = False


class Cluster(NamedTuple):
    """What stands for several machines."""

    nodes: int
    rate: str
    world_size: int


def compare_on_nodes(
    cluster: Cluster, names: list[str], batch: int, dim: int, repeats: int
) -> None:
    """Print the table of a world on nodes that slow links join, and that of whole steps there."""
    try:
        networks = loss_nodes.joined_nodes(cluster.nodes, cluster.rate)
    except NoNetworkError as error:
        print(f"No nodes: {error}.")
        return
    link = loss_nodes.bits_per_s(cluster.rate) / 8
    print(
        f"{cluster.nodes} nodes of {cluster.world_size // cluster.nodes} ranks, {cluster.rate} out "
        f"of each, b={batch}, d={dim}; a node's link alone takes `link ms`.\n"
    )
    with Pool(cluster.world_size, networks) as pool:
        rows = measure(pool, names, batch, dim, repeats)
        ours_s = next((row.times_s for row in rows if row.name == OURS), rows[0].times_s)
        print_rows(
            [
                {"loss": row.name, "exact": verdict(row.name, row.check)}
                | {"MiB sent per rank": f"{row.counted_bytes / MIB:.2f}"}
                | {"MiB leaving a node": f"{row.device_bytes / MIB:.2f}"}
                | {"link ms": f"{1e3 * row.device_bytes / link:,.0f}"}
                | {"MiB peak": f"{row.peak_bytes / MIB:.1f}"}
                | ms(row.times_s)
                | {"x ours": times_ours(row.times_s, ours_s)}
                | gradient_cells(row.check)
                for row in rows
            ]
        )
        steps = [name for name in (OURS, BASELINE, CLIP, SIGLIP) if name in names]
        if steps:
            print_steps(pool, steps, batch, dim, repeats)


def print_steps(pool: Pool, names: list[str], batch: int, dim: int, repeats: int) -> None:
    """Print the table of whole training steps."""
    towers = loss_peers.Towers(dim, "infonce")
    parameters = sum(p.numel() for p in towers.parameters())
    print(
        f"\nA whole step: two towers of one transformer block over {loss_peers.TOKENS} tokens "
        f"each, together {parameters:,} parameters, whose gradients DDP averages over the same "
        f"links; AdamW.\n"
    )
    leaving = {}
    for name in names:
        for _ in range(2):  # DDP arranges its buckets anew after the first step
            leaving[name] = pool.leaving_bytes(loss_peers.train_seconds, name, batch, dim)[1]
    times = in_turn(
        names, lambda name: max(pool.run(loss_peers.train_seconds, name, batch, dim)), repeats
    )
    print_rows(
        [
            {"loss": name, "MiB leaving a node": f"{leaving[name] / MIB:.2f}"}
            | ms(times[name])
            | {"x ours": times_ours(times[name], times[names[0]])}
            for name in names
        ]
    )


def clip_on_device() -> tuple[str, LossFn]:
    """Return open_clip's loss, or its lines where it is not installed, and what to call it."""
    try:
        return "open_clip ClipLoss", import_open_clip().ClipLoss(cache_labels=True)
    except MissingExtraError:
        name = "ClipLoss's lines (no open_clip here)"
        return name, lambda image, text, scale, _: loss_peers.clip_lines(
            image, text, scale, image, text
        )


def compare_on_device(device: str, batches: list[int], dim: int, repeats: int) -> None:
    """Print the table of one process on one device."""
    is_cuda = torch.device(device).type == "cuda"
    name = torch.cuda.get_device_name() if is_cuda else device
    print(
        f"{name}, d={dim}, world of one, float32 products in "
        f"{torch.get_float32_matmul_precision()} precision; gradient error at b={batches[0]} "
        f"against the whole matrix in float64.\n"
    )
    clip_name, clip = clip_on_device()

    def autocast(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            return clip(image, text, scale, bias)

    ours = make_loss(rank=0, world_size=1)
    every = {"ours": ours, clip_name: clip}
    half = every | {f"{clip_name}, autocast": autocast}
    header = True
    for dtype, losses in ((torch.float32, every), (torch.bfloat16, half)):
        for batch in batches:
            inputs = loss_peers.make_inputs(batch, dim, dtype, device)
            reference = dense_gradients(inputs) if batch == batches[0] else None
            rows = []
            for loss_name, loss_fn in losses.items():
                row = {"features": str(dtype).removeprefix("torch."), "b": str(batch)}
                row |= {"loss": loss_name} | device_cells(loss_fn, inputs, reference, repeats)
                rows.append(row)
            print_rows(rows, header=header)
            header = False


def dense_gradients(inputs: loss_peers.Inputs) -> Tensor:
    """Return the exact gradients of both features, (2, b, d) in float64."""
    exact = loss_peers.Inputs(*(x.detach().double().requires_grad_() for x in inputs))
    loss_peers.dense_loss(LOSSES[OURS], *exact).backward()
    return gradients(exact)


def gradients(inputs: loss_peers.Inputs) -> Tensor:
    """Return the gradients of both features in float64."""
    return torch.stack([x.grad.double() for x in inputs[:2] if x.grad is not None])


def device_cells(
    loss_fn: LossFn, inputs: loss_peers.Inputs, reference: Tensor | None, repeats: int
) -> dict[str, str]:
    """Measure one loss on one device; OOM where its memory does not suffice."""
    device = inputs.image.device

    def work() -> None:
        for x in inputs:
            x.grad = None
        loss_peers.step(loss_fn, "infonce", inputs)

    try:
        work()
        error = None
        if reference is not None:
            error = f"{float((gradients(inputs) - reference).norm() / reference.norm()):.1e}"
        peak = peak_allocated_bytes(work, device)
        times_s = [device_seconds(work, device) for _ in range(repeats)]
    except torch.OutOfMemoryError:
        return {"ms": "OOM", "range": "-", "MiB peak": "OOM", "gradient error": "-"}
    finally:
        for x in inputs:
            x.grad = None
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return ms(times_s) | {"MiB peak": f"{peak / MIB:,.0f}", "gradient error": error or "-"}


def device_seconds(work: Callable[[], None], device: torch.device) -> float:
    """Return what work takes on the device."""
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    work()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1e3


def numbers(words: str) -> list[int]:
    """Read 2,4,8."""
    return [int(word) for word in words.split(",")]


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--world", type=numbers, help="numbers of ranks, even, like 2,4,8")
    parser.add_argument("--batch", type=numbers, help="pairs per rank, like 256,1024")
    parser.add_argument("--dim", type=int, help="width of the features")
    parser.add_argument("--repeats", type=int, default=5, help="turns that are timed")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the losses' names")
    parser.add_argument("--nodes", type=int, help="join so many nodes by slow links")
    parser.add_argument("--rate", default="50mbit", help="what may leave a node, as tc writes it")
    parser.add_argument("--gpu", action="store_true", help="compare in one process on one device")
    parser.add_argument(
        "--device", default="cuda", help="for --gpu; cpu with a small --batch works"
    )
    args = parser.parse_args()
    worlds = args.world or ([8] if args.nodes else list(CASES))
    if args.nodes and len(worlds) > 1:
        parser.error("--nodes takes one --world")
    for world_size in worlds:
        if world_size < 2 or world_size % 2 or world_size % (args.nodes or 1):
            parser.error(f"--world {world_size}, expected an even number that --nodes divides")
    batches = args.batch or ([128] if args.nodes else [])
    if args.nodes and len(batches) > 1:
        parser.error("--nodes takes one --batch")
    try:
        loss_nodes.bits_per_s(args.rate)
    except ValueError as error:
        parser.error(f"--{error}")
    args.names = [n for n in LOSSES if any(word in n for word in args.only)]
    if not args.names:
        parser.error(f"--only {'; '.join(args.only)}, expected parts of: {'; '.join(LOSSES)}")
    args.cases = {w: batches or CASES.get(w, [256]) for w in worlds}
    return args


def main() -> None:
    """Measure and print."""
    args = parse()
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}"
    )
    if args.gpu:
        torch.set_num_threads(1)
        compare_on_device(args.device, args.batch or GPU_BATCHES, args.dim or 1024, args.repeats)
        return
    names = args.names
    try:
        print(f"open_clip {import_open_clip().__version__}\n")
    except MissingExtraError as error:
        print(f"Without open_clip's losses: {error}\n")
        names = [name for name in names if not LOSSES[name].is_peer]
    dim = args.dim or 512
    if args.nodes:
        [(world_size, [batch])] = args.cases.items()
        cluster = Cluster(args.nodes, args.rate, world_size)
        compare_on_nodes(cluster, names, batch, dim, args.repeats)
    else:
        compare(args.cases, names, dim, args.repeats)


if __name__ == "__main__":
    main()
