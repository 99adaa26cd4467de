"""Locked parameters: which do not train, and from when they do (LiT, arXiv 2111.07991).

Not for how fast the others train: optim.py.
"""

from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.batchnorm import _BatchNorm

from m2encoder.config import Locked
from m2encoder.errors import ConfigError
from m2encoder.model.modeling_m2encoder import M2Encoder


def check_locks(model: M2Encoder, locked: Sequence[Locked]) -> None:
    """Raise ConfigError where a pattern matches no parameter, or all are locked to the end."""
    names = [name for name, _ in model.named_parameters()]
    for lock in locked:
        if not any(fnmatchcase(name, lock.pattern) for name in names):
            near = get_close_matches(lock.pattern.rstrip(".*"), _prefixes(names), 3, cutoff=0.4)
            example = ", ".join(f"{name}*" for name in near) or "image.*, text.*"
            raise ConfigError(
                f"locked: pattern {lock.pattern!r} matches no parameter; expected for example "
                f"{example}"
            )
    forever = [lock.pattern for lock in locked if lock.until >= 1]
    if names and all(any(fnmatchcase(name, p) for p in forever) for name in names):
        raise ConfigError(
            f"locked: {', '.join(forever)} locks every parameter to the end; leave some to train"
        )


def _prefixes(names: Sequence[str]) -> list[str]:
    parts = [name.split(".") for name in names]
    return sorted({".".join(p[:n]) for p in parts for n in range(1, len(p) + 1)})


def apply_locks(
    module: nn.Module, locked: Sequence[Locked], *, step: int, total_steps: int
) -> bool:
    """Set requires_grad of every parameter as `step` (from 0) wants it; says if any changed.

    module: an M2Encoder, or what it is wrapped in. A lock holds while step < until x total_steps.
    Locked batch normalisation no longer learns its statistics either: call this after
    module.train().
    After a change DistributedDataParallel must be made anew, because it hooks only parameters that
    train when it is made. FSDP2 (sharding.py) goes on as it is: it looks anew at every gathering.
    """
    model = next(part for part in module.modules() if isinstance(part, M2Encoder))
    now = [lock.pattern for lock in locked if step < lock.until * total_steps]
    changed = []
    for name, parameter in model.named_parameters():
        trains = not any(fnmatchcase(name, pattern) for pattern in now)
        if parameter.requires_grad != trains:
            changed.append((name, trains))
    if changed:
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()  # what is still gathered would not learn of it
        parameters = dict(model.named_parameters())
        for name, trains in changed:
            parameters[name].requires_grad_(trains)
    if now:
        for part in model.modules():
            if isinstance(part, _BatchNorm) and not any(p.requires_grad for p in part.parameters()):
                part.eval()
    return bool(changed)
