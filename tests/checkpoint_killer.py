"""Save a checkpoint over and over in processes killed at one file operation after another.

python checkpoint_killer.py FOLDER: for n = 1, 2, ... a fork of this process saves step 2 beside
step 1 and dies (SIGKILL) just before its n-th operation on files below FOLDER; n grows until it
survives. Prints one JSON line per fork. It forks because importing torch takes seconds.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from m2encoder.checkpoint import Checkpoints, Progress, TrainState

CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def make_state(value: float) -> TrainState:
    """A model whose every weight is `value`."""
    model = nn.Linear(2, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return TrainState(model, torch.optim.AdamW(model.parameters()))


def save(folder: Path, step: int) -> None:
    """Save, keeping one checkpoint alone."""
    progress = Progress(step, step, dropped=0, seconds=0, steps_per_epoch=1)
    Checkpoints(folder, keep_last=1).save(make_state(step), progress, wait=True)


def die_before(count: int, folder: Path) -> None:
    """Kill this process just before its count-th change below folder, and say before what."""
    seen = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in CHANGES and str(args[0]).startswith((str(folder), ".step")):
            seen += 1
            if seen == count:
                name = os.path.basename(str(args[0]))
                os.write(1, (json.dumps({"killed_before": [event, name]}) + "\n").encode())
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def main() -> None:
    """Kill until one survives; the folder of try n is FOLDER/n."""
    root, count, status = Path(sys.argv[1]), 0, signal.SIGKILL
    while status == signal.SIGKILL:
        count += 1
        folder = root / str(count)
        save(folder, 1)
        child = os.fork()
        if child == 0:
            try:
                die_before(count, folder)
                save(folder, 2)
                os._exit(0)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
    sys.stdout.write(json.dumps({"status": status, "tries": count}) + "\n")


if __name__ == "__main__":
    main()
