"""Where the environments without m2encoder are, that `make test-consumers` makes."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = os.environ.get("M2ENC_CONSUMERS", ".venv-tf4:.venv-tf5").split(":")
ENVIRONMENTS = [ROOT / folder for folder in FOLDERS]


def python_of(environment: Path) -> Path:
    """Return its interpreter; skips the test where there is none."""
    python = environment / "bin/python"
    if not python.is_file():
        pytest.skip(f"no {environment.name}; make test-consumers makes it")
    return python
