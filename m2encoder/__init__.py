"""m2encoder: Chinese-English image-text encoders, from pictures to search.

The public names and nothing else. They load on first use, so `import m2encoder` stays light.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from m2encoder.encoder import BadItem, Encoder
    from m2encoder.errors import CheckpointError, ConfigError, DataError, M2EncoderError
    from m2encoder.load import load_model
    from m2encoder.model.configuration_m2encoder import M2EncoderConfig
    from m2encoder.model.modeling_m2encoder import M2Encoder
    from m2encoder.shards import Pair, ShardReader, write_shards
    from m2encoder.sources import ModelInfo, list_models

__version__ = "0.1.0"

__all__ = [
    "load_model",
    "list_models",
    "Encoder",
    "BadItem",
    "ModelInfo",
    "M2Encoder",
    "M2EncoderConfig",
    "Pair",
    "ShardReader",
    "write_shards",
    "M2EncoderError",
    "ConfigError",
    "DataError",
    "CheckpointError",
    "__version__",
]

_HOME = {
    "load_model": "m2encoder.load",
    "list_models": "m2encoder.sources",
    "ModelInfo": "m2encoder.sources",
    "Encoder": "m2encoder.encoder",
    "BadItem": "m2encoder.encoder",
    "M2Encoder": "m2encoder.model.modeling_m2encoder",
    "M2EncoderConfig": "m2encoder.model.configuration_m2encoder",
    "Pair": "m2encoder.shards",
    "ShardReader": "m2encoder.shards",
    "write_shards": "m2encoder.shards",
    "M2EncoderError": "m2encoder.errors",
    "ConfigError": "m2encoder.errors",
    "DataError": "m2encoder.errors",
    "CheckpointError": "m2encoder.errors",
}


def __getattr__(name: str) -> object:
    """Load a public name from its module on first use and keep it (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'm2encoder' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
