"""Configuration files: find them by path or shipped name, fill in presets; list and copy them.

Not for what the settings mean: config.py.
"""

import json
import shutil
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from m2encoder.errors import ConfigError
from m2encoder.presets import preset, preset_values


def shipped_configs() -> dict[str, Path]:
    """Return `kind/name` to file for every shipped YAML, for example `pretrain/demo`."""
    root = Path(str(resources.files("m2encoder") / "configs"))
    return {
        path.relative_to(root).with_suffix("").as_posix(): path
        for path in sorted(root.rglob("*.yaml"))
    }


def find_config(name: str, kind: str = "pretrain") -> Path:
    """Return the file that `name` means: a path, or a shipped name with or without its kind.

    Raises ConfigError when there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = shipped_configs()
    for candidate in (name, f"{kind}/{name}"):
        if candidate in shipped:
            return shipped[candidate]
    names = ", ".join(n.partition("/")[2] for n in shipped if n.startswith(kind))
    raise ConfigError(f"no configuration {name!r}: neither a file nor a shipped one ({names})")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping. Raises ConfigError with the file and line on anything else."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: holds a {type(values).__name__}, expected a mapping of settings"
        )
    return values


def compose_config(name: str) -> str:
    """Return a configuration as JSON text; `model: PRESET` and `{preset: ...}` filled.

    JSON because its strings are quoted: `out: "1e-3"` would come back from YAML as a number.
    """
    values = read_yaml(find_config(name))
    model = values.get("model")
    if isinstance(model, str):
        values["model"] = preset_values(model)
    elif isinstance(model, dict) and "preset" in model:
        rest = {key: value for key, value in model.items() if key != "preset"}
        values["model"] = preset_values(model["preset"]) | rest
    return json.dumps(values, ensure_ascii=False, default=str)


def compose_model(name: str) -> str:
    """Return what `--model NAME` sets as JSON text; a mapping or a file stays as it is."""
    if name.strip().startswith("{") or Path(name).is_file():
        return name
    return json.dumps(asdict(preset(name)))


def to_yaml(cfg: Any) -> str:
    """Return a configuration, a dataclass, as YAML with every field written out."""
    return yaml.safe_dump(json.loads(json.dumps(asdict(cfg))), allow_unicode=True, sort_keys=False)


def list_configs() -> int:
    """Name the shipped configurations."""
    print("\n".join(shipped_configs()))
    return 0


def copy_config(name: str, *, out: Path = Path()) -> int:
    """Copy a shipped configuration, to edit it and pass it to --config.

    Args:
        name: its name, for example demo or model/m2-encoder-1b.
        out: file or folder to write.
    """
    source = find_config(name)
    target = out / source.name if out.is_dir() else out
    if target.exists():
        raise ConfigError(f"{target}: exists already; remove it or choose another --out")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    print(target)
    return 0
