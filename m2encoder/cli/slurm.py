"""Make a process that Slurm's `srun` started one of those that train together.

torchrun needs nothing of this. Not for submitting jobs: configs/slurm has an example.
"""

import os
import re
from collections.abc import Mapping, MutableMapping

from m2encoder.errors import ConfigError

FIRST_PORT, PORTS = 20_000, 20_000


def adopt_slurm(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set what torchrun would set, where srun started this process as one of several.

    A batch script itself, and a single task, are left alone. MASTER_ADDR and MASTER_PORT stay where
    they are given. Raises ConfigError when Slurm's variables are incomplete.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")  # only srun sets it
    if "RANK" in environment or tasks == "1":
        return
    found = {
        "RANK": _of(environment, "SLURM_PROCID"),
        "LOCAL_RANK": _of(environment, "SLURM_LOCALID"),
        "WORLD_SIZE": tasks,
        "LOCAL_WORLD_SIZE": _of(environment, "SLURM_STEP_TASKS_PER_NODE").split("(")[0],
        "MASTER_ADDR": first_host(_of(environment, "SLURM_STEP_NODELIST")),
        "MASTER_PORT": str(FIRST_PORT + int(environment.get("SLURM_JOB_ID", "0")) % PORTS),
    }
    for name, value in found.items():
        environment.setdefault(name, value)


def first_host(nodes: str) -> str:
    """Return the first of Slurm's list of hosts: `gpu[03-05,9],cpu1` is gpu03."""
    found = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?([^,]*)", nodes)
    if found is None:
        raise ConfigError(f"SLURM_STEP_NODELIST is {nodes!r}, expected host names; set MASTER_ADDR")
    return "".join(part or "" for part in found.groups())


def _of(environment: Mapping[str, str], name: str) -> str:
    if name not in environment:
        raise ConfigError(
            f"srun started this process, but {name} is not set; start it with torchrun instead"
        )
    return environment[name]
