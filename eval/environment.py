"""On what a number was measured: versions, device, kind of machine; no names of hosts or users.

Not for what was measured (results.py).
"""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from m2encoder import __version__

PACKAGES = {"torch": ("torch",), "numpy": ("numpy",), "faiss": ("faiss-cpu", "faiss-gpu", "faiss")}


def environment(*, device: str = "cpu", precision: str = "float32") -> dict[str, str | None]:
    """Return versions, device, precision and what kind of machine this is; None if not installed.

    device: where vectors were computed, as torch writes it; a GPU's model is added.
    """
    found: dict[str, str | None] = {"m2encoder": __version__, "python": platform.python_version()}
    found |= {name: _version(packages) for name, packages in PACKAGES.items()}
    return found | {"device": _device(device), "precision": precision, "machine": _machine()}


def _version(packages: tuple[str, ...]) -> str | None:
    for package in packages:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


def _device(device: str) -> str:
    if not device.startswith("cuda"):
        return device
    import torch

    known = torch.cuda.is_available()
    return f"{device} ({torch.cuda.get_device_name(device)})" if known else device


def _machine() -> str:
    cores = os.cpu_count() or 1
    kind = " ".join(filter(None, [platform.system(), platform.machine(), _processor()]))
    return f"{kind}, {cores} {'core' if cores == 1 else 'cores'}"


def _processor() -> str:
    """Return the processor's model where Linux tells it, otherwise nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else ""
