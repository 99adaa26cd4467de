"""`m2enc doctor`: look at this machine before trusting it with a long run."""

from dataclasses import asdict
from json import dumps
from typing import TYPE_CHECKING, Literal

from m2encoder.cli.launch import is_worker, launch

if TYPE_CHECKING:
    from m2encoder.doctor import LossCheck

EXIT_WRONG = 1


def loss(*, world: int = 4, device: Literal["cpu"] | None = None, json: bool = False) -> int:
    """Compare the contrastive loss in every placement with one plain float64 matrix.

    Starts processes on the CPU; under torchrun it uses torchrun's, and their GPUs. Exits with 1
    when any placement is wrong.

    Args:
        world: Processes to start.
        device: cpu leaves GPUs alone.
        json: Print JSON instead of a table.
    """
    if not is_worker():
        flags = ["--json"] if json else []
        return launch(["doctor", "loss", "--device", "cpu", *flags], world)
    from m2encoder.distributed import joined_world
    from m2encoder.doctor import BATCH, DIM, TOLERANCE, check_loss

    with joined_world(device) as here:
        checks = []
        if here.is_first and not json:
            print(f"{here.size} processes on {here.device.type}, {BATCH} pairs each, width {DIM}\n")
            print("| loss | grid | negatives from | error | scale ratio | KiB sent | KiB peak | |")
            print("|---|---|--:|--:|--:|--:|--:|---|")
        for check in check_loss(here):
            checks.append(check)
            if here.is_first and not json:
                print(_row(check, here.size), flush=True)
        wrong = sum(not check.is_right for check in checks)
        if here.is_first and json:
            print(dumps([asdict(c) | {"is_right": c.is_right} for c in checks], indent=2))
        elif here.is_first:
            print(f"\n{len(checks)} placements, {wrong} wrong (tolerance {TOLERANCE:g})")
    return EXIT_WRONG if wrong else 0


def _row(check: "LossCheck", world_size: int) -> str:
    cells = [
        check.kind,
        check.grid,
        f"{check.group_ranks} of {world_size}",
        f"{check.error:.1e}",
        f"{check.scale_ratio:.9f}",
        f"{check.sent_bytes / 1024:,.0f}",
        f"{check.peak_bytes / 1024:,.0f}",
        "ok" if check.is_right else "WRONG",
    ]
    return f"| {' | '.join(cells)} |"
