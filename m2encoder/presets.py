"""The shapes that have a name (`m2-encoder-1b`, ...), kept as YAML in configs/model.

Not for weights: load.py finds those.
"""

from importlib import resources
from typing import Any

import yaml

from m2encoder.errors import ConfigError
from m2encoder.model.architecture import Architecture


def list_presets() -> list[str]:
    """Return the names of the shipped shapes, sorted."""
    folder = resources.files("m2encoder") / "configs" / "model"
    return sorted(
        f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")
    )


def preset_values(name: str) -> dict[str, Any]:
    """Return the fields that preset `name` sets. Raises ConfigError on an unknown name."""
    if name not in list_presets():
        raise ConfigError(f"no model preset {name!r}; expected one of {', '.join(list_presets())}")
    path = resources.files("m2encoder") / "configs" / "model" / f"{name}.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def preset(name: str) -> Architecture:
    """Return the shape called `name`. Raises ConfigError on an unknown name."""
    return Architecture(**preset_values(name))
